"""Fixtures for all tests: the shared reference data where it is there, one thread, no network."""

import gc
import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may need a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as behind `&` in a script: tests send it, and hand it on
    signal.signal(signal.SIGINT, signal.default_int_handler)


def shared_folder() -> Path:
    """Where the reference data would be: `$PHI3V_SHARED`, else `shared` beside the checkout."""
    return Path(os.environ.get("PHI3V_SHARED") or Path(__file__).resolve().parents[2] / "shared")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared reference data (`phi3v/hub`: Microsoft's small files, `phi3v/golden`: all vectors); skips without."""
    folder = shared_folder()
    if not (folder / "phi3v").is_dir():
        pytest.skip(f"needs the reference data, and there is no {folder / 'phi3v'} (PHI3V_SHARED names its parent)")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """The frozen subset of the golden vectors, always there."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` prepares goes into a folder of the test run."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def pytest_configure(config: pytest.Config) -> None:
    """Declares the marker of tests that `make test` leaves out."""
    config.addinivalue_line("markers", "slow: takes long; run by `make test-slow`")


def pytest_collection_finish() -> None:
    """Takes what is there when tests begin, modules and the tests themselves, out of every collection of garbage.

    A training collects garbage twice, and walking all objects of the libraries took a fifth of its time here.
    """
    gc.collect()
    gc.freeze()
