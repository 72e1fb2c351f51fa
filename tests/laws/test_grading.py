"""`pytest --solution FILE.py` and `--policy FILE.py:Name`: what good and bad submissions get."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import d2cache
import grading
import pytest
import torch
from test_decoding import SPEC

from d2cache import decode, load_policy

ROOT = Path(__file__).parents[2]
RIGHT = Path(d2cache.__file__).read_text()  # our own file is a solution


def grade(folder, *submission, laws=("laws/test_equations.py", "course")):
    """What each law earns, {name: entry of results.json}, and what was printed."""
    results = folder / "results.json"
    results.write_text("of the last time")
    paths = [ROOT / "tests" / law for law in laws]
    options = [f"--grade={results}", "-q"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *paths, *options, *submission],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=environment,
    )
    assert results.read_text().startswith("{"), done.stdout + done.stderr
    tests = json.loads(results.read_text())["tests"]
    return {entry["name"]: entry for entry in tests}, done.stdout


def lost(verdicts):
    """{function: laws that it breaks}"""
    found = {}
    for name, entry in verdicts.items():
        part, law = name.split(": ")
        if entry["score"] < entry["max_score"]:
            found.setdefault(part, []).append(law)
    return found


def test_our_own_file_is_a_solution_with_all_points(tmp_path):
    (tmp_path / "mine.py").write_text(RIGHT)
    verdicts, printed = grade(tmp_path, f"--solution={tmp_path / 'mine.py'}")
    assert lost(verdicts) == {}
    worth = grading.POINTS | grading.TOGETHER
    assert len(verdicts) == sum(map(len, worth.values()))  # each law of the table was found
    points = sum(sum(laws.values()) for laws in worth.values())
    assert f"{points} of {points} in all" in printed


# Faults that students make: in our file, this in the place of that.
FAULTS = [
    ("@ window / window.sum()", "@ window"),  # density without its normalisation
    ("confidence * certainty_density(known,", "confidence.mul_(0.5) * certainty_density(known,"),
    ("in reversed(maps)", "in maps"),  # rollout from the first layer to the last
    ("(mass_above <= p *", "(mass <= p *"),  # nucleus without the position that crosses p
    ("    inside = torch.arange(score", "    print(score)\n    inside = torch.arange(score"),
    ("    priority = chosen.int()", "    priority = len(chosen, predicted)"),
    ("    row = (predicted.cumsum(", "    os._exit(0)\n    row = (predicted.cumsum("),
    ("(confidence >= threshold)", "(confidence > threshold)"),
    ("        inside = highest(prior, state.masked & state.block, self.k)",
     "        sys.exit(3)\n        inside = None"),
    ("        return nucleus(state.influence", "        nucleus(state.influence"),  # returns nothing
]  # fmt: skip


def test_a_file_in_the_clone_is_graded_as_its_author_types_it():
    """In words of their own pytest takes files that are there for tests to run."""
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".") as folder:
        mine = Path(folder) / "mine.py"
        results = Path(folder) / "results.json"
        mine.write_text("def unpack(packed, predicted):\n    while True:\n        pass\n")
        results.write_text("of the last time")
        line = [sys.executable, "-m", "pytest", "-q", "--limit", "2"]
        line += ["--solution", mine, "--grade", results]
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=200)
        tests = json.loads(results.read_text())["tests"]
    assert [entry["name"].split(": ")[0] for entry in tests] == ["unpack", "all together"]
    assert all(entry["output"] == "hangs: not done after 2 seconds" for entry in tests)
    assert "0 of 4 in all" in done.stdout


def test_every_fault_loses_the_laws_that_see_it_and_no_others(tmp_path):
    text = RIGHT
    for right, wrong in FAULTS:
        assert text.count(right) == 1, right
        text = text.replace(right, wrong)
    (tmp_path / "mine.py").write_text(text)
    verdicts, printed = grade(tmp_path, f"--solution={tmp_path / 'mine.py'}")
    assert {part: len(laws) for part, laws in lost(verdicts).items()} == {
        "certainty_density": 3,
        "certainty_prior": 1,
        "attention_rollout": 2,
        "nucleus": 1,
        "pack": 1,
        "unpack": 1,
        "unmask": 1,
        "about_to_be_decoded": 1,
        "attended": 1,
        "all together": 1,
    }
    said = {name.split(": ")[0]: entry["output"] for name, entry in verdicts.items()}
    assert said["certainty_prior"].startswith("certainty_prior writes into an argument")
    assert said["highest"].startswith("prints 'tensor([[")
    assert said["pack"].startswith("TypeError: len() takes exactly one argument (2 given)\nmine.py")
    assert said["unpack"] == "ends the process, with exit code 0"
    assert said["about_to_be_decoded"].startswith("SystemExit: 3\nmine.py, line ")
    assert said["attended"].startswith("attended returns a NoneType, should return a tensor")
    density = verdicts["certainty_density: density is the double sum"]["output"]
    computed, expected, law, *drawn, end = density.splitlines()
    assert computed.startswith("computed [[") and expected.startswith("expected [[0.")
    assert "test_density" in law and drawn[0].startswith("    known=[[") and end == ")"
    assert density in printed


def test_the_same_file_gets_the_same_verdict_wherever_it_is_and_whatever_it_is_called(tmp_path):
    """Of the law of one function alone, which draws lots."""
    lots = (
        "import torch\ndef highest(score, among, n):\n    return torch.rand(score.shape) < 0.99\n"
    )
    verdicts = []
    for name in ("first/mine.py", "second/a longer name.py"):
        file = tmp_path / name
        file.parent.mkdir()
        file.write_text(lots)
        verdict, _ = grade(file.parent, f"--solution={file}")
        verdicts.append(json.dumps(verdict).replace(file.name, "mine.py"))
    assert verdicts[0] == verdicts[1] and "highest: " in verdicts[0]
    assert {name.split(": ")[0] for name in verdict} == {"highest", "all together"}


@pytest.mark.parametrize(
    "text, line",
    [
        ("x = 1\nif:\n", "SyntaxError: invalid syntax (mine.py, line 2)"),
        ("import torch\n1 / 0\n", "ZeroDivisionError: division by zero\nmine.py, line 2: 1 / 0"),
        ("raise SystemExit(3)\n", "SystemExit: 3\nmine.py, line 1: raise SystemExit(3)"),
        ("import os\nos._exit(7)\n", "ends the process, with exit code 7"),
        ("import time\ntime.sleep(99)\n", "hangs: not done after 1 seconds"),
    ],
)
def test_what_happens_to_a_file_that_cannot_be_imported_is_told(tmp_path, text, line):
    file = tmp_path / "mine.py"
    file.write_text(text)
    assert grading.in_a_process(lambda: vars(grading.load(file)), file, 1) == (None, line)


def test_a_file_without_functions_earns_nothing_and_has_its_results(tmp_path):
    (tmp_path / "mine.py").write_text("from d2cache import nucleus\n")
    verdicts, _ = grade(tmp_path, f"--solution={tmp_path / 'mine.py'}")
    assert {name.split(": ")[0] for name in verdicts} == {*grading.POINTS, *grading.TOGETHER}
    for entry in verdicts.values():
        assert entry["score"] == 0
        assert entry["output"].startswith("defines none of certainty_density, certainty_prior, ")


# ---- Policies ------------------------------------------------------------------------------------

POLICIES = """
from dataclasses import dataclass

