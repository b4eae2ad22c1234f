"""What a segment scheduler tells Prometheus while its GPU actor is at work on a CUDA device, for a test to replay.

    python benchmarks/record_metrics.py --output tests/data/gpu_metrics.json [--scrapes 4] [--every 2]

The embedded model denoises one long segment, by the actors' own classes in one process, without Ray; the exporter is
scraped meanwhile, and Ray's own reading of the device is taken beside each page. The run is stopped before anything is
encoded, so that no ffmpeg is needed.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from anywhere

from benchmarks.provenance import provenance  # noqa: E402
from edit_ray.actors.local import LocalPool  # noqa: E402
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor  # noqa: E402
from edit_ray.config import Config  # noqa: E402
from edit_ray.metrics.exporter import TARGETS  # noqa: E402

START_S = 120.0
SIZE = {"height": 128, "width": 128, "num_frames": 33}


def config_for(device: str, num_inference_steps: int) -> Config:
    """One segment of the embedded model, with so many steps that it outlasts the recording."""
    return Config.model_validate(
        {
            "model": {"path": "builtin:tiny_wan", "device": device},
            "sampling": SIZE | {"num_inference_steps": num_inference_steps},
            "video": {"num_segments": 1},
            "prompt_segments": [{"segment": 0, "prompt": "a red circle bouncing on a black background"}],
        }
    )


def gpu_readings() -> list[dict[str, Any]]:
    """Each device as Ray's dashboard agent reads it."""
    from ray.dashboard.modules.reporter.gpu_providers import GpuMetricProvider

    kept = ("index", "name", "utilization_gpu", "memory_used", "memory_total")
    return [{name: reading.get(name) for name in kept} for reading in GpuMetricProvider().get_gpu_usage()]


def scrape(root: Path) -> str:
    """The page at the place that is named to Prometheus."""
    (target,) = json.loads((root / TARGETS).read_text())[0]["targets"]
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
        page: bytes = answer.read()
    return page.decode()


async def record(root: Path, config: Config, scrapes: int, every_s: float) -> list[dict[str, Any]]:
    """Pages and readings while a run is denoised, which is stopped then."""
    crew = LocalPool()
    scheduler = SegmentSchedulerActor(crew)
    with tempfile.NamedTemporaryFile(dir=root) as probe:
        await scheduler.submit("recorded", config.model_dump(mode="json"), str(root), probe.name, "token")
    async with asyncio.timeout(START_S):
        while (status := await scheduler.status("recorded")).progress is None:
            if status.ended:
                sys.exit(f"the run has ended: {status.error}")
            await asyncio.sleep(0.1)
    found = []
    for _ in range(scrapes):
        await asyncio.sleep(every_s)
        found.append({"gpus": await asyncio.to_thread(gpu_readings), "page": await asyncio.to_thread(scrape, root)})
    if (status := await scheduler.status("recorded")).ended:
        sys.exit(f"the run has ended before the recording: {status.state}; it needs more --steps")
    await scheduler.cancel("recorded")
    while not (await scheduler.status("recorded")).ended:
        await asyncio.sleep(0.1)
    await crew.end()
    return found


def main() -> None:
    """Record, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scrapes", type=int, default=4)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two of them")
    parser.add_argument("--steps", type=int, default=1000, help="of denoising, which must outlast the scrapes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try it out")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device here")
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(record(Path(folder), config_for(args.device, args.steps), args.scrapes, args.every))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    about = provenance(args.device) | {"every_s": args.every, "sampling": SIZE}
    args.output.write_text(json.dumps(about | {"scrapes": found}, indent=1) + "\n")
    told = [line for line in found[-1]["page"].splitlines() if line.startswith("edit_ray_gpu_memory_bytes{")]
    print(*told, *map(str, found[-1]["gpus"]), f"{args.output}: {args.output.stat().st_size} bytes", sep="\n")
    if args.device == "cuda" and not (told and found[-1]["gpus"]):
        sys.exit("the page or Ray's reading lacks the GPU")


if __name__ == "__main__":
    main()
