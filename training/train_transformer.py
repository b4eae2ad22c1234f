"""Stage 2: the text encoder and the transformer, together, by flow matching on latents that are encoded once."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5EncoderModel

from training.clip_vae import encode_clip
from training.loop import Call, Loop, mixed_precision
from training.models import (
    CAPTION_TOKENS,
    MAX_TEXT_TOKENS,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    save_pipeline,
)
from training.recipe import FIRST_TRAINING_SEED, Recipe
from training.sources import Source, sources_of


@dataclass(frozen=True)
class LatentClips:
    """Encoded clips of one source: `latents` [N, T, C, h, w] fp16, normalised; `ids` [N, 48], the captions' tokens.

    The last quarter changes: from latent index `change` [N] on, those clips cross-fade into what `changed_ids` says.
    """

    latents: Tensor
    ids: Tensor
    changed_ids: Tensor
    change: Tensor

    @property
    def plain(self) -> int:
        """How many clips, the first ones, do not change."""
        return len(self.ids) - len(self.ids) // 4


def encode_clips(
    vae: AutoencoderKLWan, source: Source, number: int, recipe: Recipe, seed: int, device: str
) -> LatentClips:
    """Render and encode so many clips."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = build_tokenizer()
    num_frames = 4 * recipe.clip_latents - 3
    before = source.draw(number, generator)
    after = source.changed(before, generator)
    # A change that any length of history can precede and the rest of a window follow.
    lengths = recipe.history_lengths
    low, high = max(lengths) + 1, recipe.clip_latents - recipe.window + min(lengths)
    change = torch.randint(low, high + 1, (number,), generator=generator)
    mean = torch.tensor(vae.config.latents_mean, device=device)[:, None, None, None]
    std = torch.tensor(vae.config.latents_std, device=device)[:, None, None, None]

    def tokens(texts: list[str]) -> Tensor:
        batch = tokenizer(texts, padding="max_length", max_length=CAPTION_TOKENS, truncation=True, return_tensors="pt")
        return batch.input_ids.to(device)  # type: ignore[no-any-return]

    ids, changed_ids = tokens(source.captions(before, generator)), tokens(source.captions(after, generator))
    latents = []
    plain = number - number // 4
    with torch.no_grad():
        for start in range(0, number, recipe.encode_batch):
            rows = slice(start, start + recipe.encode_batch)
            first, second = before[rows].to(device), after[rows].to(device)
            frame = torch.where(torch.arange(number) >= plain, 4 * change - 3, num_frames)[rows].to(device)
            changes = start + recipe.encode_batch > plain
            clip = (
                source.render_change(first, second, frame, num_frames) if changes else source.render(first, num_frames)
            )
            with mixed_precision(device):  # not the rendering
                encoded = encode_clip(vae, clip).float()
            latents.append(((encoded - mean) / std).transpose(1, 2).half())
    return LatentClips(torch.cat(latents), ids, changed_ids, change.to(device))


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Noise levels in [0, 1] moved towards 1, as the schedulers' `flow_shift` does."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True)
class FlowLoss:
    """Flow matching on fresh windows: x_t = (1 - s) x_0 + s noise, target noise - x_0, timestep 1000 s.

    Most batches start from nothing: the window is a clip's begin, with one timestep a clip. In the others the window
    comes from the middle of a clip and its first latents, the history, are clean, carry timestep 0 and no loss.
    """

    clips: tuple[LatentClips, ...]
    transformer: WanTransformer3DModel
    text_encoder: UMT5EncoderModel
    recipe: Recipe
    pad: int
    eos: int
    unk: int

    def __call__(self, step: int, progress: float) -> Tensor:
        source, window, history = self.recipe.turns[step % len(self.recipe.turns)]
        number = self.recipe.batch * self.recipe.window // (2 * window) * 2
        clips = self.clips[source]
        return self.from_history(clips, number, window) if history else self.from_text(clips, number, window)

    def from_text(self, clips: LatentClips, number: int, window: int) -> Tensor:
        """Loss of a batch of clips from their beginning."""
        index = torch.randint(clips.plain, (number,), device=clips.ids.device)
        x0 = clips.latents[index, :window].transpose(1, 2).float()
        sigma = self._sigma(number, x0.device)
        prediction, target = self._predict(x0, sigma, (1000 * sigma).floor(), clips.ids[index], None)
        error = (prediction - target).square().mean(dim=(0, 1, 3, 4))
        weight = torch.ones_like(error)
        weight[0] = self.recipe.first_frame_weight
        return (error * weight).sum() / weight.sum()

    def from_history(self, clips: LatentClips, number: int, window: int) -> Tensor:
        """Loss of a batch of continuations, a third of them into a changed scene."""
        recipe, device = self.recipe, clips.ids.device
        lengths = torch.tensor(recipe.history_lengths, device=device)
        length = lengths[torch.randint(len(lengths), (number,), device=device)]
        changes = torch.rand(number, device=device) < 1 / 3
        index = torch.randint(clips.plain, (number,), device=device)
        changing = torch.randint(clips.plain, len(clips.ids), (number,), device=device)
        index = torch.where(changes, changing, index)
        last = recipe.clip_latents - window
        offset = torch.where(
            changes, clips.change[index] - length, torch.randint(1, last + 1, (number,), device=device)
        )
        slots = torch.arange(window, device=device)
        x0 = clips.latents[index[:, None], offset[:, None] + slots].transpose(1, 2).float()
        ids = torch.where(changes[:, None], clips.changed_ids[index], clips.ids[index])
        history = slots < length[:, None]
        sigma = self._sigma(number, device)
        tokens = x0.shape[-2] * x0.shape[-1] // 4
        timestep = torch.where(history, 0.0, (1000 * sigma).floor()[:, None]).repeat_interleave(tokens, dim=1)
        prediction, target = self._predict(x0, sigma, timestep, ids, history)
        error = (prediction - target).square().mean(dim=(1, 3, 4))
        return (error * ~history).sum() / (~history).sum()

    def _sigma(self, number: int, device: torch.device) -> Tensor:
        """Noise levels [number], spread evenly over the quantiles of their two distributions."""
        half = number // 2
        quantile = (torch.arange(half, device=device) + torch.rand(2, half, device=device)) / half
        middle = shifted(torch.special.ndtri(quantile[0]).sigmoid(), self.recipe.flow_shift)
        return torch.cat([middle, shifted(quantile[1], self.recipe.high_noise_shift)])

    def _predict(
        self, x0: Tensor, sigma: Tensor, timestep: Tensor, ids: Tensor, history: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Prediction and target, both [B, C, T, h, w] fp32; slots in `history` [B, T] are shown, not noised."""
        noise = torch.randn_like(x0)
        share = sigma[:, None, None, None, None]
        noised = (1 - share) * x0 + share * noise
        if history is not None:
            noised = torch.where(history[:, None, :, None, None], self._worn(x0), noised)
        with mixed_precision(x0.device.type):
            text = self._encode_text(ids)
            prediction = self.transformer(
                hidden_states=noised, timestep=timestep, encoder_hidden_states=text, return_dict=False
            )[0]
        return prediction.float(), noise - x0

    def _worn(self, x0: Tensor) -> Tensor:
        """History as a sampler leaves it, not quite clean: so that errors are not passed on from segment to segment."""
        shape = (len(x0), 1, 1, 1, 1)
        worn = (torch.rand(shape, device=x0.device) < 0.75).float()
        noise = self.recipe.history_noise * torch.rand(shape, device=x0.device) * torch.randn_like(x0)
        tint = self.recipe.history_tint * torch.rand(shape, device=x0.device) * torch.randn_like(x0[:, :, :1, :1, :1])
        return x0 + worn * (noise + tint)

    def _encode_text(self, ids: Tensor) -> Tensor:
        """What WanPipeline hands to the transformer: [B, 512, D], zeros after each caption's end.

        Some captions are empty, some hold words that the tokenizer does not know.
        """
        empty = torch.full_like(ids, self.pad)
        empty[:, 0] = self.eos
        kind = torch.rand(len(ids), 1, device=ids.device)
        ids = torch.where(kind < self.recipe.empty_captions, empty, ids)
        unknown = torch.rand(ids.shape, device=ids.device) < self.recipe.unknown_words
        unknown |= kind > 1 - self.recipe.unknown_captions
        ids = torch.where(unknown & (ids != self.pad) & (ids != self.eos), self.unk, ids)
        mask = ids != self.pad
        hidden = self.text_encoder(ids, mask.long()).last_hidden_state * mask[..., None]
        return F.pad(hidden, (0, 0, 0, MAX_TEXT_TOKENS - ids.shape[1]))


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
    loop = Loop("transformer", modules, call, recipe.learning_rate)
    torch.manual_seed(loop.seed)
    sources = zip(sources_of(recipe), recipe.clips, strict=True)
    clips = tuple(encode_clips(vae, source, number, recipe, loop.seed, device) for source, number in sources)
    if ranks.rank == 0:
        for one in clips:
            print(f"encoded {len(one.ids)} clips a process, spread {one.latents.float().std().item():.3f}")
    if device == "cuda":
        torch._dynamo.config.recompile_limit = 32  # a kernel each for the shapes of the turns
        for block in transformer.blocks:
            block.compile(dynamic=False)
    special = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    loop.run(FlowLoss(clips, transformer, text_encoder, recipe, *special))
    if ranks.rank == 0:
        save_pipeline(output, vae, transformer, text_encoder, recipe)
    ranks.wait()
    return loop
