"""Records of decisions and the page made of them: nothing is lost, nothing is invented, nothing is fetched."""

import json
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_ray.cache.records import Counts, Decision, Record
from edit_ray.cli import main
from edit_ray.page.decisions import render_report
from edit_ray.runs.folder import RunFolder
from tests.unit.test_manifest import BEGUN

VOID = {"meta", "img", "link", "input"}
few = settings(max_examples=15, deadline=None)
numbers = st.none() | st.floats(-1e6, 1e6) | st.integers(-5, 5)


@st.composite
def records(draw):
    steps, units = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    decision = st.builds(
        Decision,
        step=st.integers(0, steps - 1),
        branch=st.sampled_from(["cond", "uncond", "<b>&"]),
        expert=st.sampled_from(["transformer", "transformer_2", "<i>"]),
        unit=st.integers(0, units - 1),
        decision=st.sampled_from(["compute", "reuse"]),
        reason=st.sampled_from(["policy", "plan", "hook", "missing", "probe", "gate"]),
        signal=numbers,
        accumulated=numbers,
        threshold=numbers,
    )
    return Record(steps, units, draw(st.lists(decision, max_size=12)))


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text; fails on tags that are not closed in order."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += "" if "style" in self.open else data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def decide(step, decision="compute", **other):
    """A decision of the first unit, unless told otherwise."""
    defaults = {"branch": "cond", "expert": "transformer", "unit": 0, "reason": "policy"}
    return Decision(step=step, decision=decision, **(defaults | other))


RECORD = Record(
    4,
    2,
    [
        decide(step, "compute" if computes else "reuse", branch=branch, unit=unit, signal=0.1, threshold=0.2)
        for step, computes in enumerate((True, False, True, False))
        for branch in ("cond", "uncond")
        for unit in (0, 1)
    ],
)


@few
@given(records())
def test_a_record_comes_back_as_it_was_written(record):
    assert Record.from_json(record.to_json()) == record
    assert json.loads(record.to_json())["num_units"] == record.num_units


@few
@given(records())
def test_counts_are_those_of_the_decisions(record):
    by_branch = record.counts("branch")
    assert set(by_branch) == {(decision.branch,) for decision in record}
    for (branch,), count in by_branch.items():
        own = [decision.decision for decision in record if decision.branch == branch]
        assert (count.computed, count.skipped, count.bytes) == (own.count("compute"), own.count("reuse"), 0)
        assert count.skip_rate == own.count("reuse") / len(own)
    (everything,) = record.counts().values() or [Counts()]
    assert everything.computed + everything.skipped == len(record)
    assert sum(count.skipped for count in record.counts("expert", "unit").values()) == everything.skipped


def test_a_mask_is_that_of_one_unit_of_one_branch_over_all_experts():
    record = Record(
        3,
        2,
        [
            decide(0),
            decide(0, "reuse", unit=1),
            decide(0, "reuse", branch="uncond"),
            decide(1, "reuse", expert="transformer_2"),
            decide(2, expert="transformer_2"),
        ],
    )
    assert record.mask() == [True, False, True]
    assert record.mask("cond", 1) == record.mask("uncond") == [False]
    assert record.mask("uncond", 1) == []
    assert Counts().skip_rate == 0


GOOD = json.loads(RECORD.to_json())


def changed(**changes):
    """The good record with its first decision changed."""
    first, *others = GOOD["decisions"]
    return json.dumps(GOOD | {"decisions": [first | changes, *others]})


BROKEN = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[]",
    "no schema": "{}",
    "too deep": "[" * 100_000,
    "another schema": json.dumps(GOOD | {"schema": 2}),
    "no decisions": json.dumps({"schema": 1, "num_steps": 1, "num_units": 1}),
    "no object": json.dumps(GOOD | {"decisions": ["compute"]}),
    "no count": json.dumps(GOOD | {"num_steps": "4"}),
    "a unit too many": json.dumps(GOOD | {"num_units": 1}),
    "a step too many": changed(step=4),
    "a half step": changed(step=0.5),
    "no text": changed(branch=None),
    "another decision": changed(decision="skip"),
    "another reason": changed(reason="<script>"),
    "text for a number": changed(signal="0.1"),
    "no finite number": changed(threshold=float("nan")),
    "a field too many": changed(other=1),
    "a manifest": json.dumps({"schema": 1, "run_id": "one", "segments": []}),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_record_is_refused(text):
    with pytest.raises(ValueError, match="not a record of cache decisions"):
        Record.from_json(text)


