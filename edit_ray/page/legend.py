"""The one legend of a page: what each colour and each kind of mark stands for."""

from __future__ import annotations

import html
from collections.abc import Sequence

Group = tuple[str, Sequence[tuple[str, str]]]
"""A heading, and the key's classes in the stylesheet with what it stands for."""

# A segment's statistics give each kind of work as `<work>_at` (Unix seconds) and `<work>_s`: its lane and its colour.
WORK = {
    "denoise": ("GPU actor, denoising", "blue"),
    "decode": ("GPU actor, decoding", "green"),
    "encode": ("encoder process", "orange"),
    "complete": ("CacheStore actor", "purple"),
    "publish": ("segment scheduler", "grey"),
}
AGAIN = "red"
INSIDE = ("inside the segment", "grey")
CHANNELS = {"red": "red", "green": "green", "blue": "blue"}
TIERS = {"host": ("memory", "blue"), "disk": ("disk", "orange")}

CACHE: Group = ("Cache", [("blue", "computed"), ("reuse", "reused")])
COMPARED: Group = (
    "What the cache compared",
    [("line orange", "signal"), ("line blue", "accumulated"), ("line dashed grey", "threshold")],
)
SEAMS: Group = ("Seams", [("line blue", "at the seam"), ("line dashed grey", INSIDE[0])])
COLOURS: Group = ("Mean colour", [(f"line {colour}", name) for name, colour in CHANNELS.items()])
CHANGES: Group = ("Changes", [("change", "the prompt changes"), (AGAIN, "a segment is begun again")])
STORED: Group = ("Stored for reuse", [(f"line {colour}", name) for name, colour in TIERS.values()])


def legend(groups: Sequence[Group]) -> str:
    """The legend as HTML."""
    lists = []
    for heading, keys in groups:
        shown = "".join(f'<span><span class="key {key}"></span>{html.escape(name)}</span>' for key, name in keys)
        lists.append(f"<div><dt>{html.escape(heading)}</dt><dd>{shown}</dd></div>")
    return f'<dl class="legend panel">{"".join(lists)}</dl>'
