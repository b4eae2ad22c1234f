"""Pairs of pipelines over the same weights: diffusers' own and ours, loaded once per model."""

import functools
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import WanPipeline

import edit_ray
from edit_ray import EditWanPipeline
from edit_ray.testing import save_random_wan
from tests.calls import quiet

BUILTIN = "builtin:tiny_wan"
BUILTIN_FOLDER = Path(edit_ray.__file__).parent / "assets" / "tiny_wan"
RANDOM = {
    "random": {},
    "random-expand": {"expand_timesteps": True},
    "random-two-experts": {"two_experts": True, "boundary_ratio": 0.9},
}
MODELS = ["random", "random-expand", BUILTIN]


class Pair(NamedTuple):
    """The same weights twice; every test may assign schedulers and the like, so each gets fresh pipeline objects."""

    stock: WanPipeline
    ours: EditWanPipeline


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread) -> None:
    """The number of threads changes bits."""


@functools.cache
def _loaded(folder: Path, dtype: torch.dtype) -> WanPipeline:
    return WanPipeline.from_pretrained(folder, dtype=dtype)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """The folder of a model by its name in `MODELS`."""

    @functools.cache
    def folder(name: str) -> Path:
        if name == BUILTIN:
            return BUILTIN_FOLDER
        return save_random_wan(tmp_path_factory.mktemp(name), **RANDOM[name])

    return folder


@pytest.fixture(scope="session")
def pair_of(folder_of):
    """A function that pairs up the pipelines of one model."""

    def pair(name: str, dtype: torch.dtype = torch.float32) -> Pair:
        components = dict(_loaded(folder_of(name), dtype).components)
        config = {key: _loaded(folder_of(name), dtype).config[key] for key in ("expand_timesteps", "boundary_ratio")}
        pipes = Pair(WanPipeline(**components, **config), EditWanPipeline(**components, **config))
        for pipe in pipes:
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
            quiet(pipe)
        return pipes

    return pair


@pytest.fixture(params=MODELS)
def pair(request, pair_of) -> Pair:
    """Both pipelines, for every model."""
    return pair_of(request.param)
