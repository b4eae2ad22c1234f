"""What makes the transformer's training quick computes the same, and its optimizer learns and resumes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

from training.latent_clips import LatentClips
from training.loop import Call, Loop
from training.models import CAPTION_TOKENS, MAX_TEXT_TOKENS, build_transformer
from training.muon import Muon, orthogonalised
from training.quick_forward import QuickTransformer, padding_bias
from training.recipe import FULL, SMOKE
from training.train_transformer import matrices_of

RECIPE = replace(FULL, layers=2, heads=2, ffn_dim=96)
Forward = Callable[..., tuple[torch.Tensor]]


def test_the_bias_makes_few_tokens_count_as_many() -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-3)):
        counted = padding_bias(torch.device("cpu")).to(dtype).double()[CAPTION_TOKENS:].exp().sum()
        assert abs(counted / (MAX_TEXT_TOKENS - CAPTION_TOKENS) - 1) < tolerance


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the tracer looks at it
@pytest.mark.parametrize("with_history", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_it_is_the_transformers_forward_and_backward(
    with_history: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled:  # what the compiler traces, without its kernels
        real = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, dynamic: real(f, dynamic=dynamic, backend="aot_eager"))
    torch.manual_seed(0)
    transformer = build_transformer(RECIPE)
    for parameter in transformer.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)  # biases and norms count
    latents, text = torch.randn(2, RECIPE.vae_z_dim, 3, 4, 6), torch.randn(2, CAPTION_TOKENS, RECIPE.text_dim)
    text[0, 9:] = text[1, 30:] = 0
    times = torch.tensor([[0.0, 700.0, 700.0], [0.0, 0.0, 90.0]]) if with_history else torch.tensor([300.0, 900.0])
    tokens = times.repeat_interleave(6, dim=1) if with_history else times
    padded = F.pad(text, (0, 0, 0, MAX_TEXT_TOKENS - CAPTION_TOKENS))

    def outcome(forward: Forward, timestep: torch.Tensor, text: torch.Tensor) -> list[torch.Tensor]:
        text = text.clone().requires_grad_()
        transformer.zero_grad()
        flow = forward(hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]
        (flow * torch.linspace(-1, 1, flow.numel()).view_as(flow)).sum().backward()
        gradients = [parameter.grad.clone() for parameter in transformer.parameters() if parameter.grad is not None]
        assert text.grad is not None
        return [flow.detach(), text.grad[:, :CAPTION_TOKENS], *gradients]

    whole = outcome(transformer, tokens, padded)
    quick = outcome(QuickTransformer(transformer, compiled), times, text)
    assert len(whole) == len(quick) == 2 + len(list(transformer.parameters()))
    apart = torch.stack([(one - other).norm() / one.norm() for one, other in zip(whole, quick, strict=True)])
    assert apart[0] < 1e-5
    assert apart.median() < 1e-4
    assert apart.max() < 5e-3  # gradients that nearly cancel, in fp32


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 40), (2, 40, 16)])
def test_singular_values_become_equal_and_vectors_stay(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    after = orthogonalised(matrices)
    values = torch.linalg.svdvals(after)
    assert values.median() > 0.6
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    assert ((left @ right) * after).sum() > 0.9 * (left @ right).norm() * after.norm()


def test_muon_steps_are_as_long_as_adamws() -> None:
    matrix = torch.nn.Parameter(torch.zeros(64, 32))
    matrix.grad = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    Muon([matrix], lr=torch.tensor(0.1)).step()
    assert 0.1 * 0.2 * 0.5 < matrix.detach().square().mean().sqrt() < 0.1 * 0.2 * 1.5


def test_muon_moves_matrices_adamw_the_rest_and_both_resume(tmp_path: Path) -> None:
    def new_loop(minutes: float) -> tuple[WanTransformer3DModel, Loop]:
        torch.manual_seed(0)
        model = build_transformer(replace(SMOKE, layers=1))
        call = Call(tmp_path, tmp_path, replace(SMOKE, warmup_steps=1), minutes)
        return model, Loop("both", {"model": model}, call, 1e-2, matrices_of(model))

    model, loop = new_loop(minutes=1e-2)
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def loss(step: int, progress: float) -> torch.Tensor:
        return torch.stack([(parameter - 0.1).square().mean() for parameter in model.parameters()]).mean()

    first = loss(0, 0.0).item()
    loop.run(loss)
    assert loss(0, 0.0).item() < first
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    _, resumed = new_loop(minutes=1e-2)
    saved, again = loop.optimizer.state_dict(), resumed.optimizer.state_dict()
    assert torch.equal(saved["muon"]["state"][0]["momentum"], again["muon"]["state"][0]["momentum"])
    assert again["adamw"]["state"][0]["step"] == loop.step == resumed.step


def test_renewed_clips_take_the_place_of_their_kind_in_turns() -> None:
    def clips(number: int, value: int) -> LatentClips:
        ids = torch.full((number, 2), value)
        return LatentClips(torch.full((number, 1, 1, 1, 1), float(value)), ids, ids.clone(), ids[:, 0].clone())

    own = clips(12, 0)  # nine plain ones
    for turn in range(2):
        own.renew(clips(8, turn + 1), turn)  # six of them
    assert own.change.tolist() == [2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 1, 2]
    assert own.latents[:, 0, 0, 0, 0].tolist() == own.change.tolist() == own.ids[:, 1].tolist()
