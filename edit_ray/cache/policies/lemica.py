"""LeMiCa: the steps whose longest-lasting reuse does least harm to the result, as a path through measured errors.

Source: H. Gao et al., "LeMiCa: Lexicographic Minimax Path Caching for Efficient Diffusion-Based Video Generation"
(arXiv 2511.00090, NeurIPS 2025).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import Field

from edit_ray.cache.policies.option_types import Errors, Whole, check_lengths, with_options
from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, register_policy


def edges_from(errors: Sequence[Sequence[float]], step: int) -> Iterator[tuple[int, float]]:
    """Each step that may compute next after `step`, and the error of reusing its residual in between."""
    if step + 1 < len(errors):
        yield step + 1, 0.0
    for reused, error in enumerate(errors[step], start=1):
        if step + reused + 1 < len(errors):
            yield step + reused + 1, error


def minimax_path(errors: Sequence[Sequence[float]], skips: int) -> list[int]:
    """The steps that compute, of a loop in which `skips` do not, or as many as there are errors for.

    `errors[i]` has the errors of reusing step i's residual in the next one, two, … steps. Of all paths from the first
    step to the last, the one whose largest error is least; of several such the one whose second largest is, and so on.
    """
    last = len(errors) - 1
    # By the latest computed step: the errors, largest first, and the path.
    best: dict[int, tuple[list[float], list[int]]] = {0: ([], [0])}
    found: list[list[int]] = []  # with 1, 2, … computed steps; empty where no path is so short
    while best:
        found.append(best[last][1] if last in best else [])
        longer: dict[int, tuple[list[float], list[int]]] = {}
        for step, (worst, path) in best.items():
            for following, error in edges_from(errors, step):
                candidate = sorted([*worst, error], reverse=True), [*path, following]
                longer[following] = min(longer.get(following, candidate), candidate)
        best = longer
    return next(path for path in found[max(0, last - max(0, skips)) :] if path)


@register_policy("lemica")
@with_options
class LeMiCa(CachePolicy):
    """Computes the steps of the best path through measured errors; `edit-ray calibrate --policy lemica` measures them.

    The first and the last step compute; both branches, all units and all experts do the same.
    """

    timestep_only = True

    reuse_error: Errors = Field(
        description="For each step of the loop the errors of the final latents when its residual is reused in the next "
        "one, two, … steps, and nowhere else; a row ends where reuse is not allowed."
    )
    skips: Whole | None = Field(
        default=None, description="How many steps are skipped, 0 for none; unless given, half of them."
    )

    def __post_init__(self) -> None:
        if self.skips is None:
            self.skips = len(self.reuse_error) // 2
        computed = set(minimax_path(self.reuse_error, self.skips))
        self.mask = [step in computed for step in range(len(self.reuse_error))]

    def check(self, num_steps: int) -> None:
        measured = ", so it has to be measured at the loop's number of steps"
        check_lengths("reuse_error", {"": self.reuse_error}, num_steps, measured)

    def most_skips(self, num_steps: int) -> int:
        return self.mask.count(False)

    def should_compute(self, ctx: PolicyContext) -> bool:
        return self.mask[ctx.step]
