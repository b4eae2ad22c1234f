"""A segment's own side of the store: what it loads ahead, and what it lets go only when there is a place."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edit_ray.errors import EntryLost
from edit_ray.tiers import protocol
from edit_ray.tiers.arena import Arena
from edit_ray.tiers.protocol import DONE, NEEDED, SKIPPED, UNTOUCHED, EntryForm, Op, OpTable, table_bytes
from edit_ray.tiers.slots import slot_bytes
from edit_ray.tiers.store_client import PlannedStore
from edit_ray.tiers.transfers import DevicePool

FORM = EntryForm(torch.device("cpu"), torch.float32, (1, 8, 16))
ROOM = slot_bytes(FORM.size)
ENTRIES = 6


class Owner:
    """The store's side by hand: an arena of some places, and the table of a segment's ops."""

    def __init__(self, arena, *ops):
        self.arena, self.ops = arena, [Op(("run", *key), FORM, writes) for key, writes in ops]
        self.table = OpTable(arena, ENTRIES * ROOM, len(ops))
        self.table.clear()
        assert table_bytes(len(ops)) <= ROOM

    def fill(self, index, value):
        """Put an entry of this value where the op's place will be, and return the place's memory."""
        place = self.arena.tensor(index * ROOM, FORM.dtype, FORM.shape)
        place.fill_(value)
        return place

    def give(self, *indices):
        for index in indices:
            self.table.give(index, index * ROOM)

    def ready(self):
        """Every op has its place, and reads find their number there."""
        places = [self.fill(index, index) for index in range(len(self.ops))]
        self.give(*range(len(self.ops)))
        return places

    def states(self):
        return self.table.states().tolist()

    def store(self, ahead, **options):
        return PlannedStore(
            self.arena, ENTRIES * ROOM, self.ops, prefix=("run",), ahead_bytes=ahead * FORM.size, **options
        )


def key(number):
    return (0, "transformer", "cond", 0, number)


def residual(value):
    return torch.full(FORM.shape, float(value))


@pytest.fixture
def arena(tmp_path):
    with Arena.create((ENTRIES + 1) * ROOM, tmp_path) as arena:
        yield arena


def reads(number):
    return [(key(i), False) for i in range(number)]


def test_a_fence_stands_between_a_word_and_the_bytes_that_it_is_about(arena, monkeypatch):
    """Before each write of a word and after each read, as not every CPU keeps the order."""
    table, words = OpTable(arena, ENTRIES * ROOM, 1), []

    def fence():
        words.append((int(table._places[0]), int(table._states[0])))
        table._places[0], table._states[0] = 2 * words[-1][0] + 1, DONE

    table.clear()
    monkeypatch.setattr(protocol, "fence", fence)
    table.give(0, 8)
    table.mark(0, NEEDED)
    assert (table.place(0), table.states().tolist()) == (18, [DONE])
    assert words == [(0, UNTOUCHED), (9, DONE), (19, NEEDED), (39, DONE)]
    monkeypatch.undo()
    assert (table.place(0), table.states().tolist()) == (78, [DONE])


def test_reads_are_loaded_ahead_in_the_order_of_use_as_far_as_there_is_room(arena):
    owner = Owner(arena, *reads(4))
    places = owner.ready()
    store = owner.store(ahead=2)
    for place in places:
        place.fill_(99)  # what was loaded before this shows no trace of it
    assert [store.get(key(i)).mean().item() for i in range(4)] == [0, 1, 99, 99]
    assert owner.states() == [DONE] * 4


def test_what_comes_later_is_not_loaded_before_what_comes_first(arena):
    owner = Owner(arena, *reads(2))
    places = [owner.fill(i, i) for i in range(2)]
    owner.give(1)
    store = owner.store(ahead=2)
    owner.give(0)
    for place in places:
        place.fill_(99)
    assert [store.get(key(i)).mean().item() for i in range(2)] == [99, 99]


def test_a_write_without_a_place_holds_nobody_up_while_there_is_room_for_it(arena):
    owner = Owner(arena, *[(key(i), True) for i in range(3)])
    store = owner.store(ahead=2, timeout_s=0.2)
    store.put(key(0), residual(5))
    store.put(key(1), residual(6))
    assert owner.states() == [UNTOUCHED] * 3
    owner.give(0)
    store.put(key(2), residual(7))
    assert owner.states() == [DONE, UNTOUCHED, UNTOUCHED]
    assert owner.arena.tensor(0, FORM.dtype, FORM.shape).mean() == 5
    owner.give(1, 2)
    store.finish()
    assert owner.states() == [DONE] * 3
    assert [owner.arena.tensor(i * ROOM, FORM.dtype, FORM.shape).mean() for i in range(3)] == [5, 6, 7]


@pytest.mark.parametrize("ahead", [0, 1])
def test_beyond_that_it_waits(arena, ahead):
    owner = Owner(arena, *[(key(i), True) for i in range(2)])
    store = owner.store(ahead=ahead, timeout_s=0.2)
    for number in range(ahead):
        store.put(key(number), residual(1))
    with pytest.raises(EntryLost, match="did not deliver"):
        store.put(key(ahead), residual(2))
    assert owner.states()[0] == NEEDED
    assert store.waits.seconds == 0, "a wait that failed is none"


def test_a_wait_lets_go_what_gets_its_place_meanwhile(arena, monkeypatch):
    """The read waits for room that the write's copy makes: so the store gives the read its place only after it."""
    owner = Owner(arena, (key(0), True), (key(1), False))
    owner.fill(1, 3)
    store = owner.store(ahead=1, timeout_s=5)
    store.put(key(0), residual(5))
    give_write, ask = store.table.place, []

    def place(index):
        ask.append(index)
        if len(ask) == 5:
            owner.give(0)
        if owner.states()[0] == DONE:
            owner.give(1)
        return give_write(index)

    monkeypatch.setattr(store.table, "place", place)
    assert store.get(key(1)).mean() == 3
    assert owner.states() == [DONE, DONE]


