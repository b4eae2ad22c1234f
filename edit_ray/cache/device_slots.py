"""Slots on a device that are filled from host memory in the order of use: with blocks of weights, with layers' K/V.

The order in which a loop uses its items is known before it. So the device keeps a number of slots of one item each;
which item comes into which slot, and when its copy may begin, is planned: the item needed furthest in the future makes
place (L. Belady, 1966).
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edit_ray.tiers.arena import Arena

AHEAD = 2  # copies begin this many uses early
HORIZON = 256  # uses planned at once; half-way through, the next ones are planned

Item = tuple[str, int]  # the expert or the branch, the position in its stack


class SlotLoad(NamedTuple):
    """A copy of an item into a slot, which may begin once `after` uses have ended."""

    after: int
    slot: int
    item: Item


@dataclass(frozen=True)
class LoadPlan:
    """Where each use finds its item, and the copies that bring it there, in the order in which they begin."""

    slots: tuple[int, ...]
    loads: tuple[SlotLoad, ...]


def plan_loads(uses: Sequence[Item], contents: Sequence[Item | None], ahead: int = AHEAD) -> LoadPlan:
    """Plan the copies for `uses`, from slots that hold `contents`, more than `ahead` of them.

    A slot used by one of the last `ahead` uses before is not overwritten, so that a copy has their time.
    """
    when: dict[Item, list[int]] = {}
    for index, item in enumerate(uses):
        when.setdefault(item, []).append(index)
    held, last_used = list(contents), [-ahead - 1] * len(contents)

    def next_use(slot: int, index: int) -> int:
        item = held[slot]
        uses_of = [] if item is None else when.get(item, [])
        place = bisect_left(uses_of, index)
        return uses_of[place] if place < len(uses_of) else len(uses) + 1

    slots, loads = [], []
    for index, item in enumerate(uses):
        if item not in held:
            free = [slot for slot in range(len(held)) if last_used[slot] < index - ahead]
            slot = max(free, key=lambda slot: next_use(slot, index))
            loads.append(SlotLoad(max(last_used[slot] + 1, index - ahead, 0), slot, item))
            held[slot] = item
        slot = held.index(item)
        last_used[slot] = index
        slots.append(slot)
    return LoadPlan(tuple(slots), tuple(loads))


class HostMemory:
    """`size` bytes of host memory, page-locked for a GPU as long as this object lives; views keep the memory itself.

    torch's own pinned memory comes in powers of two, which would waste up to half of it.

    Raises:
        HostMemoryShort: the node has too little memory.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        if device.type == "cuda":
            arena = Arena.create_unnamed(size)
            arena.register()
            self.bytes = arena.tensor(0, torch.uint8, (size,))
            weakref.finalize(self, arena.close)
        else:
            self.bytes = torch.empty(size, dtype=torch.uint8)


class CopyStream:
    """Copies beside the computation of a GPU, on a stream of their own; on a CPU each has ended when it returns.

    Its events are marks in the work of the two: None on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def event(self) -> Any:
        """A new event, which has happened until it is given a place in the work."""
        return None if self._stream is None else torch.cuda.Event()

    def mark(self, event: Any) -> None:
        """Let the event happen once the computation queued so far has ended."""
        if self._stream is not None:
            event.record(torch.cuda.current_stream(self.device))

    def wait(self, event: Any) -> None:
        """Let what is computed from now on wait for the event."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    @contextmanager
    def copies(self, after: Any, done: Any) -> Iterator[None]:
        """Inside, copies are queued; they begin after the event `after`, and then `done` happens."""
        if self._stream is None:
            yield
            return
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            yield
        done.record(self._stream)

    def reads(self, tensor: Tensor) -> None:
        """Let the memory of a tensor, once it is freed, wait for the copies queued by then."""
        if self._stream is not None:
            tensor.record_stream(self._stream)

    def synchronise(self) -> None:
        """Return when all copies have ended."""
        if self._stream is not None:
            self._stream.synchronize()


class DeviceSlots:
    """Plans which item each of `count` slots has, and begins the copies: `load(item, slot)` queues one.

    `items` are all that there are, in the order in which a loop uses them that was not announced.
    """

    def __init__(
        self, items: Sequence[Item], count: int, copies: CopyStream, load: Callable[[Item, int], None]
    ) -> None:
        self._items, self._copies, self._load = tuple(items), copies, load
        self._contents: list[Item | None] = [None] * count
        self._copied = [copies.event() for _ in range(count)]
        self._used = [copies.event() for _ in range(count)]
        for event in self._used:
            copies.mark(event)  # what is queued may still read what the slots' memory was before
        self.begin_loop(())

    def begin_loop(self, uses: Sequence[Item]) -> None:
        """Plan for what the next loop uses, and begin the first copies."""
        self._uses = list(uses)
        self._plan_from(0)

    def acquire(self, item: Item) -> int:
        """The slot that has the item, for what is computed from now on until `release`."""
        if self._at >= len(self._uses) or self._uses[self._at] != item:
            self._follow(item)
        elif self._at >= HORIZON // 2:
            self._plan_from(self._at)
        slot = self._plan.slots[self._at]
        self._copies.wait(self._copied[slot])
        return slot

    def release(self) -> None:
        """End the use of the item acquired last."""
        self._copies.mark(self._used[self._plan.slots[self._at]])
        self._at += 1
        self._begin_copies()

    def forget(self) -> None:
        """Copy all again that is used from now on: host memory has changed."""
        self._contents = [None] * len(self._contents)
        self._plan_from(self._at)

    def _plan_from(self, index: int) -> None:
        """Plan again for the uses from `index` on; copies that have begun are contents of their slots."""
        del self._uses[:index]
        self._at, self._begun = 0, 0
        self._plan = plan_loads(self._uses[:HORIZON], self._contents)
        self._begin_copies()

    def _begin_copies(self) -> None:
        """Begin the copies that may begin now."""
        loads = self._plan.loads
        while self._begun < len(loads) and loads[self._begun].after <= self._at:
            _, slot, item = loads[self._begun]
            with self._copies.copies(after=self._used[slot], done=self._copied[slot]):
                self._load(item, slot)
            self._contents[slot] = item
            self._begun += 1

    def _follow(self, item: Item) -> None:
        """Plan for a use that was not expected: a policy has skipped some, or no loop announced the forward."""
        if item in self._uses[self._at :]:
            self._plan_from(self._uses.index(item, self._at))
            return
        stack = [other for other in self._items if other[0] == item[0]]
        self._uses = stack[stack.index(item) :] + stack
        self._plan_from(0)
