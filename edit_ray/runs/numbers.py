"""The ranges of the whole numbers that a manifest may hold: whoever reads one may loop over them, and add them up."""

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
