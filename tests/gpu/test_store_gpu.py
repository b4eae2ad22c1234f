"""What segments reuse of each other on a CUDA device: the arena registered, copies on streams of their own."""

import gc
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from benchmarks.rolling_plan import rolling_plan
from edit_ray.actors.messages import RunSpec, run_key
from edit_ray.cache.options import CacheOptions
from edit_ray.config import Config
from edit_ray.engine.options import ModelOptions, SamplingOptions
from edit_ray.engine.segment import SegmentEngine
from edit_ray.testing import save_random_wan
from edit_ray.tiers.arena import Arena
from edit_ray.tiers.leases import Reuse, SegmentLeases
from edit_ray.tiers.protocol import EntryForm
from edit_ray.tiers.transfers import StreamCopies
from tests.store_here import StoreHere

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")
DEVICE = torch.device("cuda", 0)
FORM = EntryForm(DEVICE, torch.bfloat16, (1, 512, 256))
SIZE = FORM.size
RUN = f"{run_key('run', '')}.0"  # as the store knows it
EXPERT, UNITS = "transformer", 4


@pytest.fixture
def store():
    store = StoreHere()
    yield store
    store.close()


@pytest.fixture
def leases_for():
    """Makes leases that are closed afterwards."""
    made = []

    def make(*arguments, **options):
        made.append(new_leases(*arguments, **options))
        return made[-1]

    yield make
    for leases in made:
        leases.close()


def new_leases(store, root, *, segments=6, host=3, ahead=0, units=UNITS):
    """Each segment writes an entry per unit and branch and reads those of the two before it."""
    plan = rolling_plan(RUN, segments, window=2, unit_bytes=[SIZE] * units)
    return leases_of(store, root, Reuse(plan, FORM), host_bytes=host * SIZE, device_bytes=ahead * SIZE)


def leases_of(store, root, reuse, **options):
    options |= {"directory": str(root / "disk"), "allow_tmpfs": True}
    prompts = [{"segment": 0, "prompt": "a red circle"}]
    config = Config.model_validate({"store": options, "video": {"num_segments": 1}, "prompt_segments": prompts})
    return SegmentLeases(store, RunSpec("run", root, config, config.num_segments).reusing, reuse)


def tensor_of(key):
    """An entry's bytes follow from its key."""
    generator = torch.Generator(DEVICE).manual_seed(hash(key) & 0xFFFFFF)
    return torch.randn(FORM.shape, device=DEVICE, generator=generator).bfloat16()


def make(planned, checks):
    """A segment's ops; `checks` collects, on the device, whether each read was right."""
    for op in planned.ops:
        if op.writes:
            planned.put(op.key[1:], tensor_of(op.key))
        else:
            checks.append((planned.get(op.key[1:]) == tensor_of(op.key)).all())
    planned.finish()


def make_segments(leases, checks, segments, attempt=0):
    """Makes segments from their beginning to their end; what is said of the last."""
    for segment in segments:
        make(leases.begin(segment, attempt, 1), checks)
        told = leases.complete(segment, attempt)
    return told


@pytest.mark.parametrize("create", [Arena.create, Arena.create_unnamed], ids=["in a folder", "in none"])
def test_a_registered_arena_is_pinned_and_gives_it_back(create):
    with create(1 << 20) as owner, Arena.open(owner.path) as arena:
        view = arena.tensor(0, torch.uint8, (1 << 20,))
        assert not view.is_pinned()
        assert arena.register()
        assert arena.register(), "once is enough"
        assert view.is_pinned()
        view.fill_(7)
        assert (view.to(DEVICE, non_blocking=True) == 7).all()
        del view
        arena.close()
    with create(1 << 20) as owner, Arena.open(owner.path) as again:
        assert again.register(), "another arena, as after a store that died"


def test_a_refused_registration_leaves_no_error_behind(tmp_path):
    with Arena.create(1 << 20, tmp_path) as arena:  # a file on a disk, which CUDA does not take
        assert not arena.register()
        assert torch.ones(3, device=DEVICE).sum() == 3
        torch.cuda.synchronize()


@pytest.mark.parametrize("ahead", [0, 1, 5, 100])
@pytest.mark.parametrize("host", [1, 3, 100])
def test_what_was_written_is_read(store, leases_for, tmp_path, host, ahead):
    segments = 44 if (host, ahead) == (3, 5) else 6
    leases, checks = leases_for(store, tmp_path, segments=segments, host=host, ahead=ahead), []
    told = make_segments(leases, checks, range(segments))
    assert len(checks) == 2 * UNITS * (1 + 2 * (segments - 2))
    assert torch.stack(checks).all()
    assert told["peak_bytes"]["host"] <= host * SIZE


def use(monkeypatch, copies):
    """Has all copies made by these, with and without a pool."""
    for module in ("store_client", "transfers"):
        monkeypatch.setattr(f"edit_ray.tiers.{module}.copies_for", copies)


