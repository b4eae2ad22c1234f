"""The training loop of all stages: a budget of minutes, AdamW, averaged weights, saved state, one or more GPUs."""

import math
import os
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.muon import Muon, MuonAndAdamW
from training.recipe import FIRST_TRAINING_SEED, Recipe
from training.step_graph import StepGraphs


def mixed_precision(device: str) -> torch.autocast:
    """bfloat16 arithmetic on a GPU; none on a CPU, where it is emulated."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


@dataclass(frozen=True)
class Ranks:
    """The processes of one training, as torchrun started them; one when it did not."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def start(cls, device: str) -> "Ranks":
        """Join the other processes."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls()
        rank = int(os.environ["RANK"])
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        return cls(rank, world_size)

    def average(self, gradient: Tensor) -> None:
        """Average a gradient over the processes."""
        if self.world_size > 1:
            dist.all_reduce(gradient)
            gradient /= self.world_size

    def agree(self, value: float, device: torch.device) -> float:
        """The first process's value, so that all take the same decisions."""
        if self.world_size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=device)
        dist.broadcast(shared, 0)
        return shared.item()

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.world_size > 1:
            dist.barrier()


@dataclass(frozen=True)
class Call:
    """What a call of any stage is told: it trains for `minutes` in all, at most `slice_minutes` of them now.

    With an `end`, in seconds since the epoch, the minutes are fewer where training would last longer. The model lies in
    the folder `output`, what a later call goes on from in `state`.
    """

    output: Path
    state: Path
    recipe: Recipe
    minutes: float
    slice_minutes: float = math.inf
    device: str = "cpu"
    ranks: Ranks = Ranks()
    end: float = math.inf


