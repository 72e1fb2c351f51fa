"""Grades a file: the laws run one by one, each in a process of its own, and earn points.

`python -m pytest --solution FILE.py` puts the functions that FILE defines in the place of ours, one
in each law: all others are the reference's. `--policy "FILE.py:Name(k=8)"` puts a policy through
the laws of the contract, a point each. `--grade results.json` writes the points as Gradescope reads
them. tests/conftest.py registers this module as a plugin of pytest.

The file is executed. Processes and time limits keep accidents apart, not malice: a course that
grades what others wrote runs this in its own sandbox.
"""

import contextlib
import copy
import functools
import importlib.util
import io
import json
import multiprocessing
import re
import sys
import traceback
from pathlib import Path

import d2cache
import pytest
import torch
from hypothesis import strategies as st

from strategies import POLICIES

# What there is to earn: points by function, and by the law that tells whether it is right.
POINTS = {
    "certainty_density": {
        "test_density_is_the_double_sum": 3,
        "test_density_is_a_share": 1,
        "test_density_grows_with_every_known_position": 1,
        "test_density_is_highest_beside_what_is_known": 1,
    },
    "certainty_prior": {"test_prior_is_confidence_times_density": 2},
    "attention_rollout": {
        "test_rollout_is_the_product_of_T_by_T_matrices": 3,
        "test_rollout_hands_on_half_of_a_recomputed_row_in_every_layer": 1,
        "test_rollout_neither_makes_nor_loses_influence": 1,
    },
    "nucleus": {
        "test_nucleus_is_the_smallest_set_whose_share_exceeds_p": 3,
        "test_nucleus_of_zero_is_one_and_of_one_is_all": 1,
        "test_nucleus_grows_with_p": 1,
    },
    "highest": {"test_highest_is_the_head_of_the_sorted_candidates": 3},
    "pack": {"test_pack_lists_the_chosen_the_predicted_first_and_repeats_only_to_fill": 3},
    "unpack": {"test_unpack_puts_back_what_pack_put_first": 2},
    "unmask": {"test_unmask_commits_the_best_of_the_block_and_what_reaches_the_threshold": 3},
    "about_to_be_decoded": {"test_stage_1_is_the_highest_prior_that_of_the_block_first": 3},
    "attended": {"test_stage_2_is_the_nucleus_of_influence_among_the_known": 2},
}
TOGETHER = {"all together": {"test_the_embedded_model_decodes_the_same_words": 2}}
STAGES = {"about_to_be_decoded", "attended"}  # methods of a class D2Cache
JUDGES = {  # the files that hold the laws
    "solution": ("test_equations.py", "test_course.py"),
    "policy": ("test_decoding.py", "test_graphs.py"),
}
# The examples that hypothesis draws hang on a test's name, so it is the same for every submission.
THEIRS = "theirs"
LAWS, FAULT, ENTRIES = pytest.StashKey(), pytest.StashKey(), pytest.StashKey()


# ---- The submission ------------------------------------------------------------------------------


