"""A custom cache policy: it computes often at first, and then less and less often.

    python examples/custom_policy.py

Jobs use it as `cache: {policy: slowing_down}` if an installed package has the class and declares

    [project.entry-points."edit_ray.policies"]
    slowing_down = "my_package:SlowingDown"
"""

import torch

from edit_ray import EditWanPipeline
from edit_ray.cache import CachePolicy, PolicyContext, register_policy


@register_policy("slowing_down")
class SlowingDown(CachePolicy):
    """Skips `steps_between` steps more at each step that it computes, `most` at most."""

    timestep_only = True  # it looks at no tensor, so that all its decisions are known before the loop

    def __init__(self, *, steps_between: float = 0.5, most: int = 3) -> None:
        self.steps_between, self.most = steps_between, most

    def should_compute(self, ctx: PolicyContext) -> bool:
        computed = ctx.state.computed_steps
        if not computed or ctx.step == ctx.num_steps - 1:
            return True
        skips = min(self.most, int(self.steps_between * len(computed)))
        return ctx.step - computed[-1] > skips


def main() -> None:
    steps = 20
    pipe = EditWanPipeline.from_pretrained("builtin:tiny_wan")
    pipe.set_progress_bar_config(disable=True)
    for most in (0, 1, 3):
        cache = pipe.enable_cache("slowing_down", num_inference_steps=steps, most=most)
        mask = cache.plan()["transformer", "cond", 0]
        print(f"most={most}  {''.join('■' if computed else '·' for computed in mask)}", end="  ", flush=True)
        pipe(
            "a red circle bouncing on a black background",
            height=128,
            width=128,
            num_frames=33,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(3),
        )
        print(cache.stats["cond"])
        assert cache.record.mask() == list(mask)
        pipe.disable_cache()


if __name__ == "__main__":
    main()