class Delayed(StreamCopies):
    """Each copy and each use comes after a pause of its stream, of a random length."""

    draw = random.Random(0)

    def pause(self, stream):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(self.draw.randrange(1, 4_000_000))  # up to 2 ms

    def take(self, tensor):
        taken = super().take(tensor)
        self.pause(torch.cuda.current_stream())
        return taken

    def out(self, taken, place):
        self.pause(self.leaving)
        copy = super().out(taken, place)
        self.pause(self.leaving)
        return copy

    def load(self, place, into=None):
        self.pause(self.loading)
        return super().load(place, into)

    def use(self, loaded):
        self.pause(torch.cuda.current_stream())
        return super().use(loaded)


@pytest.mark.parametrize("ahead", [0, 4])
def test_streams_keep_their_order_under_random_delays(store, leases_for, tmp_path, monkeypatch, ahead):
    use(monkeypatch, Delayed)
    leases, checks = leases_for(store, tmp_path, segments=12, host=3, ahead=ahead), []
    make_segments(leases, checks, range(12))
    assert torch.stack(checks).all()


class Behind(StreamCopies):
    """The computing stream is far behind the host: a tensor leaves the store long before it is read. Notes for each
    load whether it took one of the pool.
    """

    of_pool: ClassVar[list[bool]] = []

    def fall_behind(self):
        torch.cuda._sleep(2_000_000)  # about 1 ms

    def load(self, place, into=None):
        self.of_pool.append(into is not None)
        return super().load(place, into)

    def use(self, loaded):
        self.fall_behind()
        return super().use(loaded)


@pytest.mark.parametrize("ahead", [2, 5])
def test_memory_is_filled_again_only_when_it_was_read(store, leases_for, tmp_path, monkeypatch, ahead):
    """Each segment reads three to eight times as many entries as the pool has tensors, a part of them handed over."""
    use(monkeypatch, Behind)
    monkeypatch.setattr(Behind, "of_pool", [])
    leases, checks = leases_for(store, tmp_path, segments=8, host=100, ahead=ahead), []
    make_segments(leases, checks, range(8))
    assert len(checks) == 2 * UNITS * (1 + 2 * 6)
    assert torch.stack(checks).all()
    handed_over = 7 * {2: 1, 5: 3}[ahead]
    assert Behind.of_pool == [True] * (len(checks) - handed_over)
    leases.give_up()
    assert (leases._pool.number, leases._pool.free) == (ahead, ahead)


class Late(StreamCopies):
    """What is loaded comes so many cycles of the GPU later."""

    cycles = 0

    def load(self, place, into=None):
        with torch.cuda.stream(self.loading):
            torch.cuda._sleep(self.cycles)
        return super().load(place, into)


def test_memory_is_filled_again_only_after_a_load_that_nobody_has_used(store, leases_for, tmp_path, monkeypatch):
    use(monkeypatch, Late)
    leases, checks = leases_for(store, tmp_path, segments=4, host=100, ahead=5), []
    make_segments(leases, checks, range(2))
    monkeypatch.setattr(Late, "cycles", 40_000_000)  # about 20 ms
    planned = leases.begin(2, 1, 1)
    deadline = time.monotonic() + 10
    while len(planned._loaded) < 5:
        planned.poll()
        assert time.monotonic() < deadline
    monkeypatch.setattr(Late, "cycles", 0)
    for op in planned.ops:
        if op.writes:
            planned.put(op.key[1:], tensor_of(op.key))
    planned.finish()
    leases.complete(2, 1)
    make_segments(leases, checks, [3])
    assert torch.stack(checks).all()


def test_after_every_segment_the_same_memory_is_allocated(store, leases_for, tmp_path):
    """The first reads nothing and the last hands nothing over; what else is on its way is a matter of time."""
    gc.collect()  # of what earlier tests have left
    before, allocated = torch.cuda.memory_allocated(), []
    leases = leases_for(store, tmp_path, host=3, ahead=5)
    for segment in range(6):
        planned, checks = leases.begin(segment, 0, 1), []
        make(planned, checks)
        leases.complete(segment, 0)
        assert not checks or torch.stack(checks).all()
        planned.clear()  # what the segment has computed itself, which the last one's ops do not
        del planned, checks
        allocated.append(torch.cuda.memory_allocated())
    assert allocated == allocated[:1] * 6
    assert allocated[0] - before >= 5 * SIZE
    leases.close()
    assert torch.cuda.memory_allocated() == before


def test_the_memory_of_what_was_read_is_not_another_read_s(store, leases_for, tmp_path):
    """What is loaded ahead takes the memory of what was let go; the computing stream may still be busy with that."""
    leases = leases_for(store, tmp_path, segments=3, host=100, ahead=100)
    make_segments(leases, [], range(2))
    planned, checks = leases.begin(2, 0, 1), []
    for op in planned.ops:
        if not op.writes:
            found = planned.get(op.key[1:])
            torch.cuda._sleep(2_000_000)
            checks.append((found == tensor_of(op.key)).all())
            del found
            torch.empty(FORM.shape, dtype=FORM.dtype, device=DEVICE).fill_(-1)
    assert torch.stack(checks).all()
    planned.settle()


