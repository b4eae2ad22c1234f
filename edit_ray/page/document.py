"""An HTML page that needs nothing from anywhere: the shared stylesheet, the choice of light or dark, and its parts."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STYLE = Path(__file__).parent / "static" / "page.css"
"""The stylesheet of every page that people see."""

_THEMES = "".join(
    f'<label><input type="radio" name="theme" value="{value}"{" checked" if value == "auto" else ""}>{value}</label>'
    for value in ("auto", "light", "dark")
)
_THEME = f'<fieldset class="theme"><legend class="unseen">Colours</legend>{_THEMES}</fieldset>'


@dataclass(frozen=True)
class Figure:
    """One of the numbers at the head of a page; `note` is a sentence on what it says, and `name` may be HTML."""

    name: str
    value: str
    note: str


def document(title: str, parts: Sequence[str], badge: str = "") -> str:
    """A page of `parts` (HTML) below its title. Without scripts: a stylesheet alone turns it light or dark."""
    name = html.escape(title)
    shown = f'<span class="badge">{html.escape(badge)}</span>' if badge else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{name}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>"
        f'<body><main><header class="top"><h1>{name}</h1>{shown}{_THEME}</header>{"".join(parts)}</main></body>'
        "</html>\n"
    )


def figures(shown: Sequence[Figure]) -> str:
    """The numbers at the head of a page."""
    cells = (
        f"<div><dt>{figure.name}</dt><dd>{html.escape(figure.value)}</dd>"
        f'<dd class="note">{html.escape(figure.note)}</dd></div>'
        for figure in shown
    )
    return f'<dl class="figures">{"".join(cells)}</dl>'


def note(text: str) -> str:
    """A small sentence (HTML)."""
    return f'<p class="note">{text}</p>'


def word(term: str, meaning: str) -> str:
    """A term with its meaning, which shows on hover and on focus."""
    return f'<abbr tabindex="0" title="{html.escape(meaning)}">{html.escape(term)}</abbr>'


def folded(summary: str, inside: str) -> str:
    """A part that opens when its summary is pressed; both are HTML."""
    return f"<details><summary>{summary}</summary>{inside}</details>"
