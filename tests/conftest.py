"""What every test stands on: markers by folder, one shared Ray for the tests that need it, none for the others."""

import importlib
import importlib.util
import os
import secrets
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from edit_ray import files
from jobs.demo import private_ray
from tests.faults import faulty

TESTS = Path(__file__).parent

# On a busy machine an example may take any time.
settings.register_profile("any time", deadline=None)
settings.load_profile("any time")

MARKERS_OF_FOLDER = {"ray": ("ray",), "chaos": ("ray", "chaos"), "gpu": ("gpu",)}

# A shell has what it starts in the background ignore SIGINT, and that is inherited: what tests interrupt would go on.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Ray reads these when it is imported or started, so they are set before any test module is.
os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray's own 15 is next to the niceness of the tests that `make test` runs beside: actors would start at half the speed.
os.environ.setdefault("RAY_worker_niceness", "10")
# Else every driver that joins has Ray start workers ahead of any use.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# Otherwise an actor without GPUs makes Ray warn about how it will set CUDA_VISIBLE_DEVICES one day.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


# First, because `-m` picks among the markers at the end of the same hook.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test after the folder that it lies in; those that need Ray come last, so that none finds it started.

    Of a test that is marked `one_in(k)` each k-th set of parameters is tried, and the others are `slow`.
    """
    seen: Counter[str] = Counter()
    for item in items:
        if (thinned := item.get_closest_marker("one_in")) and not item.get_closest_marker("slow"):
            of = item.nodeid.partition("[")[0]
            if seen[of] % thinned.args[0]:
                item.add_marker("slow")
            seen[of] += 1
        if item.path.is_relative_to(TESTS):
            folder = item.path.relative_to(TESTS).parts[0]
            for name in MARKERS_OF_FOLDER.get(folder, ()):
                item.add_marker(name)
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)


@pytest.fixture
def unsynced() -> Iterator[None]:
    """Nothing is synced: tests with hundreds of histories would otherwise wait for a busy disk."""
    with files.swapped(faulty(fsync=lambda fsync, descriptor: None)):
        yield


@pytest.fixture(autouse=True)
def _no_ray_unless_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test without the marker `ray` that starts Ray, be it by accident, fails with a sentence that says so."""
    if request.node.get_closest_marker("ray") or importlib.util.find_spec("ray") is None:
        return

    def refuse(*_args: object, **_kwargs: object) -> None:
        pytest.fail(f"{request.node.nodeid} starts Ray, but only tests marked `ray` may: move it to tests/ray")

    monkeypatch.setattr(importlib.import_module("ray"), "init", refuse)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within this process work that failed is tried again at once: no test waits for what a node's death takes."""
    if (stages := sys.modules.get("edit_ray.actors.stages")) is not None:
        monkeypatch.setattr(stages, "RETRY_PAUSE_S", 0.01)


@pytest.fixture(autouse=True)
def _disk_as_it_was() -> Iterator[None]:
    """A test may put another disk under all files; the next one finds the true one."""
    with files.swapped(files.disk):
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models as small as those of tests run fastest on one thread."""
    torch = importlib.import_module("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ray_head() -> Iterator[dict[str, str]]:
    """One Ray for the session, started as `make demo` starts its own: with job submission, behind a token.

    Yields the environment that reaches it; this process has joined it in namespace `edit_ray`.
    """
    # Ray's socket paths live under it and may have 107 characters at most, so pytest's own tmp_path is too long.
    with tempfile.TemporaryDirectory(prefix="er-", dir="/tmp") as temp, private_ray(Path(temp)) as environment:
        os.environ.update(environment)
        ray = importlib.import_module("ray")
        ray.init(address=environment["RAY_ADDRESS"], namespace="edit_ray", log_to_driver=False)
        try:
            yield environment
        finally:
            ray.shutdown()
