"""The base of every options section: frozen, strict about names, so that a typo never becomes a default."""

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """A frozen section of a configuration: each layer has its own, `edit_ray.config` composes them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), strict=True)
