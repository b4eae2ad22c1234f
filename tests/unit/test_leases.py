"""A segment's store through the classes of the actors: over /dev/shm, and over memory in no folder."""

import contextlib
import os
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
from edit_ray.config import Config
from edit_ray.errors import EntryLost, StaleLease, StoreDied
from edit_ray.tiers import leases as leases_module
from edit_ray.tiers.disk_tier import DiskTier
from edit_ray.tiers.leases import Reuse, SegmentLeases, reuse_statistics
from edit_ray.tiers.protocol import EntryForm
from edit_ray.tiers.reuse_plan import make_reuse_plan
from tests.store_here import StoreHere
from tests.unit.entry_folder import on_disk

EXPERT = "transformer"
RUN = f"{run_key('run', '')}.0"  # as the store knows it
WAYS = ("require", "never")
READS_OF_8 = {"run": 48, "rolling": 176}  # of eight segments, by the kind of plan
FORMS = [(torch.bfloat16, (1, 1025, 3)), (torch.bool, (1, 8, 24)), (torch.float64, (1, 0, 8))]


def leases_on(
    store,
    folder,
    way="require",
    dtype=torch.float32,
    shape=(1, 8, 24),
    host=2,
    num_segments=4,
    kind="run",
    ahead=0,
    step_timeout_s=600.0,
    **more,
):
    """A run's leases: window 4, two units, `host` pages of host memory, `ahead` entries on the device."""
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
        "store": {"host_bytes": host * 4096, "allow_tmpfs": True, "shared_memory": way, **more},
        "engine": {"step_timeout_s": step_timeout_s},
    }
    leases = SegmentLeases(store, RunSpec("run", folder, Config.model_validate(values)).reusing, Reuse(plan, form))
    leases.ahead_bytes = ahead * form.size  # as on a GPU, where copies run beside the computation; here at once
    return leases


@pytest.fixture
def leases_for(tmp_path):
    """Makes a store and a run's leases on it."""
    stores, made = [], []

    def make(*arguments, **options):
        stores.append(StoreHere())
        made.append(leases_on(stores[-1], tmp_path, *arguments, **options))
        return stores[-1], made[-1]

    yield make
    for leases in made:
        leases.close()
    for store in stores:
        store.close()


def tensor_of(key, form):
    drawn = torch.randn(form.shape, generator=torch.Generator().manual_seed(hash(key) & 0xFFFF)) * 60
    return drawn.to(form.dtype)


def make_ops(store, form, of=lambda op: True, before=lambda op: None):
    """The reads and writes of a loop; the number of its reads."""
    read = 0
    for op in filter(of, store.ops):
        before(op)
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
    """A whole segment; the number of its reads, and the store's statistics."""
    store = leases.begin(segment, attempt, history_len=1)
    read = make_ops(store, leases.reuse.form)
    store.finish()
    return read, leases.complete(segment, attempt)


def read_all(store):
    return [store.get(op.key[1:]) for op in store.ops if not op.writes]


def files_of(folder):
    return list((folder / ".cache_store").rglob("*.safetensors"))


