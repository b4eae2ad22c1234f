import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from edit_ray.engine.continuity import latent_tail, load_latents, save_latents
from edit_ray.errors import EditRayError


def test_latents_come_back_bit_for_bit(tmp_path):
    latents = torch.randn(1, 16, 6, 4, 4)
    save_latents(tmp_path / "a.safetensors", latents)
    assert torch.equal(load_latents(tmp_path / "a.safetensors"), latents)


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5), count=st.integers(1, 12))
def test_the_tail_is_the_end_of_the_stream(tmp_path_factory, lengths, count):
    folder = tmp_path_factory.mktemp("latents")
    parts = [torch.randn(1, 2, length, 2, 2) for length in lengths]
    paths = [folder / f"{index}.safetensors" for index in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        save_latents(path, part)
    assert torch.equal(latent_tail(paths, count), torch.cat(parts, dim=2)[:, :, -count:])


def test_what_is_no_latents_file_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(EditRayError, match="cannot read the latents"):
        load_latents(path)
    path.write_bytes(b"\0" * 64)
    with pytest.raises(EditRayError, match="cannot read the latents"):
        load_latents(path)
    save_file({"latents": torch.zeros(2, 3)}, path)
    with pytest.raises(EditRayError, match=r"not float32 \[1, C, t, h, w\]"):
        load_latents(path)
