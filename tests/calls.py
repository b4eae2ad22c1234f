"""What tests call a pipeline with."""

from contextlib import contextmanager

import torch

from edit_ray import EditWanPipeline

TINY = {
    "prompt": "a red circle",
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "max_sequence_length": 32,
    "output_type": "latent",
    "return_dict": False,
}
"""The least that a random model makes."""

AS_TRAINED = {
    "prompt": "a red circle and a blue square bouncing on a black background",
    "height": 128,
    "width": 128,
    "num_frames": 33,
    "guidance_scale": 4.0,
    "max_sequence_length": 512,
    "output_type": "latent",
    "return_dict": False,
}
"""A prompt and sizes that the embedded model was trained on."""


def quiet(pipe):
    """The pipeline, without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(folder, **options):
    """The quiet `EditWanPipeline` of a folder."""
    return quiet(EditWanPipeline.from_pretrained(folder, **options))


def latents(pipe, seed=0, **call):
    """The latents of a tiny call."""
    return pipe(**({"generator": torch.Generator().manual_seed(seed)} | TINY | call))[0]


@contextmanager
def cached(pipe, *arguments, **options):
    """The cache that a pipeline has for a while."""
    try:
        yield pipe.enable_cache(*arguments, **options)
    finally:
        pipe.disable_cache()
