"""Settings for all tests: import path, one torch thread, hypothesis profiles, the gpu marker.

--policy FILE.py:Name puts a policy of one's own through the laws of a policy, and runs no others.
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
from d2cache import load_policy  # noqa: E402
from hypothesis import Phase, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from strategies import POLICIES  # noqa: E402

# The examples that hypothesis draws hang on a test's name, so it is the same for every submission.
THEIRS = "theirs"

torch.set_num_threads(1)

settings.register_profile("dev", max_examples=25, deadline=None, print_blob=True)
settings.register_profile("ci", max_examples=60, deadline=None, print_blob=True, derandomize=True)
settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)
# The same submission gets the same verdict, and soon: without an explanation of the example.
phases = (Phase.explicit, Phase.generate, Phase.shrink)
settings.register_profile(
    "grading", max_examples=60, deadline=None, derandomize=True, phases=phases
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def pytest_addoption(parser):
    parser.addoption("--policy", help="try the laws on this policy alone: FILE.py:Name(k=8)")


def pytest_configure(config):
    text = config.getoption("--policy")
    if text is None:
        return

    try:
        policy = load_policy(text)
    except ValueError as error:
        raise pytest.UsageError(" ".join(str(error).split())) from error
    POLICIES.clear()
    POLICIES[THEIRS] = st.just(policy)
    settings.load_profile("grading")
    config.option.maxfail = config.option.maxfail or 1  # one broken law breaks others
    if config.option.tbstyle == "auto":
        config.option.tbstyle = "line"


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))

    text = config.getoption("--policy")
    if text is not None:
        laws = [item for item in items if policy_of(item) == THEIRS]
        others = [item for item in items if policy_of(item) != THEIRS]
        laws.sort(key=order_of_grading)
        config.hook.pytest_deselected(items=others)
        items[:] = laws


def policy_of(item):
    """The name of the policy that a law is tried on; None: the test is no law of policies."""
    return item.callspec.params.get("name") if hasattr(item, "callspec") else None


def order_of_grading(law):
    """The contract first; the comparison with the oracle, which sees most and says least, last."""
    return "contract" not in law.originalname, "oracle" in law.originalname
