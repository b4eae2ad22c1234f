"""The baseline: every step computes."""

from __future__ import annotations

from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, register_policy


@register_policy("always")
class Always(CachePolicy):
    """Never skips."""

    timestep_only = True

    def should_compute(self, ctx: PolicyContext) -> bool:
        """See `CachePolicy`."""
        return True