def test_a_failed_segment_writes_nothing_into_what_is_given_to_others(store, leases_for, tmp_path, monkeypatch):
    use(monkeypatch, Delayed)
    leases, checks = leases_for(store, tmp_path, segments=3, host=3, ahead=8), []
    make_segments(leases, checks, [0])
    failed = leases.begin(1, 0, 1)
    first = next(op for op in failed.ops if op.writes)
    failed.put(first.key[1:], torch.full(FORM.shape, float("nan"), device=DEVICE).bfloat16())
    make_segments(leases, checks, [1], attempt=1)
    make_segments(leases, checks, [2])
    assert torch.stack(checks).all()


KILLED = """
import torch
from edit_ray.tiers.arena import Arena
from edit_ray.tiers.protocol import EntryForm, Op, this_process
from edit_ray.tiers.store_client import PlannedStore
torch.zeros(1, device="cuda")
print(this_process(), flush=True)
path, table, number = input().split()
number = int(number)
arena = Arena.open(path)
assert arena.register()
keys = [("run", 0, "transformer", branch, unit, 1) for unit in range(number // 2) for branch in ("cond", "uncond")]
form = EntryForm(torch.device("cuda", 0), torch.bfloat16, (1, 512, 256))
ops = [Op(key, form, True) for key in keys]
store = PlannedStore(arena, int(table), ops, prefix=("run",), ahead_bytes=100 * form.size)
for key in keys:
    torch.cuda._sleep(200_000_000)
    store.put(key[1:], torch.full(form.shape, float("nan"), device="cuda").bfloat16())
print("copying", flush=True)
torch.cuda.synchronize()
"""


def test_a_killed_gpu_actor_leaves_nothing(store, leases_for, tmp_path):
    """A process with the arena registered dies while copies into it are under way; another makes the segment."""
    leases, checks = leases_for(store, tmp_path, segments=3, host=8), []
    leases.follow(0)
    root = Path(__file__).resolve().parents[2]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", KILLED], text=True, cwd=root, **pipes) as process:
        holder = process.stdout.readline().strip()
        lease = store.actor.prepare(RUN, 0, 0, holder, leases.reuse.ops(0))
        process.stdin.write(f"{lease.arena} {lease.table} {len(leases.reuse.ops(0))}\n")
        process.stdin.flush()
        line = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        assert line == "copying\n", process.stderr.read()
        process.communicate()
    make_segments(leases, checks, [0], attempt=1)
    make_segments(leases, checks, [1, 2])
    assert torch.stack(checks).all()


def test_leases_that_nobody_closed_leave_no_memory_registered(tmp_path):
    """What is mapped at the same address afterwards is other memory, to which CUDA must not copy the old way."""
    for _ in range(3):
        store = StoreHere()
        leases, checks = new_leases(store, tmp_path, segments=2, host=8), []
        make_segments(leases, checks, range(2))
        assert torch.stack(checks).all()
        assert leases._arena.register()
        store.close()
        del leases


CACHE = CacheOptions.model_validate(
    {"policy": "warmstart_reuse", "inner": "fbcache", "rel_l1_thresh": 0.2, "warm_steps": 3, "reuse_window": 2}
)
SAMPLING = SamplingOptions(height=64, width=64, num_frames=17, num_inference_steps=6)


@pytest.mark.parametrize("granularity", ["stack", 2])
def test_latents_are_the_same_through_every_size_of_every_tier(tmp_path, granularity):
    model = save_random_wan(tmp_path / "wan", num_layers=4)
    engine = SegmentEngine.load(ModelOptions(path=str(model), device="cuda"), 1)
    cache = CACHE.model_copy(update={"granularity": granularity})
    reuse = engine.plan_reuse(RUN, 4, cache, SAMPLING, None)
    size = reuse.form.size
    made = []
    for number, (host, device) in enumerate([(100, 100), (100, 0), (2, 0), (2, 3)]):
        store = StoreHere()
        options = {"host_bytes": host * 2 * size, "device_bytes": device * size}
        leases = leases_of(store, tmp_path / str(number), reuse, **options)
        made.append([])
        for segment in range(4):
            planned = leases.begin(segment, 0, engine.history_len)
            of = {"seed": segment, "segment_index": segment, "cache": cache, "store": planned}
            made[-1].append(engine.denoise(SAMPLING, prompt="a red circle", **of))
            leases.complete(segment, 0)
            assert planned.waits.reads == (0 if segment in (0, 3) else 3 * 2 * {"stack": 1, 2: 2}[granularity])
        leases.close()
        store.close()
    assert all(torch.equal(torch.stack(other), torch.stack(made[0])) for other in made[1:])
