"""Runs of causal models on a CUDA device: K/V that is stored, or computed again, gives the bits of K/V that stays."""

import pytest
import torch

from edit_ray.actors.denoiser import DenoiserActor
from edit_ray.actors.local import LocalWorker
from edit_ray.actors.messages import RunSpec
from edit_ray.engine.continuity import load_latents
from edit_ray.testing import save_random_wan
from tests.runs_here import config_for

SEGMENTS, CHUNKS = 5, 2
OPTIONS = {"chunk_size": 3, "window": 12, "sink": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_wan(tmp_path_factory.mktemp("causal") / "wan", num_layers=4, causal=OPTIONS)


def config_of(model, kv, device_bytes):
    return config_for(
        model,
        model={"path": str(model), "torch_dtype": "bfloat16", "offload": "none"},
        sampling={"height": 64, "width": 96, "num_frames": 21, "num_inference_steps": 4, "guidance_scale": 1.0},
        continuity={"mode": "causal", "chunks": CHUNKS, "kv": kv},
        prompt_segments=[{"segment": 0, "prompt": "a red circle"}],
        store={"device_bytes": device_bytes, "host_bytes": 2**24, "allow_tmpfs": True},
    )


def latents_of(root, config, lose=()):
    """The latents of a run; before some segments the GPU actor, or all that is stored, is lost."""
    spec = RunSpec("one", root, config, SEGMENTS)
    spec.folder.create("", spec.begun("", {})).close()
    worker = LocalWorker()
    try:
        for index in range(SEGMENTS):
            if index in lose:
                worker.store.drop_run(spec.residuals_id, spec.residuals_directory)
                worker.denoiser = DenoiserActor(worker)
            worker.denoiser.prepare_run(spec)
            worker.denoiser.denoise_segment(spec, spec.segment(index), 0)
        worker.denoiser.release_run(spec.run_id)
    finally:
        worker.end()
    return [load_latents(spec.latents(index)) for index in range(SEGMENTS)]


@pytest.mark.parametrize("device_bytes", [0, 2**20, 2**29])
def test_stored_kv_is_that_which_stays_wherever_the_tiers_keep_it(tmp_path, model, device_bytes):
    config = config_of(model, "commit", device_bytes)
    whole, hurt = (latents_of(tmp_path / name, config, lose) for name, lose in (("whole", ()), ("hurt", (2, 4))))
    assert all(torch.equal(one, other) for one, other in zip(whole, hurt, strict=True))
    recached = latents_of(tmp_path / "recached", config_of(model, "recache", device_bytes), lose=(1, 3))
    assert torch.equal(recached[0], whole[0])
    assert not torch.equal(recached[-1], whole[-1]), "K/V that is computed again is another"
