"""The coefficients of a noise scheduler's steps, computed before the loop.

diffusers' UniPC copies sigmas to the device and solves a small system there in every step, and waits for the device
each time; all of it depends on the schedule alone. Here the coefficients are made once, on the device and with the
operations that diffusers makes them with, and only what touches latents is left in the loop: the same bits.

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
    gain: Tensor  # [] factor of what the differences of outputs add
    ratios: tuple[Tensor, ...]  # [] one for each earlier output
    predict: Tensor | None  # [order - 1] weights of the differences
    correct: Tensor | None  # [order] the same and that of the output at the end; None where nothing is corrected


class UniPCPlan:
    """Stands in for the two updates of a UniPC scheduler whose schedule is set.

    What does not fit what it was made for (another order, a schedule or options that were changed) goes to diffusers'
    own updates.
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
        """The scheduler's steps in here take the coefficients from the plan."""
        predict, correct = scheduler.multistep_uni_p_bh_update, scheduler.multistep_uni_c_bh_update
        fits = _Fits(scheduler, self._device)

        def predicted(model_output: Tensor, *args: Any, sample: Tensor, order: int, **kwargs: Any) -> Tensor:
            interval = self._intervals.get((scheduler.step_index, order)) if fits(sample) else None
            if interval is None:
                return predict(model_output, *args, sample=sample, order=order, **kwargs)  # type: ignore[no-any-return]
            return _predict(interval, scheduler.model_outputs, sample)

        def corrected(
            this_model_output: Tensor,
            *args: Any,
            last_sample: Tensor,
            this_sample: Tensor,
            order: int,
            **kwargs: Any,
        ) -> Tensor:
            interval = self._intervals.get((scheduler.step_index - 1, order)) if fits(this_sample) else None
            if interval is None or interval.correct is None or last_sample.device != self._device:
                return correct(  # type: ignore[no-any-return]
                    this_model_output, *args, last_sample=last_sample, this_sample=this_sample, order=order, **kwargs
                )
            return _correct(interval, scheduler.model_outputs, this_model_output, last_sample)

        scheduler.multistep_uni_p_bh_update, scheduler.multistep_uni_c_bh_update = predicted, corrected
        try:
            yield
        finally:
            del scheduler.multistep_uni_p_bh_update, scheduler.multistep_uni_c_bh_update

    def _interval(self, scheduler: UniPCMultistepScheduler, start: int, order: int, corrected: bool) -> Interval:
        alpha_t, sigma_t = self._levels[start + 1]
        alpha_s, sigma_s = self._levels[start]
        log_snr = torch.log(alpha_s) - torch.log(sigma_s)
        h = torch.log(alpha_t) - torch.log(sigma_t) - log_snr
        ratios = []
        for back in range(1, order):
            alpha, sigma = self._levels[start - back]
            ratios.append((torch.log(alpha) - torch.log(sigma) - log_snr) / h)
        hh = -h if scheduler.predict_x0 else h
        grown = torch.expm1(hh)
        scale = hh if scheduler.config.solver_type == "bh1" else torch.expm1(hh)
        system, right = _system([*ratios, torch.ones((), device=self._device)], hh, grown, scale, order)
        half = torch.ones(1, device=self._device) * 0.5
        predict = half if order == 2 else torch.linalg.solve(system[:-1, :-1], right[:-1]) if order > 2 else None
        correct = None
        if corrected:
            correct = half if order == 1 else torch.linalg.solve(system, right)
        moved, rest = (alpha_t, sigma_t / sigma_s) if scheduler.predict_x0 else (sigma_t, alpha_t / alpha_s)
        return Interval(rest, moved * grown, moved * scale, tuple(ratios), predict, correct)


def _system(ratios: list[Tensor], hh: Tensor, grown: Tensor, scale: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """The matrix [order, order] and the right side [order] that the weights of the differences solve."""
    points = torch.stack(ratios)
    rows, right = [], []
    phi, factorial = grown / hh - 1, 1
    for power in range(order):
        rows.append(torch.pow(points, power))
        right.append(phi * factorial / scale)
        factorial *= power + 2
        phi = phi / hh - 1 / factorial
    return torch.stack(rows), torch.stack(right)


def _differences(interval: Interval, outputs: list[Any]) -> Tensor:
    """[B, order - 1, C, T, h, w]"""
    newest = outputs[-1]
    each = [(outputs[-2 - back] - newest) / ratio for back, ratio in enumerate(interval.ratios)]
    return torch.stack(each, dim=1)


def _predict(interval: Interval, outputs: list[Any], sample: Tensor) -> Tensor:
    moved = interval.keep * sample - interval.drop * outputs[-1]
    added: Tensor | int = 0
    if interval.ratios:
        assert interval.predict is not None
        differences = _differences(interval, outputs)
        added = torch.einsum("k,bkc...->bc...", interval.predict.to(sample.dtype), differences)
    result: Tensor = moved - interval.gain * added
    return result.to(sample.dtype)


def _correct(interval: Interval, outputs: list[Any], output: Tensor, last_sample: Tensor) -> Tensor:
    assert interval.correct is not None
    weights = interval.correct.to(last_sample.dtype)
    moved = interval.keep * last_sample - interval.drop * outputs[-1]
    added: Tensor | int = 0
    if interval.ratios:
        added = torch.einsum("k,bkc...->bc...", weights[:-1], _differences(interval, outputs))
    result: Tensor = moved - interval.gain * (added + weights[-1] * (output - outputs[-1]))
    return result.to(last_sample.dtype)


class _Fits:
    """Whether a scheduler is still what its plan was made for, without a look at the device."""

    def __init__(self, scheduler: UniPCMultistepScheduler, device: torch.device) -> None:
        self._scheduler, self._device = scheduler, device
        self._sigmas, self._version = scheduler.sigmas, scheduler.sigmas._version
        self._steps = len(scheduler.timesteps)
        self._config, self._predict_x0 = scheduler.config, scheduler.predict_x0

    def __call__(self, sample: Tensor) -> bool:
        scheduler = self._scheduler
        return (
            scheduler.sigmas is self._sigmas
            and self._sigmas._version == self._version
            and scheduler.config is self._config
            and scheduler.predict_x0 == self._predict_x0
            and len(scheduler.timesteps) == self._steps
            and sample.device == self._device
        )


def plan_noise_steps(scheduler: Any, device: torch.device, last: UniPCPlan | None = None) -> UniPCPlan | None:
    """The plan of a scheduler whose steps are set, `last` if that is the same; None for those that have no plan.

    A subclass, or one whose updates someone has replaced, has none. FlowMatchEuler needs none: one product a step, with
    sigmas that are on the device.
    """
    if type(scheduler) is not UniPCMultistepScheduler or scheduler.solver_p is not None:
        return None
    if scheduler.sigmas.is_inference():  # whether it is changed in place cannot be seen
        return None
    if {"multistep_uni_p_bh_update", "multistep_uni_c_bh_update"} & scheduler.__dict__.keys():
        return None
    same = last is not None and last.made_for == _made_for(scheduler, device)
    if last is not None and same and torch.equal(last.sigmas, scheduler.sigmas):
        return last
    return UniPCPlan(scheduler, device)


def _made_for(scheduler: UniPCMultistepScheduler, device: torch.device) -> tuple[object, ...]:
    return repr(dict(scheduler.config)), scheduler.predict_x0, list(scheduler.disable_corrector), device
