"""The page that Prometheus gets: complete from the start, true, and never more than it may be."""

import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from edit_ray.errors import ConfigError
from edit_ray.metrics.catalog import CATALOG
from edit_ray.metrics.collect import STALE_S, ActorMetrics, MetricValues, Snapshot, series
from edit_ray.metrics.exporter import Exporter, MetricsOptions, write_targets
from tests.prometheus import need, samples_of

TOKEN = "a token of many characters"


@pytest.fixture
def serve(clock):
    """Starts exporters; returns them with what they tell of."""
    started = []

    def start(**options):
        totals = MetricValues()
        actors = ActorMetrics(totals, clock)
        started.append(Exporter(totals, actors, MetricsOptions(**options)))
        return started[-1], totals, actors

    yield start
    for exporter in started:
        exporter.close()


def fetch(exporter, path="/metrics", token=None, **headers):
    headers |= {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"http://{exporter.address}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.read()


def test_everything_is_there_from_the_start(serve):
    exporter, *_ = serve()
    assert exporter.address.startswith("127.0.0.1:")
    status, page = fetch(exporter)
    families = {family.name: family for family in text_string_to_metric_families(page.decode())}
    assert status == 200
    assert set(families) == {name.removesuffix("_total") for name in CATALOG}
    for metric in CATALOG.values():
        family = families[metric.name.removesuffix("_total")]
        children = {tuple(sample.labels[label] for label in metric.labels) for sample in family.samples}
        absent = metric.owner is not None and metric.kind == "gauge"
        assert children == (set() if absent else set(metric.children()))
    assert b"_created" not in page


def test_promtool_finds_nothing_to_say(serve):
    need("promtool")
    exporter, totals, _ = serve()
    totals.observe("edit_ray_step_seconds", 0.2, decision="computed")
    checked = subprocess.run([shutil.which("promtool"), "check", "metrics"], input=exporter.page(), capture_output=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_values_are_told_as_they_are(serve):
    exporter, totals, _ = serve()
    for value in (0.004, 0.3, 99.0):
        totals.observe("edit_ray_step_seconds", value, decision="skipped")
    totals.inc("edit_ray_frames_total", 33)
    totals.inc("edit_ray_work_failed_total", stage="dream", trouble="error")
    totals.set("edit_ray_runs", 2, state="running")
    samples = samples_of(fetch(exporter)[1])
    of = {"decision": "skipped"}
    assert samples("edit_ray_step_seconds_count", **of) == samples("edit_ray_step_seconds_bucket", le="+Inf", **of) == 3
    assert samples("edit_ray_step_seconds_bucket", le="0.25", **of) == 1
    assert samples("edit_ray_step_seconds_sum", **of) == pytest.approx(99.304)
    assert samples("edit_ray_frames_total") == 33
    assert samples("edit_ray_work_failed_total", stage="other", trouble="error") == 1
    assert samples("edit_ray_runs", state="running") == 2
    assert samples("edit_ray_runs", state="queued") == 0


def test_two_exporters_of_one_process_have_the_same_page(serve):
    first, second = serve()[0], serve()[0]
    assert first.page() == first.page() == second.page()
    assert first.address != second.address
    CollectorRegistry().register(first)  # nothing of it is global


def test_an_actor_that_says_nothing_is_stale_and_not_frozen(serve, clock):
    exporter, _, actors = serve()
    held = series("edit_ray_tier_bytes", tier="host")
    moved = series("edit_ray_entries_dropped_total", reason="dead")
    actors.take("cache_store", 0, Snapshot("1", {moved: 3}, {held: 10}))
    actors.take("cache_store", 1, Snapshot("9", {moved: 4}, {held: 5}))
    samples = samples_of(exporter.page())
    assert samples("edit_ray_tier_bytes", tier="host") == 15
    assert samples("edit_ray_entries_dropped_total", reason="dead") == 7
    assert samples("edit_ray_actor_up", actor="cache_store") == 1
    clock.now += STALE_S + 1
    actors.take("cache_store", 1, Snapshot("9", {moved: 4}, {held: 6}))
    samples = samples_of(exporter.page())
    assert samples("edit_ray_tier_bytes", tier="host") == 6
    assert samples("edit_ray_entries_dropped_total", reason="dead") == 7
    assert samples("edit_ray_actor_up", actor="cache_store") == 0
    assert samples("edit_ray_actor_snapshot_age_seconds", actor="cache_store") == STALE_S + 1
    actors.take("cache_store", 1, None)
    clock.now += STALE_S + 1
    assert samples_of(exporter.page())("edit_ray_tier_bytes", tier="host") is None
    actors.take("cache_store", 0, Snapshot("2", {moved: 1}, {held: 1}))
    samples = samples_of(exporter.page())
    assert samples("edit_ray_entries_dropped_total", reason="dead") == 8
    assert samples("edit_ray_actor_restarts_total", actor="cache_store") == 1


def test_a_token_is_asked_for_where_there_is_one(serve, tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    exporter, *_ = serve(address="0.0.0.0", token_file=str(tmp_path / "token"))
    assert fetch(exporter, token=TOKEN)[0] == 200
    for wrong in (None, "", TOKEN[:-1], f"{TOKEN} ", "ä"):
        status, page = fetch(exporter, token=wrong)
        assert status == 401
        assert b"edit_ray_" not in page


def test_one_page_is_served_and_a_client_that_disconnects_disturbs_nobody(serve):
    exporter, *_ = serve()
    assert fetch(exporter, "/metrics?x=1")[0] == 200
    for path in ("/", "/metrics/../metrics", "/debug"):
        assert fetch(exporter, path)[0] == 404
    host, port = exporter.address.split(":")
    for said in (b"", b"GET /metrics HTTP/1.1\r\n", b"\xff\x00\r\n\r\n", b"POST /metrics HTTP/1.1\r\n\r\n"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(said)
    assert fetch(exporter)[0] == 200


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"address": "192.0.2.1"}, "cannot assign requested address"),
        ({"address": "no.such.host.invalid"}, "not known|name resolution"),
        ({"token": "short"}, "16 printable"),
        ({"token": "ä" * 20}, "cannot be read"),
        ({"token_file": "/nowhere/token"}, "no such file"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(serve, tmp_path, options, reason):
    (tmp_path / "token").write_text(options.pop("token", TOKEN))
    with pytest.raises(ConfigError, match=reason) as refused:
        serve(**{"token_file": str(tmp_path / "token"), **options})
    assert len(refused.value.problems) == 1


def test_a_taken_port_and_an_open_address_without_a_token_are_refused(serve):
    exporter, *_ = serve()
    with pytest.raises(ConfigError, match="address already in use"):
        serve(port=int(exporter.address.rpartition(":")[2]))
    with pytest.raises(ValueError, match="token_file"):
        MetricsOptions(address="0.0.0.0")
    assert MetricsOptions(address="::1").token_file is None


def test_the_target_is_where_prometheus_looks(tmp_path):
    for address in ("127.0.0.1:1", "127.0.0.1:2"):
        path = write_targets(tmp_path, address)
        assert json.loads(path.read_text()) == [{"targets": [address], "labels": {}}]
        assert path.stat().st_mode & 0o777 == 0o644, "Prometheus may be another user"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_without_a_token_it_answers_to_this_machine_s_names_alone(serve, tmp_path):
    """As a page from elsewhere would ask, whose own name was made to mean this machine."""
    (tmp_path / "token").write_text(TOKEN)
    without, *_ = serve()
    guarded, *_ = serve(token_file=str(tmp_path / "token"))
    port = without.address.rpartition(":")[2]
    for name in ("localhost", "127.0.0.1", "[::1]", "LOCALHOST", f"localhost:{port}", without.address):
        assert fetch(without, Host=name)[0] == 200
    for name in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "localhost:1:2"):
        assert fetch(without, Host=name)[0] == 403
    assert fetch(guarded, token=TOKEN, Host="node-7.cluster:9000")[0] == 200