class Loop:
    """Trains `modules` as its call says, over as many calls as it takes.

    State lies in `state / f"{name}.pt"`: weights, averaged weights, moments, step and seconds; a new loop of the same
    name goes on from there.
    Muon moves `matrices`, some of the modules' parameters, and AdamW the others.
    """

    def __init__(
        self,
        name: str,
        modules: dict[str, nn.Module],
        call: Call,
        learning_rate: float,
        matrices: list[Tensor] | None = None,
    ) -> None:
        self.name, self.modules, self.recipe, self.ranks, self.end = name, modules, call.recipe, call.ranks, call.end
        self.budget_s, self.slice_s, self.path = call.minutes * 60, call.slice_minutes * 60, call.state / f"{name}.pt"
        self.learning_rate = learning_rate
        self.parameters: list[Tensor] = [parameter for module in modules.values() for parameter in module.parameters()]
        self.device = self.parameters[0].device
        self.trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        sizes = [parameter.numel() for parameter in self.trained]
        # All gradients in one piece: one message between processes, one norm, and addresses that stay.
        self.gradient = torch.zeros(sum(sizes), device=self.device)
        parts = zip(self.gradient.split(sizes), self.trained, strict=True)
        self.gradients = [part.view_as(parameter) for part, parameter in parts]
        for parameter, gradient in zip(self.trained, self.gradients, strict=True):
            parameter.grad = gradient
        # What changes from step to step, where a captured graph reads it.
        self.value, self.rate, self.share = torch.zeros(3, device=self.device).unbind()
        self.optimizer = self._optimizer(matrices or [])
        self.averaged = [parameter.detach().clone() for parameter in self.parameters]
        self.step, self.seconds = 0, 0.0
        self.begun = 0  # the step from which the moments are
        if self.path.exists():
            self._resume()
        elif self.ranks.world_size > 1:
            for parameter, average in zip(self.parameters, self.averaged, strict=True):
                dist.broadcast(parameter.data, 0)
                average.copy_(parameter.data)

    def _optimizer(self, matrices: list[Tensor]) -> torch.optim.Optimizer | MuonAndAdamW:
        on_gpu = self.device.type == "cuda"
        chosen = {id(matrix) for matrix in matrices}
        others = [parameter for parameter in self.parameters if id(parameter) not in chosen]
        adamw = torch.optim.AdamW(
            others, lr=self.rate, betas=(0.9, 0.99), weight_decay=0.0, fused=on_gpu, capturable=on_gpu
        )
        return MuonAndAdamW(Muon(matrices, self.rate), adamw) if matrices else adamw

    @property
    def seed(self) -> int:
        """Of what is drawn from here on: another one in each process and after each resumption."""
        return FIRST_TRAINING_SEED + self.step * self.ranks.world_size + self.ranks.rank

    def run(
        self,
        loss: Callable[[int, float], Tensor],
        kind: Callable[[int], Hashable] | None = None,
        before: Callable[[int], None] | None = None,
    ) -> None:
        """Train until the budget or the slice is spent, then save and leave the averaged weights in the modules.

        Args:
            loss: Of a step and of progress, which rises from 0 to 1, a scalar.
            kind: Of a step what tells its work from other steps' work, as `StepGraphs` has it: then that work may
                become a graph, and what `loss` is told means nothing.
            before: What to do before each step.
        """
        started, since_save, spent_before = time.monotonic(), time.monotonic(), self.seconds
        self.budget_s = self.ranks.agree(min(self.budget_s, spent_before + self.end - time.time()), self.device)
        graphs = StepGraphs(self.device, self.recipe.graphs and kind is not None)
        total, count, since_log = torch.zeros((), device=self.device), 0, time.monotonic()
        while True:
            if self.step % self.recipe.agree_every_steps == 0:
                self._synchronise()
                elapsed = spent_before + time.monotonic() - started
                self.seconds = self.ranks.agree(elapsed, self.device)
            progress = self.seconds / self.budget_s if self.budget_s > 0 else 1.0
            if progress >= 1 or self.seconds - spent_before >= self.slice_s:
                break
            if before:
                before(self.step)
            graphs(kind and kind(self.step), lambda: self._differentiate(loss, progress))  # noqa: B023
            total, count = total + self.value, count + 1
            self._update(progress, graphs)
            if self.step % self.recipe.log_every_steps == 0 and self.ranks.rank == 0:
                rate = count / (time.monotonic() - since_log)
                print(
                    f"{self.name} step {self.step} progress {progress:.3f} loss {total.item() / count:.5f} {rate:.2f}/s"
                )
                total, count, since_log = torch.zeros_like(total), 0, time.monotonic()
            if time.monotonic() - since_save > self.recipe.save_every_s:
                self.save()
                since_save = time.monotonic()
        self.save()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.averaged)

    def _differentiate(self, loss: Callable[[int, float], Tensor], progress: float) -> None:
        value = loss(self.step, progress)
        gradients = torch.autograd.grad(value, self.trained, materialize_grads=True)
        torch._foreach_copy_(self.gradients, gradients)
        self.value.copy_(value.detach())

    def _update(self, progress: float, graphs: StepGraphs) -> None:
        self.ranks.average(self.gradient)
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        warm = min(1.0, (self.step - self.begun + 1) / self.recipe.warmup_steps)
        self.rate.fill_(self.learning_rate * cosine * warm)
        self.step += 1
        self.share.fill_(1 - min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step)))
        graphs("update", self._move)

    @torch.no_grad()
    def _move(self) -> None:
        self.gradient.mul_((1 / (self.gradient.norm() + 1e-6)).clamp(max=1))
        self.optimizer.step()
        apart = torch._foreach_sub(self.parameters, self.averaged)
        torch._foreach_mul_(apart, self.share)
        torch._foreach_add_(self.averaged, apart)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def save(self) -> None:
        """Write the state, and beside it the compact one; a crash while writing leaves those before."""
        if self.ranks.rank:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "averaged": self.averaged,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        self._write(content, self.path)
        self._write_compact(self.path.with_suffix(".compact.pt"))

    def compact(self) -> None:
        """Replace the state by the averaged weights in fp16 alone, an eighth of its size, for a later machine."""
        if self.ranks.rank == 0:
            self._write_compact(self.path)
            self.path.with_suffix(".compact.pt").unlink(missing_ok=True)

    def _write_compact(self, path: Path) -> None:
        averaged = [average.half() for average in self.averaged]
        self._write({"averaged": averaged, "step": self.step, "seconds": self.seconds}, path)

    def _write(self, content: dict[str, object], path: Path) -> None:
        unfinished = path.with_suffix(".part")
        torch.save(content, unfinished)
        unfinished.replace(path)

    def _resume(self) -> None:
        content = torch.load(self.path, map_location=self.device, weights_only=True)
        for average, saved in zip(self.averaged, content["averaged"], strict=True):
            average.copy_(saved)
        if "optimizer" in content:
            for name, module in self.modules.items():
                module.load_state_dict(content["modules"][name])
            self.optimizer.load_state_dict(content["optimizer"])
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate
        else:  # a compact state: the averaged weights are a good start, and the moments begin anew
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.averaged)
            self.begun = content["step"]
        self.step, self.seconds = content["step"], content["seconds"]
