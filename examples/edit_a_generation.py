"""Editing at run time: copies the first steps of one prompt's generation into another's.

    python examples/edit_a_generation.py

A hook at every unit records the residuals of one generation and returns them in another. Early steps decide the layout,
later ones the appearance.
"""

from collections.abc import Callable

import torch
from diffusers.utils import export_to_video
from torch import Tensor

from edit_ray import EditWanPipeline
from edit_ray.cache import PolicyContext

STEPS, TRANSPLANTED = 20, 5
DONOR, RECIPIENT = (f"{what} bouncing on a black background" for what in ("a yellow ring", "a red square"))


def main() -> None:
    pipe = EditWanPipeline.from_pretrained("builtin:tiny_wan")
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_cache("always", num_inference_steps=STEPS)  # edited, and nothing skipped
    remembered: dict[tuple[int, str], Tensor] = {}

    def generate(prompt: str, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        size = {"height": 128, "width": 128, "num_frames": 33, "num_inference_steps": STEPS}
        return torch.as_tensor(pipe(prompt, generator=generator, **size)[0])

    def remember(ctx: PolicyContext) -> Callable[[Tensor], Tensor]:
        def keep(residual: Tensor) -> Tensor:
            remembered[ctx.step, ctx.branch] = residual.clone()
            return residual

        return keep

    def transplant(ctx: PolicyContext) -> Tensor | None:
        return remembered[ctx.step, ctx.branch] if ctx.step < TRANSPLANTED else None

    remove = pipe.cache.on_unit(remember)
    donor = generate(DONOR, seed=5)
    remove()
    recipient = generate(RECIPIENT, seed=6)
    remove = pipe.cache.on_unit(transplant)
    edited = generate(RECIPIENT, seed=6)
    remove()
    print(f"{pipe.cache.stats['cond'].skipped} of {STEPS} forwards came from the other generation")
    for name, other in (("donor", donor), ("recipient", recipient)):
        print(f"mean difference of the edited video from the {name}'s: {(edited - other).abs().mean():.4f}")
    side_by_side = torch.cat([donor, recipient, edited], dim=2)
    print(export_to_video(side_by_side.numpy(), "edit_a_generation.mp4", fps=16))


if __name__ == "__main__":
    main()