@pytest.mark.parametrize(("dtype", "shape"), FORMS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_between_prepare_and_complete_the_store_is_not_called_and_entries_come_back_bit_for_bit(
    leases_for, way, dtype, shape
):
    store, leases = leases_for(way, dtype, shape, host=4)
    read = sum(make_segment(leases, segment)[0] for segment in range(4))
    assert read == 3 * 8
    first = ["follow", "prepare", "prepare", "complete"]
    assert store.asked == [*first, "prepare", "complete", "prepare", "complete", "complete"]
    assert bool(list(Path("/dev/shm").glob(f"edit_ray-{os.getpid()}-*"))) == (way == "require")


def test_a_tensor_that_is_not_contiguous_comes_back_as_it_was(leases_for):
    _, leases = leases_for(shape=(1, 24, 8))
    store = leases.begin(0, 0, history_len=1)
    key = next(op.key for op in store.ops if op.writes)
    turned = torch.randn(1, 8, 24).transpose(1, 2)
    for op in store.ops:
        store.put(op.key[1:], turned if op.key == key else tensor_of(op.key, op.form))
    store.finish()
    leases.complete(0, 0)
    assert torch.equal(leases.begin(1, 0, history_len=1).get(key[1:]), turned)


@pytest.mark.parametrize("other", [{"shape": (1, 24, 8)}, {"dtype": torch.int32}], ids=str)
def test_an_entry_of_another_form_is_lost(leases_for, tmp_path, other):
    """As many bytes under the same key: of a tensor of another shape or type."""
    store, leases = leases_for()
    make_segment(leases, 0)
    leases.close()
    others = leases_on(store, tmp_path, **other)
    with pytest.raises(EntryLost):
        read_all(others.begin(1, 0, history_len=1))
    assert others.lost(1, attempt=1) == [0]
    others.close()


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


@pytest.mark.parametrize("way", WAYS)
def test_a_lease_of_a_store_that_has_died_is_not_used(leases_for, way):
    store, leases = leases_for(way)
    make_segment(leases, 0)
    store.kill()
    assert make_segment(leases, 1)[0] == 8, "the lease was asked for before the store died"


def test_a_store_that_dies_with_its_entries_once_it_was_asked_what_is_lost_has_died(leases_for, tmp_path):
    store, leases = leases_for()
    make_segment(leases, 0)
    assert leases.lost(1, attempt=1) == []
    store.kill()
    for file in files_of(tmp_path):
        file.unlink()
    with pytest.raises(StoreDied, match="with entries that segment 1 reads"):
        leases.begin(1, 0, history_len=1)
    assert leases.lost(1, attempt=1) == [0]


class Stalled(files.Disk):
    """Reads nothing until it is told to."""

    def __init__(self):
        self.answers = threading.Event()

    def read(self, descriptor, parts, offset):
        assert self.answers.wait(60), "the test is over"
        return super().read(descriptor, parts, offset)


def test_a_disk_may_take_as_long_as_a_step_and_a_lost_entry_raises(leases_for, tmp_path):
    _, leases = leases_for(host=1, step_timeout_s=0.3)
    make_segment(leases, 0)
    stalled, began = Stalled(), time.monotonic()
    with files.swapped(stalled):
        with pytest.raises(EntryLost):
            make_segment(leases, 1)
        assert 0.3 < time.monotonic() - began < 5
        stalled.answers.set()
        assert make_segment(leases, 1, attempt=1)[0] == 8
    for file in files_of(tmp_path):
        file.unlink()
    with pytest.raises(EntryLost, match="has lost"):
        make_segment(leases, 2)


def with_failed_tiers(leases_for, monkeypatch, folder):
    """A store whose thread has failed while segment 0 was made."""
    store, leases = leases_for()
    opened = leases.begin(0, 0, history_len=1)
    make_ops(opened, leases.reuse.form, lambda op: op != opened.ops[-1])
    while len(files_of(folder)) < len(opened.ops) - 1:
        opened.poll()
        time.sleep(0.01)
    with monkeypatch.context() as broken:
        broken.setattr(DiskTier, "write", lambda *_: 1 / 0)
        make_ops(opened, leases.reuse.form, lambda op: op == opened.ops[-1])
        opened.finish()
        time.sleep(0.1)  # some hundred polls of the table
    with pytest.raises(StaleLease):
        leases.complete(0, 0)
    return store, leases


def test_tiers_that_have_failed_are_made_anew_or_dropped_with_the_run(leases_for, monkeypatch, tmp_path):
    store, leases = with_failed_tiers(leases_for, monkeypatch, tmp_path)
    store.actor.metrics()
    make_segment(leases, 0, attempt=1)
    assert make_segment(leases, 1)[0] == 8
    leases.close()
    store.close()
    store, _ = with_failed_tiers(leases_for, monkeypatch, tmp_path)
    assert files_of(tmp_path)
    store.actor.drop_run(RUN, tmp_path / ".cache_store")
    assert not files_of(tmp_path)
    assert not list(Path("/dev/shm").glob(f"edit_ray-{os.getpid()}-*"))


def many_segments(leases, number):
    """Segments whose loop continues after their reads and writes: meanwhile the next one's are loaded. Their reads."""
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
    """Of the memory that the run has allocated on the device, once nothing is in flight."""
    leases.give_up()
    assert leases._pool.free == leases._pool.number


@pytest.mark.parametrize("kind", ["run", "rolling"])
@pytest.mark.parametrize(("ahead", "host"), [(1, 1), (3, 1), (3, 100), (100, 3)])
def test_reads_of_the_next_segment_loaded_while_this_one_is_made_are_right(leases_for, host, ahead, kind):
    _, leases = leases_for(host=host, num_segments=8, kind=kind, ahead=ahead)
    assert many_segments(leases, 8) == READS_OF_8[kind]
    assert leases._pool.number == min(ahead, max(len(segment.reads) for segment in leases.reuse.plan.segments))
    assert_all_places_are_free(leases)


@pytest.mark.parametrize("worker", [0, 1])
def test_a_store_that_was_not_told_of_a_run_removes_its_entries_of_an_earlier_store(tmp_path, worker, monkeypatch):
    """As where everything died when all segments were made, and only the end is left to be reported."""
    monkeypatch.setenv("NVME", str(tmp_path))
    store = StoreHere(worker)
    leases = leases_on(store, tmp_path)
    make_segment(leases, 0)
    leases._arena.close()
    store.kill()
    for run, folder, left in (
        ("another", tmp_path / ".cache_store", 8),
        (RUN, Path("$NVME/.cache_store"), 0),
        (RUN, tmp_path / "nowhere", 0),
    ):
        store.call("drop_run", run, folder)()
        assert len(files_of(tmp_path)) == left
    store.close()


@pytest.mark.parametrize("kind", ["run", "rolling"])
def test_with_room_for_all_nothing_is_waited_for_or_read_at_the_segment_s_start(leases_for, kind):
    _, leases = leases_for(host=100, num_segments=6, kind=kind, ahead=100)
    for segment in range(6):
        planned = leases.begin(segment, 0, history_len=1)
        assert len(planned._loaded) == sum(not op.writes for op in planned.ops), "all is on the device"
        make_ops(planned, leases.reuse.form)
        assert planned.waits.seconds == 0 or any(op.writes for op in planned.ops)
        deadline = time.monotonic() + 10
        while segment < 5 and (leases._next is None or leases._next.store._to_load):
            planned.put((segment, EXPERT, "cond", 0, 99), torch.zeros(1))
            assert time.monotonic() < deadline
        planned.finish()
        leases.complete(segment, 0)


def test_entries_just_written_come_unasked_where_device_and_host_together_hold_them(leases_for):
    _, leases = leases_for(host=6, ahead=6)
    make_segment(leases, 0)
    planned = leases.begin(1, 0, history_len=1)
    deadline = time.monotonic() + 30

    def until_there(op):
        """As a computation does that takes longer than the store."""
        index = planned.ops.index(op)
        while index not in planned._loaded and planned.table.place(index) == -1:
            planned.poll()
            assert time.monotonic() < deadline, f"{op.key} has to be asked for"

    assert make_ops(planned, leases.reuse.form, before=until_there) == 8
    assert planned.waits.seconds == 0
    planned.finish()
    assert leases.complete(1, 0)["counts"]["prefetches", "late"] == 0


def test_a_segment_made_again_reads_what_was_loaded_ahead_for_the_next(leases_for):
    _, leases = leases_for(host=3, ahead=8)
    make_segment(leases, 0)
    planned = leases.begin(1, 0, history_len=1)
    make_ops(planned, leases.reuse.form)
    for _ in range(50):
        planned.put((1, EXPERT, "cond", 0, 99), torch.zeros(1))
        time.sleep(0.001)
    assert leases._next is not None, "the next one's reads are in flight, and this one fails"
    assert [make_segment(leases, segment, attempt=segment == 1)[0] for segment in (1, 2, 3)] == [8, 8, 8]
    assert_all_places_are_free(leases)


def test_where_the_device_is_short_of_memory_entries_loaded_ahead_leave_it_for_good(leases_for):
    _, leases = leases_for(host=100, num_segments=8, kind="rolling", ahead=4)
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


def test_where_the_device_has_no_memory_for_it_nothing_is_loaded_ahead(leases_for, monkeypatch, caplog):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(leases_module, "DevicePool", full)
    _, leases = leases_for(num_segments=8, ahead=4)
    assert many_segments(leases, 8) == READS_OF_8["run"]
    assert caplog.text.count("The GPU lacks the 3072 bytes of store.device_bytes") == 1


def test_disk_bytes_bounds_the_disk_and_all_statistics_agree(leases_for, tmp_path):
    """With host memory to spare as well: every entry is in a file, too."""
    _, leases = leases_for(host=16, disk_bytes=4 * 4096)
    planned = leases.begin(0, 0, history_len=1)
    make_ops(planned, leases.reuse.form)
    planned.finish()
    tiers = leases.complete(0, 0)
    assert len(files_of(tmp_path)) == 4
    assert reuse_statistics(planned, tiers)["disk_bytes"] == tiers["bytes"]["disk"] == 4 * 4096


def test_the_end_of_the_last_run_frees_the_memory_of_a_store_that_was_killed(tmp_path):
    left = Path(f"/dev/shm/edit_ray-{os.getpid()}-{tmp_path.name}.arena")
    left.touch()  # nobody has it locked
    CacheStoreActor().drop_run(RUN)
    assert not left.exists()


@pytest.mark.parametrize("folder", ["", "worker-1", "worker-1/other-1"])
def test_the_end_of_a_run_removes_what_it_has_left_beside_another_actor(tmp_path, folder):
    left = tmp_path / folder
    with contextlib.closing(on_disk(left)) as store:
        for run in (RUN, "another"):
            store.put((run, 0), torch.ones(3))
    CacheStoreActor(2).drop_run(RUN, tmp_path)
    with contextlib.closing(on_disk(left)) as store:
        assert (store.get((RUN, 0)), store.get(("another", 0)) is None) == (None, False)
