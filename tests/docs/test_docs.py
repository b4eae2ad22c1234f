"""docs/caching.md: its code runs, its tables are those of the classes; docs/conditioning.md: its code runs."""

import inspect
import re
from pathlib import Path

import pytest

from edit_ray.cache.policies import POLICIES, CachePolicy, PolicyContext, TeaCache, WarmstartReuse
from edit_ray.cache.policies.policy import UnitState

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "caching.md").read_text()
# What is changed so that the code takes seconds on a CPU; everything else runs as it is printed.
SMALLER = {
    "steps = 30": "steps = 6",
    "height=128": "height=32",
    "width=128": "width=32",
    "num_frames=33": "num_frames=5",
}
REQUIRED = {
    "schedule": {"mask": [True]},
    "ranked": {"skip_rank": [None]},
    "teacache": {"coefficients": [1.0]},
    "magcache": {"mag_ratios": [1.0]},
}

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks(language, text=PAGE):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def sections():
    """The python code of each section that has some, by its heading, in the order of the page."""
    parts = re.split(r"^## (.*)\n", PAGE, flags=re.MULTILINE)[1:]
    return {
        heading: code for heading, text in zip(parts[::2], parts[1::2], strict=True) if (code := blocks("python", text))
    }


def rows(heading):
    """The cells of the table whose first column has this heading, one list a row."""
    lines = PAGE[PAGE.index(f"| {heading} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.fixture(scope="module")
def names():
    """What the quick start leaves, which every other section begins with."""
    found = {}
    run(found, "Quick start")
    found["pipe"].set_progress_bar_config(disable=True)
    return found


def run(names, heading):
    for code in sections()[heading]:
        for old, new in SMALLER.items():
            code = code.replace(old, new)
        exec(compile(code, f"<docs/caching.md, {heading}>", "exec"), names)


def test_the_quick_start_runs(names, capsys):
    assert names["video"].shape == (5, 32, 32, 3)
    assert names["pipe"].cache is None


@pytest.mark.parametrize("heading", [heading for heading in sections() if heading != "Quick start"])
def test_a_section_runs(names, heading, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert names["pipe"].cache is None
    own = dict(names)
    try:
        run(own, heading)
    finally:
        own["pipe"].disable_cache()
    if heading == "Warm start":
        printed = [line for line in capsys.readouterr().out.splitlines() if line[0].isdigit()]
        assert printed == ["0 [True, True]", "1 [False, False]", "2 [False, False]", "3 [True, True]"]


def test_everything_is_tested():
    assert sum(map(len, sections().values())) == len(blocks("python"))
    assert [old for old in SMALLER if old not in "".join(blocks("python"))] == []


def test_the_entry_point_is_the_one_that_is_looked_up():
    (block,) = blocks("toml")
    assert f'[project.entry-points."{POLICIES.group}"]' in block


def option_of(text):
    """`name` or `name=default` as a pair, the second None where there is no default."""
    name, equals, default = text.partition("=")
    return name, eval(default) if equals else inspect.Parameter.empty


def test_the_table_of_policies_is_that_of_the_classes():
    table = {row[0].strip("`"): row[1:] for row in rows("policy")}
    ours = {name for name in POLICIES.names() if POLICIES.find(name).__module__.startswith("edit_ray.")}
    assert set(table) == ours
    for name, (_, options, known, granularities) in table.items():
        cls = POLICIES.find(name)
        parameters = inspect.signature(cls).parameters.values()
        expected = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert dict(map(option_of, re.findall(r"`([^`]+)`", options))) == expected, name
        if cls is WarmstartReuse:
            assert (known, granularities) == ("as inner", "as inner")
        else:
            made = cls(**REQUIRED.get(name, {}))
            assert known == ("yes" if made.timestep_only else "no"), name
            assert tuple(granularities.split(", ")) == made.granularities, name


def test_the_tables_for_writers_are_those_of_the_classes():
    described = {name.strip("()") for row in rows("`ctx.`") for name in re.findall(r"`([\w.()]+)`", row[0])}
    for name in described:
        part, _, below = name.partition(".")
        assert (
            hasattr(UnitState("", "", 0), below)
            if part == "state"
            else hasattr(PolicyContext, part) or (part in PolicyContext.__dataclass_fields__)
        ), name
    attributes = {name.strip("`"): default for name, default, _ in rows("class attribute")}
    assert set(attributes) == {
        name for name, value in vars(CachePolicy).items() if not name.startswith("_") and not callable(value)
    }
    for name, default in attributes.items():
        value = getattr(CachePolicy, name)
        assert default == ("all" if name == "granularities" else f"`{value}`")


def test_mappings_are_keyed_as_it_says():
    sentence = " ".join(PAGE.split()).partition("one entry per branch")[2].partition(".")[0]
    keys = re.findall(r'"([^"]+)"', sentence)
    assert len(keys) == 3
    assert list(TeaCache(coefficients={key: [1] for key in keys}).coefficients) == keys


def test_the_code_of_the_page_on_conditions_runs(tmp_path, monkeypatch):
    """In one piece: later blocks use the pipeline of earlier ones."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks("python", (ROOT / "docs" / "conditioning.md").read_text()):
        for old, new in SMALLER.items():
            code = code.replace(old, new)
        exec(compile(code, "<docs/conditioning.md>", "exec"), names)
    assert names["pipe"].block_offload is None
    assert len(names["video"]) == len(names["again"]) == 17
    assert names["few"].frames.shape == (1, 17, 32, 32, 3)