@few
@given(records(), st.text(max_size=20), st.text(max_size=20))
def test_a_page_has_a_cell_for_every_decision_and_needs_nothing_else(record, title, heading):
    page = Page(text := render_report({heading: record}, title))
    assert {tag for tag, _ in page.elements} <= {
        *("html", "head", "meta", "link", "title", "style", "body", "main", "header", "section", "h1", "h2", "h3", "p"),
        *("fieldset", "legend", "label", "input", "dl", "div", "dt", "dd", "span", "table", "tr", "th", "td"),
        *("svg", "rect", "polyline", "line", "circle", "text"),
    }
    assert not any(name in attrs for _, attrs in page.elements for name in ("src", "onload", "xlink:href"))
    assert [attrs["href"] for _, attrs in page.elements if "href" in attrs] == ["data:,"], "the icon, which is none"
    assert "http" not in text.replace(title, "").replace(heading, "")
    assert "url(" not in text.replace(title, "").replace(heading, "")
    assert len(page.all("rect")) == len(record)
    colours = {"compute": "mark blue", "reuse": "mark reuse"}
    by_branch = [d for branch in dict.fromkeys(d.branch for d in record) for d in record if d.branch == branch]
    assert [cell["class"] for cell in page.all("rect")] == [colours[decision.decision] for decision in by_branch]
    for of, at in (("step", "x"), ("unit", "y")):
        places = {
            (getattr(decision, of), float(cell[at].removesuffix("%")))
            for decision, cell in zip(by_branch, page.all("rect"), strict=True)
        }
        assert [place for _, place in sorted(places)] == sorted({place for _, place in places})


def test_headings_are_text_whatever_they_hold():
    nasty = '</title><script src="http://x">&'
    page = Page(render_report({nasty: RECORD, "second": RECORD}, nasty))
    assert page.all("script") == []
    assert page.text.count(nasty) == 3  # title, heading of the page, heading of the section
    assert len(page.all("h2")) == 2


@pytest.mark.parametrize(
    ("told", "lines"),
    [
        ({}, 0),
        ({"threshold": 0.0}, 0),
        ({"signal": 0.1}, 1),
        ({"signal": 0.1, "accumulated": 0.3, "threshold": 0.2}, 3),
    ],
)
def test_the_chart_draws_what_the_policy_tells(told, lines):
    page = Page(render_report({"": Record(3, 1, [decide(step, **told) for step in range(3)])}, ""))
    assert len(page.all("polyline")) == lines
    assert len([svg for svg in page.all("svg") if svg.get("role") == "img"]) == (1 if lines == 0 else 2)
    for line in page.all("polyline"):
        assert len(line["points"].split()) == 3


def test_the_chart_is_that_of_the_first_unit_and_stays_inside():
    values = {"signal": -0.5, "accumulated": 2.0}
    record = Record(3, 2, [decide(step, unit=unit, **values) for step in range(3) for unit in range(2)])
    page = Page(render_report({"": record}, ""))
    _, _, width, height = map(float, page.all("svg")[1]["viewbox"].split())
    for line in page.all("polyline"):
        points = [tuple(map(float, point.split(","))) for point in line["points"].split()]
        assert len(points) == 3
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    below, above = (line["points"].split(",")[1].split()[0] for line in page.all("polyline"))
    assert float(below) > float(above)


@pytest.fixture
def run(tmp_path):
    """The folder of a run with two recorded segments."""
    folder = RunFolder(tmp_path, "one")
    folder.create("", BEGUN).close()
    for segment in (0, 1):
        folder.record(segment).write_text(RECORD.to_json())
    return folder


def test_the_report_of_a_file_lies_beside_it(tmp_path, capsys):
    file = tmp_path / "mine.json"
    file.write_text(RECORD.to_json())
    assert main(["report", str(file)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'mine.html'}\n"
    assert len(Page((tmp_path / "mine.html").read_text()).all("rect")) == len(RECORD)
    assert main(["report", str(file), "--page", str(tmp_path / "elsewhere.html")]) == 0
    assert (tmp_path / "elsewhere.html").read_text() == (tmp_path / "mine.html").read_text()


@pytest.mark.parametrize("by", ["id", "folder"])
def test_the_report_of_a_run_has_a_section_a_segment(run, by, capsys):
    source = "one" if by == "id" else str(run.path)
    assert main(["--output", str(run.path.parent), "report", source]) == 0
    assert capsys.readouterr().out == f"{run.path / 'report.html'}\n"
    page = Page((run.path / "report.html").read_text())
    assert len(page.all("h2")) == 2
    assert "Cache decisions of one" in page.text
    assert page.text.index("segment 0") < page.text.index("segment 1")


def lose_records(folder):
    for segment in (0, 1):
        folder.record(segment).unlink()


@pytest.mark.parametrize(
    ("source", "damage", "words"),
    [
        ("two", id, "two is neither a record nor a run with records; a run has some if its cache.policy"),
        ("../up", id, "../up is not a file, a folder or a run id"),
        ("no/such.json", id, "no/such.json is not a file, a folder or a run id"),
        ("", id, "nor a run with records"),
        ("\0", id, "or a run id"),
        (
            "one",
            lambda folder: folder.record(1).write_text("{}"),
            "00001-t0.json cannot be read: this is not a record of cache decisions",
        ),
        ("one", lambda folder: folder.record(1).write_bytes(b"\xff\xfe"), "00001-t0.json cannot be read"),
        ("one", lose_records, "run 'one' has committed no segment yet (its state: open)"),
        ("one", lambda folder: folder.record(2).mkdir(), "00002-t0.json cannot be read"),
        ("one", lambda folder: (folder.path / "report.html").mkdir(), "report.html cannot be written"),
    ],
)
def test_what_cannot_be_reported_ends_with_code_2_and_a_sentence(run, source, damage, words, capsys, monkeypatch):
    monkeypatch.chdir(run.path.parent)
    damage(run)
    assert main(["--output", str(run.path.parent), "report", source]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("edit-ray: ")
    assert words in line