def test_what_is_passed_over_is_skipped_unless_it_was_loaded_ahead(arena):
    owner = Owner(arena, *reads(3))
    owner.ready()
    store = owner.store(ahead=1)
    assert store.get(key(2)).mean() == 2
    assert owner.states() == [DONE, SKIPPED, DONE]
    store.finish()


def test_a_lost_read_is_said_when_it_is_asked_for_and_not_before(arena):
    owner = Owner(arena, *reads(2))
    owner.fill(0, 4)
    owner.give(0)
    owner.table.give(1, None)
    store = owner.store(ahead=2)
    assert store.get(key(0)).mean() == 4
    with pytest.raises(EntryLost, match="has lost"):
        store.get(key(1))


def test_what_the_next_segment_reads_stays_on_the_device_for_it(arena):
    owner = Owner(arena, (key(0), True), (key(1), True))
    owner.give(0, 1)
    store = owner.store(ahead=2, hand_over=[("run", *key(1))])
    for number in range(2):
        store.put(key(number), residual(number))
    store.finish()
    assert list(store.handed_over) == [("run", *key(1))]

    following = Owner(arena, (key(0), False), (key(1), False))
    following.fill(0, 9)
    next_store = following.store(ahead=2, handed=list(store.handed_over))
    next_store.adopt(store.handed_over)
    assert following.states() == [UNTOUCHED, SKIPPED], "its place is given back"
    following.give(0)
    assert next_store.get(key(0)).mean() == 9
    assert torch.equal(next_store.get(key(1)), residual(1))
    next_store.finish()
    assert following.states() == [DONE, SKIPPED]


def test_the_room_that_was_left_for_what_is_handed_over_is_used_once_it_is_there(arena):
    owner = Owner(arena, (key(3), True))
    owner.give(0)
    store = owner.store(ahead=3, hand_over=[("run", *key(3))])
    store.put(key(3), residual(3))
    store.finish()

    following = Owner(arena, *reads(4))
    places = [following.fill(i, i) for i in range(3)]
    following.give(0, 1, 2)
    next_store = following.store(ahead=3, handed=list(store.handed_over))
    places[2].fill_(5)  # two are loaded, and the third place is left for what is handed over
    next_store.adopt(store.handed_over)
    assert next_store.get(key(0)).mean() == 0
    for place in places:
        place.fill_(99)  # the first has left its place by now
    assert [next_store.get(key(i)).mean().item() for i in range(1, 4)] == [1, 5, 3]


def test_what_was_to_be_handed_over_and_was_not_is_read(arena):
    owner = Owner(arena, (key(0), False))
    owner.ready()[0].fill_(4)
    store = owner.store(ahead=2, handed=[("run", *key(0))])
    store.adopt({})
    assert store.get(key(0)).mean() == 4


def test_once_all_is_read_it_says_so(arena):
    owner, said = Owner(arena, (key(0), False), (key(1), True)), []
    owner.fill(0, 4)
    store = owner.store(ahead=2, when_read=lambda: said.append(owner.states()))
    assert said == []
    owner.give(0, 1)
    store.get(key(0))
    assert said == [], "nothing is computed meanwhile"
    store.put(key(1), residual(1))
    store.put((0, "transformer", "cond", 0, 7), residual(2))  # not in the plan; the loop goes on
    assert said == [[DONE, DONE]] * 2


