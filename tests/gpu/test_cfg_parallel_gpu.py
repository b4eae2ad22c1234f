"""The two branches on two GPUs: the bits of one."""

import pytest
import torch

from edit_ray.testing import save_random_wan
from tests.calls import AS_TRAINED, latents, load

STEPS = 12
CACHES = {
    "none": None,
    "schedule": {"mask": [True, False] * (STEPS // 2)},
    "fbcache": {"rel_l1_thresh": 0.3},
    "taylorseer": {},
}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("policy", CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_two_gpus_make_the_bits_of_one(policy, dtype, tmp_path):
    folder = save_random_wan(tmp_path / "wan", num_layers=6)
    pipe = load(folder, torch_dtype=dtype, device="cuda")
    found = []
    for parallel in (False, True):
        if parallel:
            pipe.enable_cfg_parallel("cuda:1")
        if policy != "none":
            pipe.enable_cache(policy, STEPS, **CACHES[policy])
        found.append(latents(pipe, 3, **AS_TRAINED, num_inference_steps=STEPS))
        pipe.disable_cache()
    assert torch.equal(*found)
