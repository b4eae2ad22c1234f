"""A fused LoRA on a GPU: the mode fast is as close to diffusers as without one, and a planned loop never waits."""

import pytest
import torch

from edit_ray import EditWanPipeline
from tests.gpu.test_cache_gpu import latents, synchronisations_in_the_loop
from tests.gpu.test_fast_gpu import TINY, likeness
from tests.loras import save_lora


@pytest.mark.parametrize("unloaded", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_fast_is_as_close_with_it_as_without(tmp_path, unloaded, fp8):
    pipe = EditWanPipeline.from_pretrained(TINY, torch_dtype=torch.bfloat16, device="cuda")
    pipe.set_progress_bar_config(disable=True)

    def both():
        pipe.use_mode("exact")
        exact = latents(pipe)
        pipe.use_mode("fast", fp8=fp8)
        return exact, likeness(latents(pipe), exact)

    plain, without = both()
    save_lora(tmp_path / "one.safetensors", pipe.transformer)
    pipe.load_lora_weights(str(tmp_path / "one.safetensors"), adapter_name="one")
    pipe.set_adapters("one", 0.2)  # changes more than 8-bit products do
    pipe.fuse_lora()
    if unloaded:
        pipe.unload_lora_weights()
    fused, with_lora = both()
    assert with_lora > without - 3
    assert likeness(fused, plain) < without, "the LoRA changes more than the mode does"
    assert synchronisations_in_the_loop(pipe) == 0