def test_a_settled_store_drops_what_waited(arena):
    owner = Owner(arena, (key(0), True), (key(1), True))
    store = owner.store(ahead=2)
    store.put(key(0), residual(5))
    place = owner.fill(0, 9)
    store.settle()
    owner.give(0)
    store.put(key(1), residual(6))
    assert place.mean() == 9, "the place may be another's"


def pool_of(number):
    return DevicePool(FORM.device, {FORM: number})


def test_a_pool_has_as_many_tensors_as_are_not_in_use():
    pool = pool_of(2)
    first, second = pool.take(FORM), pool.take(FORM)
    assert first.shape == second.shape == torch.Size(FORM.shape)
    assert first.data_ptr() != second.data_ptr()
    assert pool.take(FORM) is None
    pool.restock(FORM)
    assert pool.free == 1
    pool.restock(FORM)
    pool.restock(FORM)
    assert pool.free == 2, "no more than there were"
    pool.release()
    pool.restock(FORM)
    assert (pool.free, pool.take(FORM)) == (0, None)


def test_a_device_without_memory_for_another_tensor_has_one_less(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    pool = pool_of(2)
    pool.take(FORM)
    monkeypatch.setattr(pool.copies, "empty", full)
    pool.restock(FORM)
    assert (pool.number, pool.free) == (1, 1)


def test_what_was_read_is_its_readers_and_another_tensor_takes_its_place(arena):
    owner, pool = Owner(arena, *reads(ENTRIES)), pool_of(2)
    owner.ready()
    store = owner.store(ahead=2, pool=pool)
    assert pool.free == 0, "both are filled ahead"
    found = []
    for index in range(ENTRIES):
        found.append(store.get(key(index)))
        assert all(loaded.pooled for loaded in store._loaded.values()), "two are enough for two"
    store.finish()
    assert pool.free == 2
    assert [tensor.mean().item() for tensor in found] == list(range(ENTRIES))
    addresses = [tensor.data_ptr() for tensor in (*found, pool.take(FORM), pool.take(FORM))]
    assert len(set(addresses)) == ENTRIES + 2


def test_a_closed_store_takes_no_place(arena):
    """One that failed may still be given something, by who has not heard of it."""
    owner, pool = Owner(arena, (key(0), False), (key(1), True)), pool_of(2)
    owner.fill(0, 4)
    owner.give(0)
    store = owner.store(ahead=2, pool=pool, hand_over=[("run", *key(1))])
    store.close()
    assert store.get(key(0)).mean() == 4
    store.put(key(1), residual(5))
    assert pool.free == 2


@st.composite
def chains(draw):
    """Segments of a chain: what each reads of the entries before and writes, which of that it comes to use, and after
    how many ops it fails, if it does.
    """
    segments, written = [], []
    for first in range(0, 8, 2):
        read = draw(st.lists(st.sampled_from(written), max_size=4)) if written else []
        ops = [(entry, False) for entry in read] + [(entry, True) for entry in range(first, first + 2)]
        used = [draw(st.integers(0, 4)) > 0 for _ in ops]
        segments.append((ops, used, draw(st.sampled_from([None, None, None, 0, 1, 2, 3]))))
        written += [first, first + 1]
    return segments


@given(chain=chains(), places=st.integers(0, 5), ahead=st.integers(0, 5), handed=st.integers(0, 2))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_segments_do_reads_are_right_and_every_place_comes_back(arena, chain, places, ahead, handed):
    pool, last, found = pool_of(places), None, []
    for ops, used, end in chain:
        owner = Owner(arena, *[(key(entry), writes) for entry, writes in ops])
        for index, (entry, writes) in enumerate(ops):
            owner.fill(index, -1 if writes else entry)
        owner.give(*range(len(ops)))
        hand_over = [("run", *key(entry)) for entry, writes in ops if writes][:handed]
        adopts = [] if last is None else list(last.handed_over)
        store = owner.store(ahead, pool=pool, hand_over=hand_over, handed=adopts)
        if last is not None:
            store.adopt(last.handed_over)
            last.close()
        fails = end is not None
        try:
            for (entry, writes), use in list(zip(ops, used, strict=True))[:end]:
                if use and writes:
                    store.put(key(entry), residual(entry))
                elif use:
                    found.append((entry, store.get(key(entry))))
            if not fails:
                store.finish()
        except EntryLost:  # what the plan has written was not, or what it has read twice was read the second time only
            fails = True
        last = None if fails else store
        (store.close if fails else store.settle)()
        assert pool.free == places - min(places, 0 if fails else len(store.handed_over))
    if last is not None:
        last.close()
    assert pool.free == places
    assert all(torch.equal(tensor, residual(entry)) for entry, tensor in found)
