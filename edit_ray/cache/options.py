"""The options of the cache."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, PlainValidator

from edit_ray.options import Options


def _granularity(value: object) -> str | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value in ("stack", "per_block"):
        return value
    raise ValueError("no granularity")


class CacheOptions(Options):
    """When residuals are reused: `none` computes every step of every segment.

    After a share `cfg_gate` of the steps "uncond" is not computed, but is "cond" minus their last difference. Further
    keys are the policy's own options, such as `rel_l1_thresh`.
    """

    model_config = ConfigDict(extra="allow")

    policy: str = Field(default="none", min_length=1, max_length=200)
    granularity: Annotated[str | int, PlainValidator(_granularity)] = Field(
        default="stack", json_schema_extra={"valid": "stack, per_block, or a whole number of blocks"}
    )
    target_speedup: float | None = Field(default=None, gt=1, le=100)
    cfg_gate: float | None = Field(default=None, ge=0, le=1)
    reuse_window: int = Field(default=0, ge=0, le=1000)

    @property
    def policy_options(self) -> dict[str, Any]:
        """The keys of this section that are not its own fields: keyword arguments of the policy."""
        return dict(self.model_extra or {})
