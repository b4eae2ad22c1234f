"""Loading a model where others are loaded."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from edit_ray.engine.loading import load_pipeline
from edit_ray.engine.options import ModelOptions
from edit_ray.errors import ModelError
from edit_ray.testing import save_random_wan

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")


def test_models_that_are_loaded_at_once_have_all_their_weights(tmp_path):
    model = ModelOptions(path=str(save_random_wan(tmp_path / "wan")), device="cpu")
    with ThreadPoolExecutor(3) as threads:
        pipes = list(threads.map(load_pipeline, [model] * 6))
    weights = [pipe.transformer.state_dict() for pipe in pipes]
    assert all(not weight.is_meta for of_pipe in weights for weight in of_pipe.values())
    assert all(weights[0][name].equal(other[name]) for other in weights[1:] for name in weights[0])


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_weights_that_are_a_pickle_are_refused_unread(tmp_path, part):
    folder = save_random_wan(tmp_path / "wan")
    (weights,) = (folder / part).glob("*.safetensors")
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(load_file(weights), weights.with_name(name))
    weights.unlink()
    with pytest.raises(ModelError, match=r"safetensors"):
        load_pipeline(ModelOptions(path=str(folder), device="cpu"))
