"""The stylesheet of all pages: every colour is declared once, for light and dark, and every text can be read."""

import re
from itertools import product

import pytest

from edit_ray.page.document import STYLE, document, figures
from edit_ray.page.legend import AGAIN, CACHE, CHANGES, CHANNELS, COLOURS, COMPARED, INSIDE, SEAMS, STORED, TIERS, WORK
from tests.unit.test_cache_report import Page

TEXT = STYLE.read_text()
COLOUR = re.compile(r"--([\w-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\);")
COLOURS_OF = {name: values for name, *values in COLOUR.findall(TEXT)}
BEHIND, MARKS = ("ground", "surface"), ("blue", "green", "orange", "purple", "red")


def luminance(colour):
    """WCAG 2's relative luminance of #rrggbb."""
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    dark, bright = sorted(map(luminance, (one, other)))
    return (bright + 0.05) / (dark + 0.05)


def test_the_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_every_text_can_be_read_on_everything_that_may_be_behind_it(theme):
    pairs = [*product(("text", "muted", *MARKS), BEHIND), *(("on-colour", mark) for mark in MARKS)]
    low = {pair: contrast(*(COLOURS_OF[name][theme] for name in pair)) for pair in pairs}
    assert {pair: ratio for pair, ratio in low.items() if ratio < 4.5} == {}


def test_a_colour_is_nowhere_but_among_the_properties():
    rest = COLOUR.sub("", TEXT).replace("background: #000;", "")  # around a video
    assert re.findall(r"#[0-9a-f]{3,8}\b|rgba?\(|hsl", rest) == []
    declared = set(re.findall(r"(--[\w-]+):", TEXT))
    assert set(re.findall(r"var\((--[\w-]+)", TEXT)) <= declared


def test_every_mark_has_its_colour():
    groups = [key for _, keys in (CACHE, CHANGES, COLOURS, COMPARED, SEAMS, STORED) for key, _ in keys]
    tables = [AGAIN, INSIDE[1], *CHANNELS.values(), *(colour for _, colour in (*TIERS.values(), *WORK.values()))]
    for name in {part for key in [*groups, *tables] for part in key.split()}:
        assert re.search(rf"\.{name}\b", TEXT), name


def test_both_kinds_of_page_offer_the_same_themes():
    static = Page((STYLE.parent / "index.html").read_text())
    made = Page(document("one", [figures([])]))
    chosen = [[attrs["value"] for attrs in page.all("input") if attrs["name"] == "theme"] for page in (static, made)]
    assert chosen == [["auto", "light", "dark"]] * 2
    assert all(f'[value="{theme}"]' in TEXT for theme in chosen[0][1:])
