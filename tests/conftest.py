"""Settings for all tests: import path, one torch thread, hypothesis profiles, the gpu marker.

--solution FILE.py and --policy FILE.py:Name grade a file instead: see tests/course/grading.py.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOMS = [folder for folder in sorted(HERE.iterdir()) if folder.is_dir()]
sys.path[:0] = [str(folder) for folder in (HERE.parent, HERE, *ROOMS)]

import model  # noqa: E402, F401  (first: it quiets torch's import)
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, Phase, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import grading  # noqa: E402
from strategies import POLICIES  # noqa: E402

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that a test starts

settings.register_profile("dev", max_examples=25, deadline=None, print_blob=True)
settings.register_profile("ci", max_examples=60, deadline=None, print_blob=True, derandomize=True)
settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)
# The same submission gets the same verdict, and soon: no clock counts, nothing is explained.
settings.register_profile(
    "grading",
    max_examples=60,
    deadline=None,
    derandomize=True,
    print_blob=False,
    report_multiple_bugs=False,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def pytest_addoption(parser):
    parser.addoption("--solution", help="grade the functions that this file defines")
    parser.addoption("--policy", help="grade this policy: FILE.py:Name(k=8)")
    parser.addoption("--grade", help="write the points there, as Gradescope's results.json")
    parser.addoption("--limit", default=120.0, type=float, help="seconds for each law (120)")


def pytest_configure(config):
    if config.args[:1] == ["tests"]:  # by .pytest.ini, whatever the folder
        config.args = config.args[1:] or [str(HERE)]
    option = config.option
    if option.solution is None and option.policy is None:
        return
    if option.solution and option.policy:
        raise pytest.UsageError("grade a --solution or a --policy, not both at once")
    if option.policy and ".py:" not in option.policy:
        raise pytest.UsageError(f"policy is {option.policy!r}, should be FILE.py:Name")
    if option.solution and not option.solution.endswith(".py"):
        raise pytest.UsageError(f"solution is {option.solution!r}, should be FILE.py")
    if option.grade and not Path(option.grade).resolve().parent.is_dir():
        raise pytest.UsageError(f"grade is {option.grade!r}, should be a file in a folder")
    if not hasattr(os, "fork"):
        raise pytest.UsageError("grading needs Linux or macOS: a law is a process forked off")
    settings.load_profile("grading")
    POLICIES.clear()
    POLICIES[grading.THEIRS] = st.nothing()  # until it is loaded, in the process of a law
    option.reportchars = ""
    config.pluginmanager.register(grading)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
