"""Transformer blocks whose weights are in host memory, and on the device while they are needed.

The order in which a loop uses its blocks is known before it: every block of every forward or, with a known mask, those
that compute. So the device keeps a number of slots of one block each; which block comes into which slot, and when its
copy may begin, is planned: the block needed furthest in the future makes place (L. Belady, 1966). What a mask skips is
not copied.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edit_ray.cache.adapters import adapter_of
from edit_ray.cache.loop_position import LoopStep
from edit_ray.engine.caching import experts_of, loop_steps
from edit_ray.engine.cfg_parallel import check_device
from edit_ray.tiers.arena import Arena

AHEAD = 2  # copies begin this many uses early
HORIZON = 256  # uses planned at once; half-way through, the next ones are planned
ALIGNMENT = 256  # bytes, of each tensor in a block's memory

Block = tuple[str, int]  # the expert, the position in its stack


class BlockLoad(NamedTuple):
    """A copy of a block's weights into a slot, which may begin once `after` uses have ended."""

    after: int
    slot: int
    block: Block


@dataclass(frozen=True)
class LoadPlan:
    """Where each use finds its block, and the copies that bring it there, in the order in which they begin."""

    slots: tuple[int, ...]
    loads: tuple[BlockLoad, ...]


def plan_loads(uses: Sequence[Block], contents: Sequence[Block | None], ahead: int = AHEAD) -> LoadPlan:
    """Plan the copies for `uses`, from slots that hold `contents`, more than `ahead` of them.

    A slot used by one of the last `ahead` uses before is not overwritten, so that a copy has their time.
    """
    when: dict[Block, list[int]] = {}
    for index, block in enumerate(uses):
        when.setdefault(block, []).append(index)
    held, last_used = list(contents), [-ahead - 1] * len(contents)

    def next_use(slot: int, index: int) -> int:
        block = held[slot]
        uses_of = [] if block is None else when.get(block, [])
        place = bisect_left(uses_of, index)
        return uses_of[place] if place < len(uses_of) else len(uses) + 1

    slots, loads = [], []
    for index, block in enumerate(uses):
        if block not in held:
            free = [slot for slot in range(len(held)) if last_used[slot] < index - ahead]
            slot = max(free, key=lambda slot: next_use(slot, index))
            loads.append(BlockLoad(max(last_used[slot] + 1, index - ahead, 0), slot, block))
            held[slot] = block
        slot = held.index(block)
        last_used[slot] = index
        slots.append(slot)
    return LoadPlan(tuple(slots), tuple(loads))


def uses_of_loop(
    steps: Sequence[LoopStep],
    branches: Sequence[str],
    units: Mapping[str, Sequence[range]],
    mask: Mapping[tuple[str, str, int], Sequence[bool | None]] | None,
) -> list[Block]:
    """The blocks that a loop computes, in their order.

    Args:
        units: The positions of the blocks of each unit, by expert.
        mask: Per (expert, branch, unit) whether each step computes it; None where all is computed, or nothing known.
    """
    return [
        (step.expert, position)
        for index, step in enumerate(steps)
        for branch in branches
        for unit, positions in enumerate(units[step.expert])
        if mask is None or mask[step.expert, branch, unit][index]
        for position in positions
    ]


