"""Loading a model where others are loaded."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from edit_ray.engine.loading import load_pipeline
from edit_ray.engine.options import ModelOptions
from edit_ray.testing import save_random_wan

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")


def test_models_that_are_loaded_at_once_have_all_their_weights(tmp_path):
    model = ModelOptions(path=str(save_random_wan(tmp_path / "wan")), device="cpu")
    with ThreadPoolExecutor(3) as threads:
        pipes = list(threads.map(load_pipeline, [model] * 6))
    weights = [pipe.transformer.state_dict() for pipe in pipes]
    assert all(not weight.is_meta for of_pipe in weights for weight in of_pipe.values())
    assert all(weights[0][name].equal(other[name]) for other in weights[1:] for name in weights[0])
