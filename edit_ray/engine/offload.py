"""Transformer blocks whose weights are in host memory, and on the device while they are needed.

A loop uses every block in every forward or, with a known mask, those that compute; what a mask skips is not copied.
`DeviceSlots` plans the copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edit_ray.cache.adapters import adapter_of
from edit_ray.cache.device_slots import AHEAD, CopyStream, DeviceSlots, HostMemory, Item
from edit_ray.cache.loop_position import LoopStep
from edit_ray.engine.caching import experts_of, loop_steps
from edit_ray.engine.cfg_parallel import check_device

ALIGNMENT = 256  # bytes, of each tensor in a block's memory


def uses_of_loop(
    steps: Sequence[LoopStep],
    branches: Sequence[str],
    units: Mapping[str, Sequence[range]],
    mask: Mapping[tuple[str, str, int], Sequence[bool | None]] | None,
) -> list[Item]:
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
    """A block's weights in one piece of `HostMemory`.

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
        self._host = HostMemory(size, device)
        self.memory = self._host.bytes
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
        self._blocks: dict[Item, HostBlock] = {}
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
        for name, stack in stacks.items():
            for position, block in enumerate(stack):
                self._blocks[name, position] = HostBlock(block, device)
                self._hooks += [
                    block.register_forward_pre_hook(self._before(name, position)),
                    block.register_forward_hook(self._after(name, position), always_call=True),
                ]
        self._copies = CopyStream(device)
        self._loads = DeviceSlots(list(self._blocks), slots, self._copies, self._load)

    def begin_loop(self, uses: Sequence[Item]) -> None:
        """Plan for the blocks that the next loop uses, and begin the first copies."""
        self._loads.begin_loop(uses)

    def remove(self) -> None:
        """Leave all weights in host memory, as any model's."""
        self._copies.synchronise()
        for hook in self._hooks:
            hook.remove()
        self._blocks.clear()
        self._slots.clear()
        for transformer in self._transformers.values():
            transformer.to("cpu")

    def _load(self, item: Item, slot: int) -> None:
        source = self._blocks[item].memory
        self._slots[slot][: len(source)].copy_(source, non_blocking=True)
        self.copied_bytes += source.nbytes

    def _before(self, expert: str, position: int) -> Any:
        def before(block: nn.Module, args: Any) -> None:
            slot = self._loads.acquire((expert, position))
            self._blocks[expert, position].use(self._slots[slot])

        return before

    def _after(self, expert: str, position: int) -> Any:
        def after(block: nn.Module, args: Any, output: Any) -> None:
            home = self._blocks[expert, position]
            home.use(home.memory)
            self._loads.release()

        return after


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
