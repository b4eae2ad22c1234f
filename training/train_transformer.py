"""Stage 2: the text encoder and the transformer, together, by flow matching on latents that are encoded once."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from training.latent_clips import CaptionEncoder, LatentClips, Renewal, encode_clips, noise_levels, worn
from training.loop import Call, Loop, mixed_precision
from training.models import (
    CAPTION_TOKENS,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    save_pipeline,
)
from training.quick_forward import QuickTransformer
from training.recipe import FIRST_TRAINING_SEED, Recipe
from training.sources import sources_of


@dataclass(frozen=True)
class FlowLoss:
    """Flow matching on fresh windows: x_t = (1 - s) x_0 + s noise, target noise - x_0, timestep 1000 s.

    Most batches start from nothing: the window is a clip's begin, with one timestep a clip. In the others the window
    comes from the middle of a clip and its first latents, the history, are clean, carry timestep 0 and no loss.

    Steps of one turn do the same to other numbers, and can be one CUDA graph: nothing here waits for the GPU or copies
    from the host, once what is made once is there.
    """

    clips: tuple[LatentClips, ...]
    transformer: QuickTransformer
    captions: CaptionEncoder
    recipe: Recipe

    def __call__(self, step: int, progress: float) -> Tensor:
        source, window, history = self.turn(step)
        number = self.recipe.batch * self.recipe.window // (2 * window) * 2
        loss = self.from_history if history else self.from_text
        return loss(self.clips[source], number, window, self.foreign(source, number))

    def turn(self, step: int) -> tuple[int, int, bool]:
        """The recipe's turn that a step is."""
        return self.recipe.turns[step % len(self.recipe.turns)]

    def foreign(self, source: int, number: int) -> Tensor:
        """Captions [number, 48] of the world's clips for flat ones, and the other way round."""
        ids = self.clips[0 if source else 1].ids
        return ids[torch.randint(len(ids), (number,), device=ids.device)]

    def from_text(self, clips: LatentClips, number: int, window: int, foreign: Tensor) -> Tensor:
        """Loss of a batch of clips from their beginning."""
        index = torch.randint(clips.plain, (number,), device=clips.ids.device)
        x0 = clips.latents[index, :window].transpose(1, 2).float()
        sigma = noise_levels(number, self.recipe, x0.device)
        prediction, target = self._predict(x0, sigma, (1000 * sigma).floor(), (clips.ids[index], foreign), None)
        error = (prediction - target).square().mean(dim=(0, 1, 3, 4))
        more = self.recipe.first_frame_weight - 1
        return (error.sum() + more * error[0]) / (len(error) + more)

    def from_history(self, clips: LatentClips, number: int, window: int, foreign: Tensor) -> Tensor:
        """Loss of a batch of continuations, a third of them into a changed scene."""
        recipe, device = self.recipe, clips.ids.device
        lengths = _on_device(recipe.history_lengths, device)
        length = lengths[torch.randint(len(lengths), (number,), device=device)]
        index, changes = clips.draw(number, 1 / 3)
        last = recipe.clip_latents - window
        offset = torch.where(
            changes, clips.change[index] - length, torch.randint(1, last + 1, (number,), device=device)
        )
        slots = torch.arange(window, device=device)
        x0 = clips.latents[index[:, None], offset[:, None] + slots].transpose(1, 2).float()
        ids = torch.where(changes[:, None], clips.changed_ids[index], clips.ids[index])
        history = slots < length[:, None]
        sigma = noise_levels(number, recipe, device)
        timestep = torch.where(history, 0.0, (1000 * sigma).floor()[:, None])
        prediction, target = self._predict(x0, sigma, timestep, (ids, foreign), history)
        error = (prediction - target).square().mean(dim=(1, 3, 4))
        return (error * ~history).sum() / (~history).sum()

    def _predict(
        self, x0: Tensor, sigma: Tensor, timestep: Tensor, captions: tuple[Tensor, Tensor], history: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Prediction and target, both [B, C, T, h, w] fp32; slots in `history` [B, T] are shown, not noised."""
        noise = torch.randn_like(x0)
        share = sigma[:, None, None, None, None]
        noised = (1 - share) * x0 + share * noise
        if history is not None:
            noised = torch.where(history[:, None, :, None, None], worn(x0, self.recipe), noised)
        with mixed_precision(x0.device.type):
            ids, foreign = captions
            text = self.captions(ids, self.recipe.empty_captions, foreign)
            prediction = self.transformer(
                hidden_states=noised, timestep=timestep, encoder_hidden_states=text, return_dict=False
            )[0]
        return prediction.float(), noise - x0


def matrices_of(transformer: WanTransformer3DModel) -> list[Tensor]:
    """The matrices of its blocks."""
    return [parameter for parameter in transformer.blocks.parameters() if parameter.ndim == 2]


@cache
def _on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def flow_loss(
    clips: tuple[LatentClips, ...],
    transformer: WanTransformer3DModel,
    text_encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
) -> FlowLoss:
    """The loss, compiled on a GPU."""
    compiled = transformer.device.type == "cuda"
    if compiled:
        text_encoder.compile(dynamic=False)
    captions = CaptionEncoder(text_encoder, tokenizer, recipe, CAPTION_TOKENS)
    return FlowLoss(clips, QuickTransformer(transformer, compiled), captions, recipe)


def train_transformer(call: Call, start: Path | None = None) -> Loop:
    """Train on `output / "vae"`, and write the whole model into `output` in fp16.

    Weights are fresh, or those of the finished model in the folder `start`.
    """
    recipe, device, ranks, output = call.recipe, call.device, call.ranks, call.output
    torch.manual_seed(FIRST_TRAINING_SEED + ranks.rank)
    vae = AutoencoderKLWan.from_pretrained(output / "vae", dtype=torch.float32).to(device)
    tokenizer = build_tokenizer()
    if start is None:
        transformer, text_encoder = build_transformer(recipe), build_text_encoder(recipe, tokenizer)
    else:
        transformer = WanTransformer3DModel.from_pretrained(start / "transformer", dtype=torch.float32)
        text_encoder = UMT5EncoderModel.from_pretrained(start / "text_encoder", dtype=torch.float32)
    transformer.to(device).train()
    text_encoder.to(device).train()
    modules = {"transformer": transformer, "text_encoder": text_encoder}
    loop = Loop("transformer", modules, call, recipe.learning_rate, matrices_of(transformer) if recipe.muon else None)
    torch.manual_seed(loop.seed)
    sources = zip(sources_of(recipe), recipe.clips, strict=True)
    clips = tuple(encode_clips(vae, source, number, recipe, loop.seed, device) for source, number in sources)
    if ranks.rank == 0:
        for one in clips:
            print(f"encoded {len(one.ids)} clips a process, spread {one.latents.float().std().item():.3f}")
    loss = flow_loss(clips, transformer, text_encoder, tokenizer, recipe)
    renewal = Renewal(clips, sources_of(recipe), vae, recipe, loop.seed, device)
    loop.run(loss, loss.turn, renewal)
    if ranks.rank == 0:
        save_pipeline(output, vae, transformer, text_encoder, recipe)
    ranks.wait()
    return loop
