"""The GPU actor's work on a GPU: what is asked for at the same moment goes one by one, the frames first."""

import time
from concurrent.futures import ThreadPoolExecutor

from edit_ray.actors.local import LocalWorker
from edit_ray.actors.messages import RunSpec
from tests.runs_here import config_for

SEGMENTS = 4


def test_denoising_lets_decoding_go_first(tmp_path):
    config = config_for("builtin:tiny_wan", continuity={"mode": "none"})
    spec = RunSpec("one", tmp_path, config, SEGMENTS)
    for folder in ("latents", "records"):
        (spec.folder.path / folder).mkdir(parents=True)
    worker = LocalWorker()
    actor = worker.denoiser
    try:
        actor.prepare_run(spec)
        actor.denoise_segment(spec, spec.segment(0), 0)
        with ThreadPoolExecutor(1) as decoder:
            for index in range(1, SEGMENTS):
                decoded = decoder.submit(actor.decode_segment, spec, spec.segment(index - 1))
                while not (actor._decoding.locked() or decoded.done()):
                    time.sleep(0.0001)
                made = actor.denoise_segment(spec, spec.segment(index), 0)
                said = decoded.result()
                assert made["denoise_at"] > said["decode_at"] + said["decode_s"] - 0.001, "both are rounded"
        actor.release_run(spec.run_id)
    finally:
        worker.end()
