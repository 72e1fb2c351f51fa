"""`pytest --policy FILE.py:Name`: the verdict on policies outside the repository, good and bad."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
from test_decoding import SPEC

from d2cache import decode, load_policy

ROOT = Path(__file__).parents[2]
SUBMISSION = """
from dataclasses import dataclass

from d2cache import D2Cache, highest


@dataclass(frozen=True)
class Lawful:
    k: int = 2
    uses_attention = True

    def choose(self, state):
        surest = highest(state.confidence, state.masked & state.block, self.k)
        return surest | D2Cache(k=3).attended(state) | state.fresh


class BreaksItAtStep3:
    uses_attention = False

    def choose(self, state):
        return state.known if state.step == 2 else state.masked


class CountsItsCalls:
    uses_attention = False

    def __init__(self):
        self.calls = 0

    def choose(self, state):
        self.calls += 1
        return state.block_starts | state.block | (self.calls % 8 == 0)


class ImportsAModuleBesideIt(Lawful):
    def choose(self, state):
        from beside import SHARED

        return highest(state.confidence, state.masked & state.block, SHARED)


class LooksAtTheCompany:
    uses_attention = False

    def choose(self, state):
        to_decode = state.masked & state.block
        return to_decode & (to_decode.cumsum(dim=1) <= len(state.known))


class NeedsAnArgument(Lawful):
    def __init__(self, width):
        self.width = width


class ChoosesNothing:
    uses_attention = False


class SaysNothingOfAttention:
    def choose(self, state):
        return state.masked


THREE = Lawful(k=3)
ROWS = [1, 2]
"""


@pytest.fixture(scope="module")
def submission(tmp_path_factory):
    file = tmp_path_factory.mktemp("submission") / "mine.py"
    file.write_text(SUBMISSION)
    (file.parent / "beside.py").write_text("SHARED = 4\n")
    (file.parent / "broken.py").write_text("x = 1\nif:\n")
    (file.parent / "raises.py").write_text("1 / 0\n")
    (file.parent / "leaves.py").write_text("raise SystemExit(3)\n")
    return file


def grade(file, call, *arguments):
    """The verdict, asked for in the submission's folder."""
    command = [sys.executable, "-m", "pytest", "-q", *arguments, "--policy", f"{file.name}:{call}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=file.parent, env=environment
    )


def test_a_lawful_policy_passes_and_nothing_but_laws_is_run(submission):
    """One law stands for all; other tests have "contract" in their names, too."""
    result = grade(submission, "Lawful(k=1)", ROOT, "-k", "contract")
    assert result.returncode == 0, result.stdout
    assert re.search(r"^1 passed, \d+ deselected", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "name, verdict",
    [
        ("BreaksItAtStep3", "chose no masked position of an unfinished block in step 3"),
        ("CountsItsCalls()", "answers otherwise when it is asked again about the same state"),
        ("LooksAtTheCompany", "test_a_sequence_decodes_the_same_alone_as_in_company"),
    ],
)
def test_an_unlawful_policy_fails_by_the_first_law_that_it_breaks(submission, name, verdict):
    result = grade(submission, name, ROOT / "tests" / "laws" / "test_decoding.py")
    assert result.returncode == 1
    assert "\n1 failed" in result.stdout and verdict in result.stdout


def law(name):
    return SimpleNamespace(originalname=name)


def test_the_contract_is_judged_first_and_the_oracle_last():
    """The oracle sees every fault, and says least about it."""
    laws = [law("test_like_the_oracle"), law("test_a_step"), law("test_the_contract")]
    assert sorted(laws, key=conftest.order_of_grading) == laws[::-1]


NO_POLICY = [
    ("mine.py", "policy is 'mine.py', should be FILE.py:Name or FILE.py:Name(k=8)"),
    ("none.py:Lawful", "No such file or directory"),
    ("broken.py:Lawful", "SyntaxError: invalid syntax (broken.py, line 2)"),
    ("raises.py:Lawful", "ZeroDivisionError: division by zero"),
    ("leaves.py:Lawful", "SystemExit: 3"),
    ("mine.py:Unlawful", "NameError: name 'Unlawful' is not defined"),
    ("mine.py:Lawful(width=3)", "unexpected keyword argument 'width'"),
    ("mine.py:NeedsAnArgument", "missing 1 required positional argument: 'width'"),
    ("mine.py:ChoosesNothing", "with choose(state) and uses_attention"),
    ("mine.py:SaysNothingOfAttention", "with choose(state) and uses_attention"),
    ("mine.py:ROWS", "[1, 2], should be an object like DualCache(), with choose(state) and uses_attention"),
]


@pytest.mark.parametrize("text, message", NO_POLICY)
def test_where_there_is_no_policy_one_line_says_why(submission, text, message, monkeypatch):
    monkeypatch.chdir(submission.parent)
    asked = SimpleNamespace(addinivalue_line=print, getoption=lambda option: text)
    with pytest.raises(pytest.UsageError) as refusal:
        conftest.pytest_configure(asked)
    said = str(refusal.value)
    assert "\n" not in said and text in said and message in said


def test_a_policy_may_come_with_arguments_without_or_as_an_object(submission):
    for call, k in [("Lawful(k=5)", 5), ("Lawful", 2), ("THREE", 3)]:
        assert load_policy(f"{submission}:{call}").k == k


def test_a_policy_may_import_a_module_beside_its_file(submission):
    state = next(decode(SPEC.build(), torch.tensor([[1, 2, 3]]), 8))
    assert load_policy(f"{submission}:ImportsAModuleBesideIt").choose(state).sum() == 4