def load(file):
    """The module of a file, which may import modules beside it."""
    spec = importlib.util.spec_from_file_location("solution", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    sys.path.append(str(Path(file).parent))
    spec.loader.exec_module(module)
    return module


def parts_of(theirs):
    """{name: function} of what a module defines itself: functions, and stages of its D2Cache."""
    found = {}
    for name in POINTS:
        owner, ours = theirs, d2cache
        if name in STAGES:
            owner, ours = getattr(theirs, "D2Cache", d2cache.D2Cache), d2cache.D2Cache
        part = getattr(owner, name, None)
        if callable(part) and part is not getattr(ours, name):
            found[name] = watched(part)
    return found


def replacements(theirs, names):
    """What takes the place of ours: {name in a module: function, or D2Cache with their stages}."""
    parts = {name: part for name, part in parts_of(theirs).items() if name in names}
    stages = {name: parts.pop(name) for name in STAGES & parts.keys()}
    if stages:
        bases = (theirs.D2Cache, d2cache.D2Cache)  # what theirs lacks is ours
        parts["D2Cache"] = type("D2Cache", bases, stages)
    return parts


def watched(function):
    """The same function, but AssertionError if it writes into an argument, or returns no tensor."""

    @functools.wraps(function)
    def call(*arguments, **named):
        given = [*arguments, *named.values()]
        before = copy.deepcopy(given)
        returned = function(*arguments, **named)

        name = function.__name__
        for value in returned if isinstance(returned, tuple) else (returned,):
            kind = type(value).__name__
            assert torch.is_tensor(value), f"{name} returns a {kind}, should return a tensor"
        untouched = all(map(torch.equal, tensors_in(before), tensors_in(given)))
        assert untouched, f"{name} writes into an argument, should leave them alone"
        return returned

    return call


def tensors_in(values):
    """All tensors of a list, also those inside lists and states."""
    for value in values:
        if torch.is_tensor(value):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
        elif isinstance(value, d2cache.State):
            yield from tensors_in(vars(value).values())


# ---- A process for each law ----------------------------------------------------------------------


def in_a_process(work, file, seconds):
    """work(), plain data, done in a process of its own: (it, None), or (None, what happened)."""
    forks = multiprocessing.get_context("fork")
    ours, theirs = forks.Pipe(duplex=False)
    process = forks.Process(target=answer, args=(work, file, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return None, f"hangs: not done after {seconds:g} seconds"
        return tuple(json.loads(ours.recv_bytes()))
    except EOFError:
        process.join()
        return None, f"ends the process, with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def answer(work, file, pipe):
    try:
        answered = work(), None
    except BaseException as error:  # SystemExit and KeyboardInterrupt are answers, too
        answered = None, explained(error, file)
    pipe.send_bytes(json.dumps(answered).encode())


def explained(error, file):
    """What went wrong in a few lines: the message, the line of the file, and what was drawn."""
    if isinstance(error, NotImplementedError):
        return "not implemented yet"
    text = str(error)
    if not isinstance(error, AssertionError):
        text = f"{type(error).__name__}: {text}"
    for frame in traceback.extract_tb(error.__traceback__)[::-1]:
        if Path(frame.filename) == Path(file):
            text += f"\n{Path(file).name}, line {frame.lineno}: {frame.line}"
            break
    text = "\n".join([text, *getattr(error, "__notes__", [])])
    text = re.sub(" at 0x[0-9a-f]+", "", text)  # addresses are others in every run
    lines = [line[:200] for line in text.splitlines() if line.strip()]
    return "\n".join(lines[:20])


class Beginning(io.StringIO):
    """What is printed first: a loop that prints for ever fills no memory."""

    def write(self, text):
        if self.tell() < 1000:
            super().write(text[:1000])
        return len(text)


def judged(item):
    """Try a law on the submission, in the place of ours; what was printed meanwhile."""
    option, file = item.config.option, submitted(item.config)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(Beginning()) as printed:
        if option.policy:
            POLICIES[THEIRS] = st.just(d2cache.load_policy(option.policy))
            item.obj(name=THEIRS)
        elif item.originalname in TOGETHER["all together"]:
            item.obj(file)
        else:
            part, _ = item.config.stash[LAWS][item.originalname]
            theirs = load(file)
            vars(item.module).update(replacements(theirs, [part]))
            for name in POINTS.keys() & vars(theirs).keys() - STAGES:
                setattr(theirs, name, getattr(d2cache, name))  # whatever it calls is ours
            item.obj()
    return printed.getvalue().strip()


# ---- Hooks of pytest -----------------------------------------------------------------------------


def submitted(config):
    """The absolute path of the file to be graded."""
    option = config.option
    return str(Path(option.solution or option.policy.partition(".py:")[0] + ".py").resolve())


def pytest_ignore_collect(collection_path, config):
    judges = JUDGES["solution" if config.option.solution else "policy"]
    if collection_path.suffix == ".py" and collection_path.name not in judges:
        return True


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Keep the laws that judge the submission: in the table's order, or the contract first."""
    option, file = config.option, submitted(config)
    if option.solution:
        names, fault = in_a_process(lambda: list(parts_of(load(file))), file, option.limit)
        if names == []:
            fault = f"defines none of {', '.join(POINTS)}"
        judged_by = {name: POINTS[name] for name in names or POINTS} | TOGETHER
        laws = {law: (name, n) for name, each in judged_by.items() for law, n in each.items()}
        kept = [item for item in items if item.originalname in laws]
        kept.sort(key=lambda item: list(laws).index(item.originalname))
    else:
        work = lambda: d2cache.load_policy(option.policy) and None  # noqa: E731
        _, fault = in_a_process(work, file, option.limit)
        kept = [item for item in items if f"[{THEIRS}]" in item.nodeid]
        kept.sort(key=lambda item: "contract" not in item.originalname)
        laws = {item.originalname: ("contract", 1) for item in kept}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for key, value in ((LAWS, laws), (FAULT, fault), (ENTRIES, [])):
        config.stash[key] = value


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    """Try a law, tell pytest, and take down an entry of Gradescope's list of tests."""
    config, hook = item.config, item.ihook
    printed, fault = "", config.stash[FAULT]
    if fault is None:
        work = functools.partial(judged, item)
        printed, fault = in_a_process(work, submitted(config), config.option.limit)
    outcome = "passed" if fault is None else "failed"
    report = pytest.TestReport(item.nodeid, item.location, {}, outcome, fault, "call")
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)

    part, points = config.stash[LAWS][item.originalname]
    law = item.originalname.removeprefix("test_").replace("_", " ")
    entry = {"name": f"{part}: {law}", "score": points, "max_score": points, "output": ""}
    if printed:
        entry["output"] = f"prints {printed.splitlines()[0][:80]!r}"
    if fault is not None:
        entry |= {"score": 0, "output": fault}
    config.stash[ENTRIES].append(entry)
    return True


def pytest_terminal_summary(terminalreporter, config):
    entries = config.stash.get(ENTRIES, [])
    terminalreporter.section(f"points of {Path(submitted(config)).name}")
    for entry in entries:
        first_line = "".join(entry["output"].splitlines()[:1])
        terminalreporter.line("{score} of {max_score}  {name}  ".format(**entry) + first_line)
    earned, most = (sum(entry[key] for entry in entries) for key in ("score", "max_score"))
    terminalreporter.line(f"{earned} of {most} in all")
    if config.option.grade:
        Path(config.option.grade).write_text(json.dumps({"tests": entries}, indent=1))
