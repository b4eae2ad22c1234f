"""What `history` does to the latents."""

import pytest
import torch

from edit_ray.engine.continuity import check_history, hold_history


def test_hold_history_replaces_the_first_slots_only():
    latents, history = torch.zeros(2, 4, 5, 2, 2), torch.ones(2, 4, 3, 2, 2)
    held = hold_history(latents, history)
    assert held.sum(dim=(0, 1, 3, 4)).tolist() == [32, 32, 32, 0, 0]
    assert latents.sum() == 0, "the argument stays as it is"
    assert hold_history(latents, None) is latents


@pytest.mark.parametrize(
    "shape", [(4, 3, 2, 2), (1, 4, 0, 2, 2), (1, 4, 3, 2, 3), (1, 3, 3, 2, 2), (2, 4, 3, 2, 2), (1, 4, 5, 2, 2)]
)
def test_history_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="valid"):
        check_history(torch.zeros(shape), torch.zeros(1, 4, 5, 2, 2))


def test_history_takes_the_type_of_the_latents():
    history = check_history(torch.zeros(1, 4, 3, 2, 2, dtype=torch.float64), torch.zeros(1, 4, 5, 2, 2))
    assert history.dtype == torch.float32
