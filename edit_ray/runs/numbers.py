"""What a manifest may hold: whole numbers that readers can loop over and add up, and files inside the run's folder."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

MAX_SEGMENTS = 100_000

Count = Annotated[int, Field(ge=0, lt=10**9)]
"""Of segments, takes, frames of a segment, pixels, lives of a run."""
SegmentCount = Annotated[int, Field(ge=0, lt=MAX_SEGMENTS + 1)]
"""How many segments a run is to have."""
Frame = Annotated[int, Field(ge=0, lt=10**15)]
"""Of a whole video."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]

SegmentFile = Annotated[str, Field(pattern=r"^(latents|segments)/[0-9]{5,9}-t[0-9]{1,9}\.[a-z0-9]{2,16}$")]
"""Of a segment, relative to the run's folder."""