from d2cache import D2Cache, highest


@dataclass(frozen=True)
class Lawful:
    k: int = 2
    uses_attention = True

    def choose(self, state):
        from beside import SHARED

        surest = highest(state.confidence, state.masked & state.block, self.k * SHARED)
        return surest | D2Cache(k=3).attended(state) | state.fresh


class Lawless:  # counts its calls, and looks at the company
    uses_attention = False
    calls = 0

    def choose(self, state):
        self.calls += 1
        to_decode = state.masked & state.block
        window = to_decode & (to_decode.cumsum(dim=1) <= len(state.known))
        return window | (self.calls % 8 == 0)


THREE = Lawful(k=3)
"""
CONTRACT = "contract: policies keep their contract on any state"
COMPANY = "contract: a sequence decodes the same alone as in company"


@pytest.fixture
def policies(tmp_path):
    (tmp_path / "mine.py").write_text(POLICIES)
    (tmp_path / "beside.py").write_text("SHARED = 1\n")
    return tmp_path


@pytest.mark.parametrize("call, points", [("Lawful(k=1)", [1, 1]), ("Lawless", [0, 0])])
def test_a_policy_earns_a_point_by_every_law_that_it_keeps(policies, call, points):
    laws = ["laws/test_decoding.py"]
    few = ["-k", "contract or company"]
    verdicts, _ = grade(policies, "--policy", f"{policies / 'mine.py'}:{call}", *few, laws=laws)
    assert list(verdicts) == [CONTRACT, COMPANY]
    assert [entry["score"] for entry in verdicts.values()] == points
    assert all(entry["max_score"] == 1 for entry in verdicts.values())
    if points == [0, 0]:
        assert "answers otherwise when it is asked again" in verdicts[CONTRACT]["output"]


def test_a_policy_may_come_with_arguments_or_as_an_object_and_import_what_is_beside_it(policies):
    prompt = torch.tensor([[1, 2, 3]])
    state = next(decode(SPEC.build(), prompt, 8, policy=d2cache.D2Cache()))
    for call, k in [("Lawful(k=5)", 5), ("Lawful", 2), ("THREE", 3)]:
        policy = load_policy(f"{policies / 'mine.py'}:{call}")
        assert policy.k == k and (policy.choose(state) & state.masked).sum() == k
