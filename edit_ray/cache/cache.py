"""`Cache`: asks a policy whether each unit computes at a step, stores residuals, and lets users see and edit both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from edit_ray.cache.blocks import BlockRunner, Expert, Unit, check_not_compiled
from edit_ray.cache.cfg_gate import CfgGate
from edit_ray.cache.known_mask import Mask, decide_ahead
from edit_ray.cache.loop_position import LoopStep, Position, StepCounter
from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, StepSignals, UnitState
from edit_ray.cache.records import Counts, Reason, Record
from edit_ray.cache.residuals import (
    Edit,
    ResidualIndex,
    StoredResidual,
    UnitHook,
    UnitId,
    UnitResiduals,
    ask_hooks,
    with_edits,
)
from edit_ray.cache.stores.base import CacheStore
from edit_ray.tiers.reuse_plan import Key

BRANCHES = ("cond", "uncond")


class _Forward(threading.local):
    """The current forward of a thread: the branches of one step may be computed in two threads."""

    position: Position | None = None
    runner: BlockRunner | None = None
    edits: Sequence[Edit] = ()  # by the hooks of the current unit


class Cache:
    """The cache of a pipeline, `pipe.cache`, also returned by `enable_cache`: see, steer and edit it while it runs.

    One call of the pipeline is one generation; only stored residuals outlive it. Not thread-safe.
    """

    def __init__(
        self,
        policy: CachePolicy,
        *,
        num_inference_steps: int,
        store: CacheStore,
        history_len: int,
        schedule: Callable[[], Sequence[LoopStep]] | None = None,
        cfg_gate: CfgGate | None = None,
    ) -> None:
        self.policy = policy
        self.cfg_gate = cfg_gate
        self.num_steps = num_inference_steps
        self.record = Record(num_inference_steps, 0)
        self.experts: dict[str, Expert] = {}
        self.on_remove: list[Callable[[], None]] = []
        self._index = ResidualIndex(store, history_len)
        self._schedule = schedule
        self._hooks: list[UnitHook] = []
        self._states: dict[UnitId, UnitState] = {}
        self._mask: Mask = {}
        self._here = _Forward()
        self._counter = StepCounter()
        self._in_call = False
        self._latest: list[tuple[str, str, int]] = []  # (expert, branch, step) of the forwards of the latest step

    def __repr__(self) -> str:
        units = ", ".join(f"{name}: {len(expert.units)}" for name, expert in self.experts.items()) or "none"
        skipped = ", ".join(f"{branch} {c.skipped} of {c.skipped + c.computed}" for branch, c in self.stats.items())
        return (
            f"<Cache policy={type(self.policy).__name__} num_steps={self.num_steps} units=({units}) "
            f"store={type(self.store).__name__} skipped=({skipped or 'no call yet'})>"
        )

    @property
    def store(self) -> CacheStore:
        """The store of the residuals."""
        return self._index.store

    @property
    def history_len(self) -> int:
        """The number of latest residuals that each unit keeps."""
        return self._index.history_len

    @property
    def stats(self) -> dict[str, Counts]:
        """Per branch, for the latest call: units computed, units skipped, bytes of residuals put and not dropped."""
        stored = self._index.bytes_by_branch()
        counts = {str(branch): count for (branch,), count in self.record.counts("branch").items()}
        for branch, count in counts.items():
            count.bytes = stored.get(branch, 0)
        return counts

    def unit_stats(self) -> dict[tuple[str, str, int], Counts]:
        """As `stats`, but per (expert, branch, unit) and with `bytes` 0."""
        counts = self.record.counts("expert", "branch", "unit")
        return {(str(expert), str(branch), int(unit)): count for (expert, branch, unit), count in counts.items()}

    def entries(self) -> list[StoredResidual]:
        """Every stored residual: key, tier, shape, bytes."""
        return self._index.entries()

    def plan(self, steps: Sequence[LoopStep] | None = None) -> dict[UnitId, tuple[bool | None, ...]] | None:
        """Per (expert, branch, unit) the mask of a loop, True where it will compute, None where another expert runs.

        Where the CFG gate leaves "uncond" out, it is False. None for a policy that depends on values of the loop.
        `steps` are the pipeline's own unless given.
        """
        if not self.policy.timestep_only:
            return None
        if steps is None:
            if self._schedule is None:
                raise ValueError("plan() needs the steps of the loop: this cache was not enabled by a pipeline.")
            steps = self._schedule()
        made = self._make_mask(steps, BRANCHES)
        return {unit: tuple(None if d is None else d.compute for d in decisions) for unit, decisions in made.items()}

    def on_unit(self, hook: UnitHook) -> Callable[[], None]:
        """Call `hook(ctx)` before each unit, at every step, branch and expert; returns a function that removes it.

        `ctx.decision` is the decision so far. The hook may answer "compute" or "reuse"; a tensor [B, N, D] of the dtype
        of `ctx.hidden`, added to the unit's input in place of what it would have computed; a function that receives
        the unit's residual [B, N, D], computed or reused, and returns what is added instead; or None, to change
        nothing. The function may change its argument in place: it is a copy. Stored residuals are never edited, so an
        edit acts only on its own step. A hook that raises, or returns anything else, ends the call and removes the
        cache.
        """
        self._hooks.append(hook)
        return lambda: self._hooks.remove(hook)

    def set_generation(self, generation: int) -> None:
        """Set the number under which the next call stores residuals, such as a segment's."""
        if isinstance(generation, bool) or not isinstance(generation, int) or generation < 0:
            raise ValueError(f"generation is {generation!r}; it must be a whole number from 0.")
        self._index.generation = generation

    def use_store(self, store: CacheStore, stored: Iterable[Key] = ()) -> None:
        """Use another store from the next call on, in which earlier generations have `stored` residuals."""
        self._index.adopt(store, stored)

    def set_reuse_window(self, generations: Iterable[int]) -> None:
        """Set the earlier generations whose residuals the next call may read; still earlier ones are dropped."""
        self._index.set_window(generations)

    def reset(self, clear_store: bool = True) -> None:
        """Forget the last call; with `clear_store` also drop every residual that this cache has stored."""
        self._states.clear()
        self._mask.clear()
        self._latest.clear()
        if self.cfg_gate is not None:
            self.cfg_gate.reset()
        self.record = Record(self.num_steps, max((len(e.units) for e in self.experts.values()), default=0))
        if clear_store:
            self._index.clear()

    def drop_residuals(self) -> None:
        """Drop every residual that this cache has stored, also within a call, whose next skips then compute."""
        self._index.clear()

    def prefetch_reuse(self) -> None:
        """Prefetch the residuals that the next call may read from the reuse window, in the order of use."""
        self._index.store.prefetch(self._index.window_keys(self.policy.keeps))

    def remove(self) -> None:
        """Take the cache off every transformer, and restore them."""
        self.reset()
        while self.on_remove:
            self.on_remove.pop()()
        self.experts.clear()

    # Called by the loop and the transformers.

    @contextmanager
    def call(
        self, steps: Sequence[LoopStep], *, branches: Sequence[str] = BRANCHES, clear_store: bool = True
    ) -> Iterator[None]:
        """Surround one denoising loop. `clear_store` drops earlier residuals first; a failed loop's own are dropped.

        Raises:
            ValueError: the policy cannot serve this number of steps.
            RuntimeError: no forward of the loop went through the cache.
        """
        self._follow(len(steps))
        self._begin(clear_store)
        self._in_call = True
        try:
            with self._guarded():
                self._mask = self._make_mask(steps, branches) if self.policy.timestep_only else {}
            yield
            self.record.put_in_order()
            self._latest.clear()
            if not self.record:
                raise RuntimeError(
                    "The cache was never asked in a whole loop: the transformers that it is on were not called. "
                    "Disable it before changing the pipeline's transformers, and enable it again."
                )
        except BaseException:
            self._begin(clear_store)
            raise
        finally:
            self._in_call = False
            if self.cfg_gate is not None:
                self.cfg_gate.reset()
            self._here.position = self._here.runner = None

    @contextmanager
    def context(self, branch: str, step_index: int | None, total: int | None, sigma: float | None) -> Iterator[None]:
        """A forward's `cache_context`; without a step it is counted. Raises ValueError for a step beyond the loop."""
        if total is not None and self._in_call and total != self.num_steps:
            raise ValueError(f"cache_context({branch!r}) says {total} steps, in a loop of {self.num_steps}.")
        self._follow(self.num_steps if total is None else total)
        if step_index is not None and not 0 <= step_index < self.num_steps:
            raise ValueError(
                f"cache_context({branch!r}) says step_index {step_index}; the cache expects 0 to {self.num_steps - 1}."
            )
        self._here.position = Position(branch, step_index, sigma)
        try:
            yield
        finally:
            self._here.position = None

    def forward(self, expert: Expert, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One forward of a transformer, inside its `cache_context`."""
        if self._here.position is None:
            raise ValueError(
                f"{type(expert.transformer).__name__} has a cache and was called outside of a cache_context: branch "
                "and step are not known. Use a pipeline that sets it, or disable the cache."
            )
        check_not_compiled(expert.transformer)
        position, self._here.runner = self._here.position, None
        latents, timestep = expert.adapter.inputs(args, kwargs)
        step = position.step
        if step is None:
            step = self._counter.step(position.branch, float(timestep.max()), self.num_steps)
        self._account(where := (expert.name, position.branch, step))
        gate = self.cfg_gate
        if gate is not None and (stand_in := gate.stand_in(*where, self.num_steps)) is not None:
            self.record.note_gated(*where, len(expert.units))
            return stand_in
        signals = expert.signals(timestep, latents, position.sigma)

        def context(unit: Unit) -> PolicyContext:
            return self._make_context(expert, position.branch, unit, step, signals)

        runner = self._here.runner = BlockRunner(self, expert.adapter, expert.units, context)
        try:
            output = run(*args, **kwargs)
            if self.experts:  # else an error in the other branch's thread has removed it meanwhile
                runner.check_complete(expert.units, expert.name)
            if gate is not None:
                gate.saw(*where, output)
            return output
        finally:
            self._here.runner = None

    def block(self, position: int, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of a block; outside a forward it runs as without a cache."""
        runner = self._here.runner
        return run(*args, **kwargs) if runner is None else runner.block(position, run, args, kwargs)

    def control(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of a control block, whose results a skipped stack does not need."""
        runner = self._here.runner
        return run(*args, **kwargs) if runner is None else runner.control(run, args, kwargs)

    def decide(self, ctx: PolicyContext, *, can_skip: bool) -> Tensor | None:
        """The unit's output if it is skipped, else None."""
        with self._guarded():
            compute, reason = self._policy_says(ctx)
            answers = ask_hooks(self._hooks, ctx, compute)
            self._here.edits = answers.edits
            if answers.compute is not None:
                compute, reason = answers.compute, "hook"
            output = self._stand_in(ctx, answers.replaced) if can_skip and not compute else None
        if output is None and not compute:
            reason = "missing" if can_skip else "probe"
        self.record.note(ctx, "compute" if output is None else "reuse", reason)
        return output

    def computed(self, ctx: PolicyContext, output: Tensor, between: Tensor | None) -> Tensor:
        """Store a computed unit's residual; returns the unit's output, as hooks edit it."""
        assert ctx.base is not None
        residual = output - ctx.base if between is None else output - ctx.base - between
        with self._guarded():
            output = with_edits(output, residual, self._here.edits)
            ctx.residual = residual = residual.detach()
            ctx.state.computed_steps.append(ctx.step)
            self._index.put(ctx.state, ctx.step, residual, self.policy.keeps, ctx.residuals.layout)
            if not self.policy.timestep_only:
                self.policy.on_computed(ctx)
        return output

    def _policy_says(self, ctx: PolicyContext) -> tuple[bool, Reason]:
        planned = self._mask.get((ctx.expert, ctx.branch, ctx.unit_index))
        cell = planned[ctx.step] if planned else None
        if cell is None:
            return bool(self.policy.should_compute(ctx)), "policy"
        ctx.signal, ctx.accumulated, ctx.threshold = cell.signal, cell.accumulated, cell.threshold
        return cell.compute, "plan"

    def _stand_in(self, ctx: PolicyContext, replaced: Tensor | None) -> Tensor | None:
        assert ctx.base is not None
        output = self.policy.reconstruct(ctx) if replaced is None else ctx.base + replaced
        if output is None or not self._here.edits:
            return output
        return with_edits(output, output - ctx.base, self._here.edits)

    def _make_context(self, expert: Expert, branch: str, unit: Unit, step: int, signals: StepSignals) -> PolicyContext:
        unit_id = (expert.name, branch, unit.index)
        if unit_id not in self._states:
            state = self._states[unit_id] = UnitState(*unit_id)
            with self._guarded():
                self.policy.reset(state)
        latents = signals.latents
        return PolicyContext(
            step=step,
            num_steps=self.num_steps,
            branch=branch,
            expert=expert.name,
            unit_index=unit.index,
            num_units=len(expert.units),
            state=self._states[unit_id],
            signals=signals,
            residuals=UnitResiduals(
                self._index,
                unit_id,
                None if latents is None else latents.device,
                None if latents is None else (latents.shape, latents.dtype),
            ),
        )

    def _make_mask(self, steps: Sequence[LoopStep], branches: Sequence[str]) -> Mask:
        """Ask the policy for every unit at every step ahead of the loop, on separate states."""
        self.policy.check(len(steps))
        before, self._states, self.num_steps = (self._states, self.num_steps), {}, len(steps)
        try:
            return decide_ahead(self.policy, self.experts, steps, branches, self.cfg_gate, self._make_context)
        finally:
            self._states, self.num_steps = before

    def _follow(self, num_steps: int) -> None:
        """Serve loops of this length from now on; residuals of a loop of another length fit none of its steps."""
        self.policy.check(num_steps)
        if num_steps != self.num_steps:
            self.num_steps = num_steps
            self._begin(clear_store=True)

    def _begin(self, clear_store: bool) -> None:
        """Forget everything except the stored residuals of other generations."""
        self.reset(clear_store)
        self._index.forget(self._index.generation)

    def _account(self, this: tuple[str, str, int]) -> None:
        """Outside of `call`, a new call begins where a step does not continue the steps before it."""
        if self._in_call:
            return
        step = this[2]
        last = self._latest[-1][2] if self._latest else None
        if last is None or this in self._latest or step not in (last, last + 1):
            self._begin(clear_store=False)
        if self._latest and self._latest[-1][2] != step:
            self._latest.clear()
        self._latest.append(this)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Run code of a policy, a hook or a store: if it fails, the model stays usable and is uncached."""
        try:
            yield
        except Exception as error:
            self.remove()
            error.add_note("edit_ray has removed the cache whose policy, hook or store failed: the model is uncached.")
            raise
