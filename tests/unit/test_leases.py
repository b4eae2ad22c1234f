"""A segment's store through the classes of the actors: over /dev/shm, and over memory in no folder."""

import contextlib
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from benchmarks.rolling_plan import rolling_plan
from edit_ray import files
from edit_ray.actors.cache_store import CacheStoreActor
from edit_ray.actors.messages import RunSpec, run_key
from edit_ray.cache import DiskOffloadStore
from edit_ray.config import Config
from edit_ray.errors import EntryLost, StaleLease
from edit_ray.tiers import leases as leases_module
from edit_ray.tiers.disk_tier import DiskTier
from edit_ray.tiers.leases import Reuse, SegmentLeases, reuse_statistics
from edit_ray.tiers.protocol import EntryForm
from edit_ray.tiers.reuse_plan import make_reuse_plan
from tests.store_here import StoreHere

EXPERT = "transformer"
RUN = f"{run_key('run', '')}.0"  # as the store knows it
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
WAYS = ("require", "never")
READS_OF_8 = {"run": 48, "rolling": 176}  # of eight segments, by the kind of plan


def leases_on(
    store,
    folder,
    way,
    dtype=torch.float32,
    shape=(1, 8, 24),
    host_bytes=2 * 4096,
    num_segments=4,
    kind="run",
    step_timeout_s=600.0,
    **more,
):
    """A run's leases: window 4, two units, of residuals of this dtype and shape."""
    form = EntryForm(torch.device("cpu"), dtype, shape)
    units = [form.size] * 2
    if kind == "run":
        of_units = {EXPERT: units}
        plan = make_reuse_plan(RUN, num_segments, window=4, warm_steps=2, experts=[EXPERT] * 4, unit_bytes=of_units)
    else:
        plan = rolling_plan(RUN, num_segments, window=4, warm_steps=2, unit_bytes=units)
    values = {
        "video": {"num_segments": num_segments},
        "prompt_segments": [{"segment": 0, "prompt": "a red circle"}],
        "store": {"host_bytes": host_bytes, "allow_tmpfs": True, "shared_memory": way, **more},
        "engine": {"step_timeout_s": step_timeout_s},
    }
    return SegmentLeases(store, RunSpec("run", folder, Config.model_validate(values)).reusing, Reuse(plan, form))


@pytest.fixture
def leases_for(tmp_path):
    """Makes a store and a run's leases on it."""
    stores = []

    def make(*arguments, **options):
        stores.append(StoreHere())
        return stores[-1], leases_on(stores[-1], tmp_path, *arguments, **options)

    yield make
    for store in stores:
        store.close()


def tensor_of(key, form):
    drawn = torch.randn(form.shape, generator=torch.Generator().manual_seed(hash(key) & 0xFFFF)) * 60
    return drawn.to(form.dtype)


def make_ops(store, form, of=lambda op: True):
    """The reads and writes of a loop; how many it has read."""
    read = 0
    for op in filter(of, store.ops):
        tensor = tensor_of(op.key, form)
        if op.writes:
            store.put(op.key[1:], tensor)
        else:
            found = store.get(op.key[1:])
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found, tensor)
            read += 1
    return read


def make_segment(leases, segment, attempt=0):
    """What a loop does; how much it has read."""
    store = leases.begin(segment, attempt, history_len=1)
    read = make_ops(store, leases.reuse.form)
    store.finish()
    return read, leases.complete(segment, attempt)


def read_all(store):
    return [store.get(op.key[1:]) for op in store.ops if not op.writes]


