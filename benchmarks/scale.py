"""Several GPUs: two runs at once beside one alone, and the two branches of guidance on two devices.

    python benchmarks/scale.py --output benchmarks/results/scale      on two GPUs: Wan2.1-1.3B with random weights
    python benchmarks/scale.py --quick                                a toy on a CPU

Runs go through the actors on Ray, the models being loaded already; a segment's seconds are those from its beginning to
that of the next one of the same run, decode and encode included.
"""

import gc
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere

import torch
from torch import Tensor

from benchmarks.gpu_actor import config_of
from benchmarks.gpu_results import MODE, LeftOut, Results, arguments
from benchmarks.ray_runs import DIRECTORY, Seen, folder_for_runs, private_ray, watch
from benchmarks.real_size import Task, embeds, generate, make_pipe, save_model, synchronise, task_for, use
from edit_ray.cache.options import CacheOptions
from edit_ray.client import LongVideoClient
from edit_ray.config import Config
from edit_ray.engine.loading import usable_cores

ALONE, TOGETHER = "one run on one GPU", "two runs on two GPUs"
ONE, BOTH = "a segment, guidance on one GPU", "a segment, guidance on two GPUs"


def at_once(client: LongVideoClient, config: Config, run_ids: list[str]) -> list[Seen]:
    """Submit all of them, and follow each to its end."""
    moments = []
    for run_id in run_ids:
        moments.append(time.perf_counter())
        client.submit(config, run_id=run_id)
    with ThreadPoolExecutor(len(run_ids)) as threads:
        return list(threads.map(watch, [client] * len(run_ids), run_ids, moments))


def measure_runs(results: Results, client: LongVideoClient, config: Config) -> None:
    """Steady state of one run alone, and of two at once on a GPU each."""
    short = config.model_copy(update={"video": config.video.model_copy(update={"num_segments": 1})})
    with results.row("both models loaded, a segment each") as figures:
        at_once(client, short, ["first-0", "first-1"])
        figures["ours"] = True
    for name, run_ids in ((ALONE, ["alone"]), (TOGETHER, ["beside-0", "beside-1"])):
        if not results.time_for(name):
            return
        with results.row(name) as figures:
            seen = at_once(client, config, run_ids)
            denoise = [of["denoise_s"] for one in seen for of in one.statistics]
            figures.update(ours=True, seconds=mean(one.steady for one in seen), denoise_s=mean(denoise))
            figures["of_each"] = [round(one.steady, 4) for one in seen]
            if alone := results.of(ALONE).get("seconds") if name != ALONE else None:
                figures["ratio"] = figures["seconds"] / alone


def measure_cfg(results: Results, task: Task, device: str, mode: str) -> None:
    """Denoising of a segment with each branch of guidance on a device of its own, beside both on one: bits and time."""
    pipe = make_pipe(task, device)
    given = embeds(pipe)
    use(pipe, mode)

    def loop() -> tuple[Tensor, float]:
        synchronise(device)
        started = time.perf_counter()
        latents = generate(pipe, task, given)
        synchronise(device)
        return latents, time.perf_counter() - started

    with results.row(ONE) as figures:
        generate(pipe, task, given, num_inference_steps=2)  # a first call is slow
        latents, figures["seconds"] = loop()
        figures["ours"] = True
    with results.row(BOTH) as figures:
        if torch.cuda.device_count() < 2:
            raise LeftOut("there are no two GPUs")
        pipe.enable_cfg_parallel("cuda:1")
        generate(pipe, task, given, num_inference_steps=2)
        found, figures["seconds"] = loop()
        figures.update(ours=True, ratio=figures["seconds"] / results.of(ONE)["seconds"])
        figures["equal"] = torch.equal(latents, found)
        pipe.disable_cfg_parallel()
    results.bar("denoising, guidance on 2 GPUs / 1", results.of(BOTH).get("ratio"), most=0.54)


def config_for(task: Task, args: Any, folder: Path, segments: int) -> Config:
    """Two GPU actors, and a model that is made here."""
    model: dict[str, Any] = {"path": str(save_model(task, args.device, folder / "model"))}
    threads = max(1, usable_cores() // 2)
    engine = {"gpu_actors": 2, "mode": args.mode}
    of = config_of(task, args.device, segments, cache=CacheOptions(), store={}, threads=threads, model=model)
    return of.model_copy(update={"engine": of.engine.model_copy(update=engine)})


def main() -> None:
    """Measure, print, write."""
    args = arguments(
        __doc__ or "",
        seconds=90,
        mode=MODE,
        steps={"type": int, "default": 8},
        segments={"type": int},
        directory=DIRECTORY,
    )
    task = task_for(args.quick, num_inference_steps=4 if args.quick else args.steps)
    segments = args.segments or (2 if args.quick else 4)
    told = {"quick": args.quick, "segments": segments, "mode": args.mode}
    results = Results(args, task.told() | told, figure="seconds")
    with folder_for_runs(args.directory, "scale-", results.note) as folder:
        measure_cfg(results, task, args.device, args.mode)
        gc.collect()
        config = config_for(task, args, folder, segments)
        if args.device == "cuda" and torch.cuda.device_count() < 2:
            results.note("one GPU: two runs share it, which is no measurement of two")
            config = config.model_copy(update={"engine": config.engine.model_copy(update={"gpu_actors": 1})})
        with private_ray(num_cpus=max(4, usable_cores())):
            client = LongVideoClient(output=folder)
            measure_runs(results, client, config)
            if not args.quick:
                ratio = results.of(TOGETHER).get("ratio") if torch.cuda.device_count() > 1 else None
                results.bar("two runs on 2 GPUs / one on one, steady, per segment", ratio, most=1.03)
    results.finish()


if __name__ == "__main__":
    main()
