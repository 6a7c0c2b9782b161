"""What every test shares: two tiers, a quiet, small, offline environment, the shared data."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.tiers import ALL, DEFAULT, register_profiles

# Before anything imports torch, transformers or deepspeed; rank processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
_CACHE = tempfile.TemporaryDirectory(prefix="lobra-cache-")  # gone when the tests are
os.environ["XDG_CACHE_HOME"] = _CACHE.name

ROOT = Path(__file__).resolve().parent.parent
#: Modules whose tests share what takes seconds to make.
SHARING = (
    "tests/experiments/test_simulate.py",
    "tests/tasks/test_corpus.py",
    "tests/test_wheel.py",
    "tests/trainer/test_equality.py",
    "tests/trainer/test_faults.py",
    "tests/trainer/test_resume.py",
    "tests/trainer/test_variants.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all", action="store_true", help="run the long tests too, and draw more examples"
    )


def pytest_configure(config: pytest.Config) -> None:
    register_profiles()
    settings.load_profile(ALL if config.getoption("--all") else DEFAULT)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long tests to `--all`, and those that need a GPU to machines that have one."""
    if not config.getoption("--all"):
        long = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if not item.get_closest_marker("long")]
        if long:
            config.hook.pytest_deselected(items=long)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch  # seconds to import, and most of the tests do without

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Have one process run all tests of a module in which they share what is dear, and first."""
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return module if module in SHARING else nodeid

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """Search what all tests have imported for garbage no more: a tenth of their time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Let SIGINT reach the tests and what they start, however pytest was started.

    A shell without job control has its background jobs ignore it, and their children inherit that.
    """
    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture(scope="session", autouse=True)
def ranks_start_warm() -> Iterator[None]:
    """Have the server that ranks are forked from import all that a run does, whoever starts it.

    It imports once: one that began for a test of fewer modules would leave deepspeed, seconds of
    it, to every rank of every run that follows.
    """
    from lobra.model import launch

    plain = launch.start_server

    def start_server(preload: Sequence[str]) -> Any:
        from lobra.trainer.run import PRELOAD

        return plain(PRELOAD)

    launch.start_server = start_server
    yield
    launch.start_server = plain


@pytest.fixture(scope="session")
def project_root() -> Path:
    """Return the root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of shared data beside the checkout; skip the test where there is none."""
    folder = Path(os.environ.get("LOBRA_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder} (set LOBRA_SHARED to where it is)")
    return folder
