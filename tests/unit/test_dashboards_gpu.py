"""The panels that need a GPU, on what was recorded while one was at work (benchmarks/record_metrics.py)."""

import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from edit_ray.metrics.exporter import write_targets
from monitoring.alerts import Durations
from monitoring.boards import DASHBOARDS
from tests.prometheus import Prometheus, samples_of
from tests.ray.conftest import wait_until

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "gpu_metrics.json").read_text())
PANELS = [panel for board in DASHBOARDS for panel in board.panels if panel.needs_gpu]
FAST = replace(Durations().scaled(1 / 60), scrape=0.5)


@contextmanager
def replayed(pages):
    """The address at which each scrape gets the next page; the last one stays."""
    left = iter(pages[:-1])

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self):
            body = next(left, pages[-1]).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def rays_page(gpus):
    """Ray's reading of the devices under the name and labels of Ray's own gauge."""
    gauge = METRICS_GAUGES["node_gpus_utilization"]
    assert {"GpuIndex", "GpuDeviceName"} <= set(gauge.view.columns)
    told = [f'{{GpuIndex="{g["index"]}",GpuDeviceName="{g["name"]}"}} {g["utilization_gpu"]}' for g in gpus]
    return "".join(f"ray_{gauge.name}{line}\n" for line in told)


def test_every_panel_that_needs_a_gpu_shows_what_was_recorded_on_one(tmp_path):
    scrapes = RECORDED["scrapes"]
    assert "CPU" not in RECORDED["device"]
    (tmp_path / "runs").mkdir()
    ray_targets = tmp_path / "ray.json"
    ours, rays = [scrape["page"] for scrape in scrapes], [rays_page(scrape["gpus"]) for scrape in scrapes]
    with replayed(ours) as our_address, replayed(rays) as ray_address:
        write_targets(tmp_path / "runs", our_address)
        ray_targets.write_text(json.dumps([{"targets": [ray_address], "labels": {}}]))
        began = time.time()
        with Prometheus(tmp_path / "prometheus", tmp_path / "runs", ray_targets, FAST) as prometheus:
            wait_until(lambda: prometheus.up("edit_ray") == prometheus.up("ray") == 1)
            targets = [target for panel in PANELS for target in panel.targets]
            assert len(targets) >= 2
            for target in targets:
                expr = re.sub(r"\$(job|instance|run)\b", ".*", target.expr)
                named = re.findall(r"\{\{(\w+)\}\}", target.legend)
                found = wait_until(lambda expr=expr: prometheus.series(expr, began, time.time()))
                assert all(values for _, values in found), f"{target.expr} gives no finite value"
                assert all(labels.get(name) for labels, _ in found for name in named), target.legend
            told = samples_of(scrapes[-1]["page"].encode())
            memory = {kind: told("edit_ray_gpu_memory_bytes", kind=kind) for kind in ("allocated", "reserved", "total")}
            by_kind = "sum by (kind) (edit_ray_gpu_memory_bytes)"
            wait_until(
                lambda: {of["kind"]: v[-1] for of, v in prometheus.series(by_kind, began, time.time())} == memory, 20
            )
    assert 0 < memory["allocated"] <= memory["reserved"] < memory["total"]