class HostBlock:
    """A block's weights in one piece of host memory, page-locked for a GPU.

    torch's own pinned memory comes in powers of two, which would waste up to half of it.

    Raises:
        HostMemoryShort: the node has too little memory.
    """

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self.block = block
        # Matrices first: so query, key and value lie behind each other, and the mode fast takes them as one.
        self._tensors = sorted(_tensors(block), key=lambda tensor: tensor.ndim == 1)
        self._places, size = [], 0
        for tensor in self._tensors:
            self._places.append(size)
            size += _padded(tensor)
        if device.type == "cuda":
            arena = Arena.create_unnamed(size)
            arena.register()
            self.memory = arena.tensor(0, torch.uint8, (size,))
            weakref.finalize(self, arena.close)  # its memory stays as long as the weights in it
        else:
            self.memory = torch.empty(size, dtype=torch.uint8)
        for tensor, home in zip(self._tensors, self._views(self.memory), strict=True):
            home.copy_(tensor.data)
            tensor.data = home

    def use(self, memory: Tensor) -> None:
        """Let the block compute with the weights in `memory`, a copy of its own."""
        for tensor, view in zip(self._tensors, self._views(memory), strict=True):
            tensor.data = view

    def _views(self, memory: Tensor) -> Iterator[Tensor]:
        for tensor, place in zip(self._tensors, self._places, strict=True):
            yield memory[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


class BlockOffload:
    """Keeps the blocks of a pipeline's transformers in host memory, and copies them to `device` as they are needed.

    `device_bytes` bounds what the transformers' weights take there: slots of a block each, besides what is outside of
    blocks. `copied_bytes` counts what was copied.

    Raises:
        ValueError: `device_bytes` has no place for `AHEAD + 1` blocks.
    """

    def __init__(self, transformers: Mapping[str, nn.Module], device: torch.device, device_bytes: int) -> None:
        self.device, self.copied_bytes = device, 0
        self._blocks: dict[Block, HostBlock] = {}
        self._hooks: list[Any] = []
        self._transformers = dict(transformers)
        stacks = {name: list(adapter_of(transformer).blocks(transformer)) for name, transformer in transformers.items()}
        inside = {id(tensor) for stack in stacks.values() for block in stack for tensor in _tensors(block)}
        whole = [tensor for transformer in transformers.values() for tensor in _tensors(transformer)]
        others = [tensor for tensor in whole if id(tensor) not in inside]
        largest = max(sum(map(_padded, _tensors(block))) for stack in stacks.values() for block in stack)
        room, number = device_bytes - sum(t.nbytes for t in others), sum(map(len, stacks.values()))
        slots = min(room // largest, number)
        if slots <= AHEAD:
            least = device_bytes - room + (AHEAD + 1) * largest
            raise ValueError(
                f"{device_bytes} bytes are too few for the weights on the device: the parts outside of blocks and "
                f"{AHEAD + 1} blocks take {least}."
            )
        for tensor in others:
            tensor.data = tensor.data.to(device)
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(slots)]
        self._contents: list[Block | None] = [None] * slots
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._copied: list[Any] = [torch.cuda.Event() if on_gpu else None for _ in range(slots)]
        self._used: list[Any] = [torch.cuda.Event() if on_gpu else None for _ in range(slots)]
        for name, stack in stacks.items():
            for position, block in enumerate(stack):
                self._blocks[name, position] = HostBlock(block, device)
                self._hooks += [
                    block.register_forward_pre_hook(self._before(name, position)),
                    block.register_forward_hook(self._after(name, position), always_call=True),
                ]
        self._uses: list[Block] = []
        self._plan_from(0)

    def begin_loop(self, uses: Sequence[Block]) -> None:
        """Plan for the blocks that the next loop uses, and begin the first copies."""
        self._uses = list(uses)
        self._plan_from(0)

    def remove(self) -> None:
        """Leave all weights in host memory, as any model's."""
        if self._stream is not None:
            torch.cuda.synchronize(self.device)
        for hook in self._hooks:
            hook.remove()
        self._blocks.clear()
        for transformer in self._transformers.values():
            transformer.to("cpu")

    def _plan_from(self, index: int) -> None:
        """Plan again for the uses from `index` on; copies that have begun are contents of their slots."""
        del self._uses[:index]
        self._at, self._begun = 0, 0
        self._plan = plan_loads(self._uses[:HORIZON], self._contents)
        self._copy()

    def _copy(self) -> None:
        """Begin the copies that may begin now."""
        loads = self._plan.loads
        while self._begun < len(loads) and loads[self._begun].after <= self._at:
            _, slot, name = loads[self._begun]
            source = self._blocks[name].memory
            on_stream: AbstractContextManager[object] = nullcontext()
            if self._stream is not None:
                self._stream.wait_event(self._used[slot])
                on_stream = torch.cuda.stream(self._stream)
            with on_stream:
                self._slots[slot][: len(source)].copy_(source, non_blocking=True)
            if self._stream is not None:
                self._copied[slot].record(self._stream)
            self._contents[slot] = name
            self.copied_bytes += source.nbytes
            self._begun += 1

    def _before(self, expert: str, position: int) -> Any:
        def before(block: nn.Module, args: Any) -> None:
            this = (expert, position)
            if self._at >= len(self._uses) or self._uses[self._at] != this:
                self._follow(this)
            elif self._at >= HORIZON // 2:
                self._plan_from(self._at)
            slot = self._plan.slots[self._at]
            if self._stream is not None:
                torch.cuda.current_stream(self.device).wait_event(self._copied[slot])
            self._blocks[this].use(self._slots[slot])

        return before

    def _after(self, expert: str, position: int) -> Any:
        def after(block: nn.Module, args: Any, output: Any) -> None:
            home = self._blocks[expert, position]
            home.use(home.memory)
            if self._stream is not None:
                self._used[self._plan.slots[self._at]].record(torch.cuda.current_stream(self.device))
            self._at += 1
            self._copy()

        return after

    def _follow(self, this: Block) -> None:
        """Plan for a use that was not expected: a policy has skipped blocks, or no loop announced the forward."""
        if this in self._uses[self._at :]:
            self._plan_from(self._uses.index(this, self._at))
            return
        stack = [block for block in self._blocks if block[0] == this[0]]
        self._uses = stack[this[1] :] + stack
        self._plan_from(0)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _padded(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


class OffloadControl:
    """`enable_block_offload` and `disable_block_offload` for a pipeline of diffusers' components."""

    block_offload: BlockOffload | None = None

    def enable_block_offload(self, device: str | torch.device, device_bytes: int) -> None:
        """Keep the transformers' blocks in host memory, and copy them to `device` as the loops need them.

        All other parts of the pipeline are moved by the caller. The bits stay the same. LoRA and other changes of
        weights come before it; a cache may come before or after.

        Raises:
            ValueError: it is enabled already, `cfg_parallel` is, or `device_bytes` is too small.
            ModelError: there is no such device.
        """
        pipe: Any = self
        if self.block_offload is not None:
            raise ValueError("The blocks are offloaded already; call disable_block_offload() first.")
        if pipe.cfg_parallel is not None:
            raise ValueError("cfg_parallel is enabled, which needs all weights on its devices; disable it first.")
        self.block_offload = BlockOffload(experts_of(pipe), check_device(device), device_bytes)

    def disable_block_offload(self) -> None:
        """Leave the transformers whole in host memory; where it is not enabled, nothing happens."""
        if self.block_offload is not None:
            self.block_offload.remove()
        self.block_offload = None

    def announce_blocks(self, begin: int) -> None:
        """Tell which blocks the loop from the scheduler's timestep `begin` computes, once its steps are set."""
        pipe: Any = self
        if self.block_offload is None:
            return
        steps, cache = loop_steps(pipe, pipe.scheduler)[begin:], pipe.cache
        branches = ("cond", "uncond") if pipe.do_classifier_free_guidance else ("cond",)
        if cache is None:
            sizes = {name: len(adapter_of(expert).blocks(expert)) for name, expert in experts_of(pipe).items()}
            units = {name: [range(size)] for name, size in sizes.items()}
        else:
            units = {
                name: [range(unit.first, unit.last + 1) for unit in expert.units]
                for name, expert in cache.experts.items()
            }
        self.block_offload.begin_loop(uses_of_loop(steps, branches, units, cache and cache.plan(steps)))