@pytest.mark.parametrize("shape", [(1, 8, 24), (1, 1025, 3), (1, 0, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_every_dtype_comes_back_bit_for_bit(leases_for, way, dtype, shape):
    _, leases = leases_for(way, dtype, shape, host_bytes=8 * 4096)
    read = sum(make_segment(leases, segment)[0] for segment in range(4))
    assert read == 3 * 8
    leases.close()


@pytest.mark.parametrize("way", WAYS)
def test_what_lies_in_memory_in_another_order_comes_back_as_it_was(leases_for, way):
    _, leases = leases_for(way, shape=(1, 24, 8))
    store = leases.begin(0, 0, history_len=1)
    key = next(op.key for op in store.ops if op.writes)
    turned = torch.randn(1, 8, 24).transpose(1, 2)
    assert not turned.is_contiguous()
    for op in store.ops:
        store.put(op.key[1:], turned if op.key == key else tensor_of(op.key, op.form))
    store.finish()
    leases.complete(0, 0)
    assert torch.equal(leases.begin(1, 0, history_len=1).get(key[1:]), turned)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("other", [{"shape": (1, 24, 8)}, {"dtype": torch.int32}], ids=str)
def test_what_is_there_of_another_form_is_lost(leases_for, tmp_path, way, other):
    """As many bytes under the same key: of a tensor of another shape or type."""
    store, leases = leases_for(way)
    make_segment(leases, 0)
    leases.close()
    others = leases_on(store, tmp_path, way, **other)
    with pytest.raises(EntryLost):
        read_all(others.begin(1, 0, history_len=1))
    assert others.lost(1, attempt=1) == [0]
    others.close()


@pytest.mark.parametrize("way", WAYS)
def test_between_prepare_and_complete_nobody_is_called(leases_for, way):
    store, leases = leases_for(way)
    for segment in range(4):
        make_segment(leases, segment)
    first = ["follow", "prepare", "prepare", "complete"]
    assert store.asked == [*first, "prepare", "complete", "prepare", "complete", "complete"]
    assert bool(list(Path("/dev/shm").glob(f"edit_ray-{os.getpid()}-*"))) == (way == "require")


@pytest.mark.parametrize("way", WAYS)
def test_ops_that_are_passed_over_make_room(leases_for, way):
    _, leases = leases_for(way)
    make_segment(leases, 0)
    store = leases.begin(1, 0, history_len=1)
    last = [op for op in store.ops if not op.writes][-1]
    assert torch.equal(store.get(last.key[1:]), tensor_of(last.key, last.form))
    store.finish()
    statistics = leases.complete(1, 0)
    assert statistics["bytes"]["host"] <= 2 * 4096


@pytest.mark.parametrize("way", WAYS)
def test_a_store_that_is_made_anew_is_told_of_the_run_and_refuses_what_came_before(leases_for, way):
    store, leases = leases_for(way)
    make_segment(leases, 0)
    open_segment = leases.begin(1, 0, history_len=1)
    store.kill()
    with pytest.raises((StaleLease, EntryLost)):
        read_all(open_segment)
    with pytest.raises(StaleLease):
        leases.complete(1, 0)
    assert make_segment(leases, 1, attempt=1)[0] == 8
    assert make_segment(leases, 2)[0] == 8


def test_a_lease_of_a_store_that_has_died_is_not_used(leases_for):
    for way in WAYS:
        store, leases = leases_for(way)
        make_segment(leases, 0)
        store.kill()
        assert make_segment(leases, 1)[0] == 8, "the lease was asked for before the store died"


@pytest.mark.parametrize("way", WAYS)
def test_a_lost_entry_is_said(leases_for, way, tmp_path):
    _, leases = leases_for(way, host_bytes=4096)
    make_segment(leases, 0)
    for file in (tmp_path / ".cache_store").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(EntryLost, match="has lost"):
        make_segment(leases, 1)


class Stalled(files.Disk):
    """Reads nothing until it is told to."""

    def __init__(self):
        self.answers = threading.Event()

    def read(self, descriptor, parts, offset):
        assert self.answers.wait(60), "the test is over"
        return super().read(descriptor, parts, offset)


@pytest.mark.parametrize("way", WAYS)
def test_a_disk_has_the_time_of_a_step_to_answer(leases_for, way):
    _, leases = leases_for(way, host_bytes=4096, step_timeout_s=0.5)
    make_segment(leases, 0)
    stalled, began = Stalled(), time.monotonic()
    with files.swapped(stalled):
        with pytest.raises(EntryLost):
            make_segment(leases, 1)
        assert 0.5 < time.monotonic() - began < 5
        stalled.answers.set()
        assert make_segment(leases, 1, attempt=1)[0] == 8


def with_failed_tiers(leases_for, monkeypatch, folder):
    """A store whose thread has failed while segment 0 was made."""
    store, leases = leases_for("require")
    opened = leases.begin(0, 0, history_len=1)
    make_ops(opened, leases.reuse.form, lambda op: op != opened.ops[-1])
    while len(list(folder.rglob("*.safetensors"))) < len(opened.ops) - 1:
        opened.poll()
        time.sleep(0.01)
    with monkeypatch.context() as broken:
        broken.setattr(DiskTier, "write", lambda *_: 1 / 0)
        make_ops(opened, leases.reuse.form, lambda op: op == opened.ops[-1])
        opened.finish()
        time.sleep(0.3)  # some hundred looks at the table
    with pytest.raises(StaleLease):
        leases.complete(0, 0)
    return store, leases


def test_tiers_that_have_failed_are_made_anew(leases_for, monkeypatch, tmp_path):
    store, leases = with_failed_tiers(leases_for, monkeypatch, tmp_path)
    store.actor.metrics()
    make_segment(leases, 0, attempt=1)
    assert make_segment(leases, 1)[0] == 8


def test_a_run_is_dropped_where_the_tiers_have_failed(leases_for, tmp_path, monkeypatch):
    store, _ = with_failed_tiers(leases_for, monkeypatch, tmp_path)
    assert list((tmp_path / ".cache_store").glob("*.safetensors"))
    store.actor.drop_run(RUN, tmp_path / ".cache_store")
    assert not list((tmp_path / ".cache_store").glob("*.safetensors"))
    assert not list(Path("/dev/shm").glob(f"edit_ray-{os.getpid()}-*"))


def many_segments(leases, number):
    """Segments whose loop goes on after their reads and writes: in that time the next one's are brought. How much they
    have read.
    """
    read = 0
    for segment in range(number):
        store = leases.begin(segment, 0, history_len=1)
        read += make_ops(store, leases.reuse.form)
        for step in range(10, 30):
            store.put((segment, EXPERT, "cond", 0, step), torch.zeros(1))
        store.finish()
        leases.complete(segment, 0)
    return read


def assert_all_places_are_free(leases):
    """Of the memory that the run has taken on the device, once nothing is under way."""
    leases.give_up()
    assert leases._pool.free == leases._pool.number


@pytest.mark.parametrize("kind", ["run", "rolling"])
@pytest.mark.parametrize("ahead", [1, 3, 100])
@pytest.mark.parametrize("host", [1, 3, 100])
def test_reads_of_the_next_segment_loaded_while_this_one_is_made_are_right(tmp_path, host, ahead, kind):
    """As on a GPU, where copies are made beside the computation; here each is over at once."""
    store = StoreHere()
    leases = leases_on(store, tmp_path, "require", host_bytes=host * 4096, num_segments=8, kind=kind)
    leases.ahead_bytes = ahead * leases.reuse.form.size
    assert many_segments(leases, 8) == READS_OF_8[kind]
    assert leases._pool.number == min(ahead, max(len(segment.reads) for segment in leases.reuse.plan.segments))
    assert_all_places_are_free(leases)
    leases.close()
    store.close()


@pytest.mark.parametrize("worker", [0, 1])
def test_a_store_that_was_not_told_of_a_run_removes_what_an_earlier_one_has_left_of_it(tmp_path, worker, monkeypatch):
    """As where everything died when all segments were made, and only the end is left to be told."""
    monkeypatch.setenv("NVME", str(tmp_path))
    store = StoreHere(worker)
    leases = leases_on(store, tmp_path, "require")
    make_segment(leases, 0)
    leases._arena.close()
    store.kill()
    directory = tmp_path / ".cache_store"
    assert len(list(directory.rglob("*.safetensors"))) == 8
    store.call("drop_run", "another", directory)()
    assert len(list(directory.rglob("*.safetensors"))) == 8
    store.call("drop_run", RUN, Path("$NVME/.cache_store"))()
    assert list(directory.rglob("*.safetensors")) == []
    store.call("drop_run", RUN, tmp_path / "nowhere")()
    store.close()


def test_stores_of_several_gpu_actors_keep_out_of_each_other_s_folders(tmp_path):
    """The second one finds nothing of the first's when it starts, and removes nothing that the first is writing."""
    directory, stores = tmp_path / ".cache_store", [StoreHere(worker) for worker in range(2)]
    first, second = (leases_on(store, tmp_path, "require") for store in stores)
    make_segment(first, 0)
    draft = directory / ("0" * 32 + "-1.unfinished")
    draft.touch()
    make_segment(second, 0)
    assert draft.exists()
    assert len(list(directory.glob("*.safetensors"))) == len(list((directory / "worker-1").glob("*.safetensors"))) == 8
    assert make_segment(first, 1)[0] == make_segment(second, 1)[0] == 8
    for leases, store in zip((first, second), stores, strict=True):
        leases.close()
        store.close()


@pytest.mark.parametrize("kind", ["run", "rolling"])
def test_with_room_for_all_nothing_is_waited_for_or_read_at_the_segment_s_start(tmp_path, kind):
    store = StoreHere()
    leases = leases_on(store, tmp_path, "require", host_bytes=100 * 4096, num_segments=6, kind=kind)
    leases.ahead_bytes = 100 * leases.reuse.form.size
    for segment in range(6):
        planned = leases.begin(segment, 0, history_len=1)
        assert len(planned._loaded) == sum(not op.writes for op in planned.ops), "all is on the device"
        make_ops(planned, leases.reuse.form)
        assert planned.waits.calls == 0 or any(op.writes for op in planned.ops)
        deadline = time.monotonic() + 10
        while segment < 5 and (leases._next is None or leases._next.store._to_load):
            planned.put((segment, EXPERT, "cond", 0, 99), torch.zeros(1))
            assert time.monotonic() < deadline
        planned.finish()
        leases.complete(segment, 0)
    leases.close()
    store.close()


def test_what_was_just_written_is_read_from_memory_where_device_and_host_together_hold_it(tmp_path):
    store = StoreHere()
    leases = leases_on(store, tmp_path, "require", host_bytes=6 * 4096)
    leases.ahead_bytes = 6 * leases.reuse.form.size
    make_segment(leases, 0)
    planned = leases.begin(1, 0, history_len=1)
    assert make_ops(planned, leases.reuse.form) == 8
    assert planned.waits.calls == 0
    planned.finish()
    assert leases.complete(1, 0)["counts"]["prefetches", "late"] == 0
    leases.close()
    store.close()


def test_a_segment_made_again_reads_what_was_loaded_ahead_for_the_next(tmp_path):
    store = StoreHere()
    leases = leases_on(store, tmp_path, "require", host_bytes=3 * 4096, num_segments=4)
    leases.ahead_bytes = 8 * leases.reuse.form.size
    make_segment(leases, 0)
    planned = leases.begin(1, 0, history_len=1)
    make_ops(planned, leases.reuse.form)
    for _ in range(50):
        planned.put((1, EXPERT, "cond", 0, 99), torch.zeros(1))
        time.sleep(0.001)
    assert leases._next is not None, "the next one's reads are under way, and this one fails"
    assert make_segment(leases, 1, attempt=1)[0] == 8
    assert make_segment(leases, 2)[0] == 8
    assert make_segment(leases, 3)[0] == 8
    assert_all_places_are_free(leases)
    leases.close()
    store.close()


def test_where_the_device_is_short_of_memory_what_is_ahead_leaves_it_for_good(tmp_path):
    store = StoreHere()
    leases = leases_on(store, tmp_path, "require", host_bytes=100 * 4096, num_segments=8, kind="rolling")
    leases.ahead_bytes = 4 * leases.reuse.form.size
    read = many_segments(leases, 3)
    pool = leases._pool
    failed = leases.begin(3, 0, history_len=1)
    make_ops(failed, leases.reuse.form)
    assert pool.free < pool.number, "something is handed over"
    leases.free_device()
    assert pool.free == pool.number
    gone = weakref.ref(pool)
    del pool
    assert gone() is None, "the failed segment's store is still there, and keeps none of its memory"
    read += make_segment(leases, 3, attempt=1)[0]
    read += sum(make_segment(leases, segment)[0] for segment in range(4, 8))
    assert (read, leases._pool) == (READS_OF_8["rolling"], None)
    leases.close()
    store.close()


def test_where_the_device_has_no_memory_for_it_nothing_comes_ahead(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(leases_module, "DevicePool", full)
    store = StoreHere()
    leases = leases_on(store, tmp_path, "require", num_segments=8)
    leases.ahead_bytes = 4 * leases.reuse.form.size
    assert many_segments(leases, 8) == READS_OF_8["run"]
    assert caplog.text.count("The GPU lacks the 3072 bytes of store.device_bytes") == 1
    leases.close()
    store.close()


def test_disk_bytes_bounds_what_is_on_disk_and_all_figures_agree(leases_for, tmp_path):
    """With host memory to spare as well: whatever is there is in a file, too."""
    _, leases = leases_for("require", host_bytes=16 * 4096, disk_bytes=4 * 4096)
    planned = leases.begin(0, 0, history_len=1)
    make_ops(planned, leases.reuse.form)
    planned.finish()
    tiers = leases.complete(0, 0)
    assert len(list((tmp_path / ".cache_store").glob("*.safetensors"))) == 4
    assert reuse_statistics(planned, tiers)["disk_bytes"] == tiers["bytes"]["disk"] == 4 * 4096
    leases.close()


def test_the_end_of_the_last_run_takes_the_memory_of_a_store_that_was_killed(tmp_path):
    code = "from edit_ray.tiers.arena import Arena; a = Arena.create(8192); print(a.path, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as killed:
        left = Path(killed.stdout.readline().strip())
        assert left.exists()  # once it is dead, a store of other tests on this machine may remove it as well
        killed.kill()
    CacheStoreActor().drop_run(RUN)
    assert not left.exists()


@pytest.mark.parametrize("folder", ["", "worker-1", "worker-1/other-1"])
def test_the_end_of_a_run_removes_what_it_has_left_beside_another_actor(tmp_path, folder):
    left = tmp_path / folder
    with contextlib.closing(DiskOffloadStore(left, allow_tmpfs=True)) as store:
        for run in (RUN, "another"):
            store.put((run, 0), torch.ones(3))
    CacheStoreActor(2).drop_run(RUN, tmp_path)
    with contextlib.closing(DiskOffloadStore(left, allow_tmpfs=True)) as store:
        assert (store.get((RUN, 0)), store.get(("another", 0)) is None) == (None, False)
