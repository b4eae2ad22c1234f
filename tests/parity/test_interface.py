"""Signatures, the three forms of return, and what a model's name may be."""

import inspect
import shutil

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL.Image import Image

from edit_ray import EditWanPipeline
from edit_ray.errors import ModelError
from tests.calls import quiet

SMALL = {"prompt": "a red circle", "height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2}
SMALL |= {"max_sequence_length": 32}


def extras_of(method):
    """The parameters that ours has behind those of diffusers, which it has all, with their defaults."""
    stock, ours = (
        list(inspect.signature(getattr(of, method)).parameters.values()) for of in (WanPipeline, EditWanPipeline)
    )
    same, extras = ours[: len(stock)], ours[len(stock) :]
    assert [(p.name, p.default, p.kind) for p in same] == [(p.name, p.default, p.kind) for p in stock]
    return extras


def test_the_call_and_the_components_are_those_of_diffusers():
    extras = extras_of("__call__")
    names = {"image", "last_image", "image_embeds", "video", "strength", "mask", "reference_images"}
    names |= {"conditioning_scale", "sigmas", "history", "overlap"}
    defaults = dict.fromkeys(names) | {"reset_cache": True, "prefetch_reuse": False}
    assert {p.name: p.default for p in extras} == defaults
    assert all(p.kind is p.KEYWORD_ONLY for p in extras)
    assert {p.name: p.default for p in extras_of("__init__")} == {"image_processor": None, "image_encoder": None}


def test_an_index_gives_one_video_and_the_tuple_of_diffusers_the_batch(pair):
    output = pair.ours(**SMALL, num_videos_per_prompt=2, generator=torch.Generator().manual_seed(0))
    assert output.frames.shape == (2, 5, 32, 48, 3)
    assert output.frames.dtype == np.float32
    for index in (0, 1, -1):
        assert np.array_equal(output[index], output.frames[index])
    assert output["frames"] is output.frames
    for first in (output.to_tuple()[0], output[:1][0]):
        assert np.array_equal(first, output.frames[0])
    assert len(output.to_tuple()) == len(output[:]) == 2
    with pytest.raises(IndexError):
        output[2]
    same = {"num_videos_per_prompt": 2, "generator": torch.Generator().manual_seed(0), "return_dict": False}
    ours, stock = pair.ours(**SMALL, **same), pair.stock(**SMALL, return_dict=False)
    assert type(ours) is type(stock) is tuple
    assert len(ours) == len(stock) == 1
    assert np.array_equal(ours[0], output.frames)


def test_output_types(pair):
    channels = pair.ours.vae.config.z_dim
    assert pair.ours(**SMALL, output_type="pt").frames.shape == (1, 5, 3, 32, 48)
    assert pair.ours(**SMALL, output_type="latent")[0].shape == (channels, 2, 4, 6)
    images = pair.ours(**SMALL, output_type="pil")
    assert len(images.frames) == 1
    assert [type(image) for image in images[0]] == [Image] * 5
    assert images[0][0].size == (48, 32)


def test_components_can_be_assigned(pair_of):
    ours, other = pair_of("random").ours, pair_of("random-expand").ours
    ours.transformer, ours.vae, ours.scheduler = other.transformer, other.vae, other.scheduler
    assert ours(**SMALL)[0].shape == (5, 32, 48, 3)
    assert (ours.transformer, ours.vae, ours.scheduler) == (other.transformer, other.vae, other.scheduler)


def test_from_pretrained_takes_a_folder_a_dtype_and_a_device(folder_of):
    pipe = EditWanPipeline.from_pretrained(folder_of("random"), torch_dtype=torch.bfloat16, device="cpu")
    assert type(pipe) is EditWanPipeline
    assert pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.transformer.patch_embedding.weight.dtype == torch.bfloat16
    assert pipe.device == torch.device("cpu")


def test_a_hub_id_is_found_in_an_offline_cache(tmp_path, folder_of):
    """The layout of huggingface_hub's cache; `revision` names a branch, tag or commit."""
    repository = tmp_path / "models--someone--tiny-wan"
    commits = {"main": "a" * 40, "v2": "b" * 40}
    for (branch, commit), name in zip(commits.items(), ("random", "random-expand"), strict=True):
        shutil.copytree(folder_of(name), repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    offline = {"cache_dir": tmp_path, "local_files_only": True}
    for branch, expands in (("main", False), ("v2", True)):
        ours = EditWanPipeline.from_pretrained("someone/tiny-wan", revision=branch, **offline)
        stock = WanPipeline.from_pretrained("someone/tiny-wan", revision=branch, **offline)
        assert ours.config.expand_timesteps is stock.config.expand_timesteps is expands
        made = [quiet(pipe)(**SMALL, generator=torch.Generator().manual_seed(0)).frames for pipe in (ours, stock)]
        assert np.array_equal(*made)


def test_what_a_path_cannot_be(tmp_path):
    with pytest.raises(ModelError, match="builtin:tiny_wan"):
        EditWanPipeline.from_pretrained("builtin:huge_wan")
    with pytest.raises(OSError, match="local disk"):
        EditWanPipeline.from_pretrained("someone/absent", cache_dir=tmp_path, local_files_only=True)
