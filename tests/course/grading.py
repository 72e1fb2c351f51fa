"""Grades a file: the laws run one by one, each in a process of its own, and earn points.

`python -m pytest --solution FILE.py` puts the functions that FILE defines in the place of ours, one
in each law: all others are the reference's. `--policy FILE.py:Name(k=8)` puts a policy through the
laws of the contract, a point each. `--grade results.json` writes the points as Gradescope reads
them. tests/conftest.py registers this module as a plugin of pytest.

The file is executed. Processes and time limits keep accidents apart, not malice: a course that
grades what others wrote runs this in its own sandbox.
"""

import copy
import functools
import importlib.util
import json
import multiprocessing
import re
import sys
import traceback
from pathlib import Path

import d2cache
import pytest
import torch
from _pytest.runner import runtestprotocol
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
    "about_to_be_decoded": {
        "test_stage_1_is_the_masked_positions_of_highest_prior_those_of_the_block_first": 3
    },
    "attended": {"test_stage_2_is_the_nucleus_of_influence_among_the_known": 2},
    "all together": {"test_the_embedded_model_decodes_the_same_words": 2},
}
JUDGES = {  # the files of the laws
    "solution": ("test_equations.py", "test_course.py"),
    "policy": ("test_decoding.py", "test_graphs.py"),
}
STAGES = ("about_to_be_decoded", "attended")  # methods of a class D2Cache

# The examples that hypothesis draws hang on a test's name, so it is the same for every submission.
THEIRS = "theirs"
FAULT = pytest.StashKey()  # what is wrong with the whole file, if anything is
VERDICTS = pytest.StashKey()  # entries of Gradescope's list of tests


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
    their_class = getattr(theirs, "D2Cache", d2cache.D2Cache)
    stages = {} if their_class is d2cache.D2Cache else vars(their_class)
    found = {}
    for name in POINTS:
        part = stages.get(name) if name in STAGES else getattr(theirs, name, None)
        if callable(part) and part is not getattr(d2cache, name, None):
            found[name] = watched(part)
    return found


def replacements(theirs, names):
    """What takes the place of ours: {name in a module: function, or D2Cache with their stages}."""
    parts = {name: part for name, part in parts_of(theirs).items() if name in names}
    stages = {name: parts.pop(name) for name in STAGES if name in parts}
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

        for value in returned if isinstance(returned, tuple) else (returned,):
            kind = f"{function.__name__} returns a {type(value).__name__}, should return a tensor"
            assert torch.is_tensor(value), kind
        same = map(torch.equal, tensors_in(before), tensors_in(given))
        assert all(same), f"{function.__name__} writes into an argument, should leave them alone"
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
            return None, f"hangs: not done after {seconds} seconds"
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
    message = str(error)
    if isinstance(error, NotImplementedError):
        return "not implemented yet"
    if not isinstance(error, AssertionError):
        message = f"{type(error).__name__}: {message}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename) == Path(file):
            message += f"\n{Path(file).name}, line {frame.lineno}: {frame.line}"
            break
    text = "\n".join([message, *getattr(error, "__notes__", [])])
    lines = re.sub(" at 0x[0-9a-f]+", "", text).splitlines()  # the same in every run
    lines = [line if len(line) <= 200 else line[:197] + "..." for line in lines if line.strip()]
    return "\n".join(lines[:20])


# ---- Hooks of pytest -----------------------------------------------------------------------------


def submitted(config):
    """The absolute path of the file to be graded."""
    option = config.option
    file = option.solution or option.policy.partition(".py:")[0] + ".py"
    return str(Path(file).resolve())


def pytest_ignore_collect(collection_path, config):
    judges = JUDGES["solution" if config.option.solution else "policy"]
    if collection_path.suffix == ".py" and collection_path.name not in judges:
        return True


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Keep the laws that judge the submission, in the order of the table or the contract first."""
    file, seconds = submitted(config), config.option.limit
    if config.option.solution:
        names, fault = in_a_process(lambda: list(parts_of(load(file))), file, seconds)
        if names == []:
            fault = f"defines none of {', '.join(list(POINTS)[:-1])}"
        names = [*(names or POINTS), "all together"]
        laws = {
            law: (name, n) for name in POINTS if name in names for law, n in POINTS[name].items()
        }
        kept = [item for item in items if item.originalname in laws]
        kept.sort(key=lambda item: list(laws).index(item.originalname))
    else:
        load_policy = lambda: d2cache.load_policy(config.option.policy) and None  # noqa: E731
        _, fault = in_a_process(load_policy, file, seconds)
        kept = [item for item in items if f"[{THEIRS}]" in item.nodeid]
        laws = {item.originalname: ("contract", 1) for item in kept}
        kept.sort(key=lambda item: "contract" not in item.originalname)
    for item in kept:
        item.user_properties += zip(("part", "points"), laws[item.originalname])
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    config.stash[FAULT] = fault
    config.stash[VERDICTS] = []


def judged(item):
    """The reports of a law, as plain data, with the submission in the place of ours."""
    config = item.config
    torch.manual_seed(0)
    if config.option.solution:
        names = [dict(item.user_properties)["part"]]
        for name, part in replacements(load(submitted(config)), names).items():
            setattr(item.module, name, part)
    else:
        POLICIES[THEIRS] = st.just(d2cache.load_policy(config.option.policy))
    reports = runtestprotocol(item, log=False, nextitem=None)
    to_data = config.hook.pytest_report_to_serializable
    return [to_data(config=config, report=report) for report in reports]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    config, hook = item.config, item.ihook
    reports, fault = [], config.stash[FAULT]
    if fault is None:
        work = functools.partial(judged, item)
        data, fault = in_a_process(work, submitted(config), config.option.limit)
        of_data = config.hook.pytest_report_from_serializable
        reports = [of_data(config=config, data=report) for report in data or []]
    if fault is not None:
        reports = [pytest.TestReport(item.nodeid, item.location, {}, "failed", fault, "call")]

    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in reports:
        hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    config.stash[VERDICTS].append(verdict(item, reports))
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.excinfo is not None:
        report.longrepr = explained(call.excinfo.value, submitted(item.config))
    return report


def verdict(item, reports):
    """What a law earns, as an entry of Gradescope's list of tests."""
    properties = dict(item.user_properties)
    law = item.originalname.removeprefix("test_").replace("_", " ")
    output = "".join(str(report.longrepr or "") for report in reports)
    passed = all(report.passed for report in reports)
    printed = "".join(report.capstdout for report in reports).strip()
    if passed and printed:
        output = f"prints {printed.splitlines()[0][:80]!r}"
    return {
        "name": f"{properties['part']}: {law}",
        "score": properties["points"] if passed else 0,
        "max_score": properties["points"],
        "output": output,
    }


def pytest_terminal_summary(terminalreporter, config):
    verdicts = config.stash.get(VERDICTS, [])
    terminalreporter.section(f"points of {Path(submitted(config)).name}")
    for entry in verdicts:
        line = "{score} of {max_score}  {name}".format(**entry)
        if entry["output"]:
            line += "  - " + entry["output"].splitlines()[0]
        terminalreporter.line(line)
    earned, most = (sum(entry[key] for entry in verdicts) for key in ("score", "max_score"))
    terminalreporter.line(f"{earned} of {most} in all")
    if config.option.grade:
        Path(config.option.grade).write_text(json.dumps({"tests": verdicts}, indent=1))
