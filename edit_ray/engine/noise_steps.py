"""The coefficients of a noise scheduler's steps, computed before the loop.

In every step diffusers' UniPC copies sigmas to the device, solves a small system there and waits for the device. All
of that depends on the schedule alone. Here the coefficients are computed once, on the device and with diffusers'
operations, and the loop keeps only what touches latents: the same bits.

Source: W. Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models" (2023),
in the form of diffusers' `UniPCMultistepScheduler`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """From one sigma of the schedule to the next, with a solver of some order; all on the device, in float32."""

    keep: Tensor  # [] factor of the sample
    drop: Tensor  # [] factor of the newest output
    gain: Tensor  # [] factor of the weighted differences
    ratios: tuple[Tensor, ...]  # [] one for each earlier output
    predict: Tensor | None  # [order - 1] weights of the differences
    correct: Tensor | None  # [order] the same and that of the output at the end; None where nothing is corrected

    def update(
        self, outputs: list[Any], sample: Tensor, weights: Tensor | None, output: Tensor | None = None
    ) -> Tensor:
        """The sample [B, C, T, h, w] at the end, from the one at the start; with the `output` there, corrected."""
        weights = None if weights is None else weights.to(sample.dtype)
        moved = self.keep * sample - self.drop * outputs[-1]
        added: Tensor | int = 0
        if self.ratios:
            assert weights is not None
            newest = outputs[-1]
            each = [(outputs[-2 - back] - newest) / ratio for back, ratio in enumerate(self.ratios)]
            added = torch.einsum("k,bkc...->bc...", weights[: len(each)], torch.stack(each, dim=1))
        if output is not None:
            assert weights is not None
            added = added + weights[-1] * (output - outputs[-1])
        result: Tensor = moved - self.gain * added
        return result.to(sample.dtype)


class UniPCPlan:
    """Replaces the two updates of a UniPC scheduler whose schedule is set.

    diffusers' own updates handle what the plan does not fit: another order, a changed schedule or changed options.
    """

    def __init__(self, scheduler: UniPCMultistepScheduler, device: torch.device) -> None:
        self.sigmas = scheduler.sigmas.clone()
        self.made_for = _made_for(scheduler, device)
        self._device = device
        config, steps = scheduler.config, len(scheduler.timesteps)
        sigmas = scheduler.sigmas.to(device)
        self._levels = [scheduler._sigma_to_alpha_sigma_t(sigmas[index]) for index in range(steps + 1)]
        self._intervals: dict[tuple[int, int], Interval] = {}
        for start in range(steps):
            order = min(config.solver_order, start + 1)
            if config.lower_order_final:
                order = min(order, steps - start)
            corrected = start < steps - 1 and start not in scheduler.disable_corrector
            self._intervals[start, order] = self._interval(scheduler, start, order, corrected)

    @contextmanager
    def installed(self, scheduler: UniPCMultistepScheduler) -> Iterator[None]:
        """Inside, the scheduler's steps take their coefficients from the plan."""
        predict, correct = scheduler.multistep_uni_p_bh_update, scheduler.multistep_uni_c_bh_update
        sigmas, version, steps = scheduler.sigmas, scheduler.sigmas._version, len(scheduler.timesteps)
        config, predict_x0 = scheduler.config, scheduler.predict_x0

        def interval_at(start: int, order: int, *samples: Tensor) -> Interval | None:
            """The planned interval if the scheduler is unchanged; compared without waiting for the device."""
            unchanged = (
                scheduler.sigmas is sigmas
                and sigmas._version == version
                and scheduler.config is config
                and scheduler.predict_x0 == predict_x0
                and len(scheduler.timesteps) == steps
                and all(sample.device == self._device for sample in samples)
            )
            return self._intervals.get((start, order)) if unchanged else None

        def predicted(model_output: Tensor, *args: Any, sample: Tensor, order: int, **kwargs: Any) -> Tensor:
            interval = interval_at(scheduler.step_index, order, sample)
            if interval is None:
                return predict(model_output, *args, sample=sample, order=order, **kwargs)  # type: ignore[no-any-return]
            return interval.update(scheduler.model_outputs, sample, interval.predict)

        def corrected(this_model_output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            last = kwargs["last_sample"]
            interval = interval_at(scheduler.step_index - 1, kwargs["order"], last, kwargs["this_sample"])
            if interval is None or interval.correct is None:
                return correct(this_model_output, *args, **kwargs)  # type: ignore[no-any-return]
            return interval.update(scheduler.model_outputs, last, interval.correct, this_model_output)

        scheduler.multistep_uni_p_bh_update, scheduler.multistep_uni_c_bh_update = predicted, corrected
        try:
            yield
        finally:
            del scheduler.multistep_uni_p_bh_update, scheduler.multistep_uni_c_bh_update

    def _interval(self, scheduler: UniPCMultistepScheduler, start: int, order: int, corrected: bool) -> Interval:
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self._levels[start : start + 2]
        log_snr = torch.log(alpha_s) - torch.log(sigma_s)
        h = torch.log(alpha_t) - torch.log(sigma_t) - log_snr
        ratios = []
        for back in range(1, order):
            alpha, sigma = self._levels[start - back]
            ratios.append((torch.log(alpha) - torch.log(sigma) - log_snr) / h)
        hh = -h if scheduler.predict_x0 else h
        grown = torch.expm1(hh)
        scale = hh if scheduler.config.solver_type == "bh1" else torch.expm1(hh)
        system, right = _system([*ratios, torch.ones((), device=self._device)], hh, grown, scale)
        half = torch.ones(1, device=self._device) * 0.5
        predict = half if order == 2 else torch.linalg.solve(system[:-1, :-1], right[:-1]) if order > 2 else None
        correct = None
        if corrected:
            correct = half if order == 1 else torch.linalg.solve(system, right)
        moved, rest = (alpha_t, sigma_t / sigma_s) if scheduler.predict_x0 else (sigma_t, alpha_t / alpha_s)
        return Interval(rest, moved * grown, moved * scale, tuple(ratios), predict, correct)


def _system(ratios: list[Tensor], hh: Tensor, grown: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix [order, order] and the right side [order] that the weights of the differences solve."""
    points = torch.stack(ratios)
    rows, right = [], []
    phi, factorial = grown / hh - 1, 1
    for power in range(len(ratios)):
        rows.append(torch.pow(points, power))
        right.append(phi * factorial / scale)
        factorial *= power + 2
        phi = phi / hh - 1 / factorial
    return torch.stack(rows), torch.stack(right)


def plan_noise_steps(scheduler: Any, device: torch.device, last: UniPCPlan | None = None) -> UniPCPlan | None:
    """The plan of a scheduler whose steps are set, `last` if that is the same; None for schedulers without a plan.

    These are subclasses, schedulers whose updates are replaced already, and those of the inference mode, whose changes
    in place cannot be seen. FlowMatchEuler needs none: its sigmas are on the device, and a step is one product.
    """
    if type(scheduler) is not UniPCMultistepScheduler or scheduler.solver_p is not None:
        return None
    replaced = {"multistep_uni_p_bh_update", "multistep_uni_c_bh_update"} & scheduler.__dict__.keys()
    if replaced or scheduler.sigmas.is_inference():
        return None
    same = last is not None and last.made_for == _made_for(scheduler, device)
    return last if last and same and torch.equal(last.sigmas, scheduler.sigmas) else UniPCPlan(scheduler, device)


def _made_for(scheduler: UniPCMultistepScheduler, device: torch.device) -> tuple[object, ...]:
    return repr(dict(scheduler.config)), scheduler.predict_x0, list(scheduler.disable_corrector), device
