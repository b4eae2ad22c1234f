"""The configuration section of the metrics exporter."""

from typing import Self

from pydantic import Field, model_validator

from edit_ray.options import Options

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class MetricsOptions(Options):
    """The exporter in the segment scheduler, at `http://address:port/metrics`; port 0 is any free port.

    Requests from other machines need the token in `token_file`.
    """

    enabled: bool = True
    address: str = Field(default="127.0.0.1", min_length=1, max_length=253)
    port: int = Field(default=0, ge=0, le=65535)
    token_file: str | None = Field(default=None, min_length=1, max_length=4096)

    @model_validator(mode="after")
    def _check_token(self) -> Self:
        if self.address not in LOOPBACK and self.token_file is None:
            raise ValueError(
                f"has the address {self.address!r}, which other machines may reach, and no token_file; "
                "it must have one, or the address 127.0.0.1."
            )
        return self
