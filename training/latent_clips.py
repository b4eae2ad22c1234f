"""What transformers learn from: clips that are encoded once, their captions, noise levels, and worn histories."""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from training.clip_vae import encode_clip
from training.loop import mixed_precision
from training.models import CAPTION_TOKENS, MAX_TEXT_TOKENS, build_tokenizer
from training.recipe import Recipe
from training.sources import Source


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

    def draw(self, number: int, changing: float) -> tuple[Tensor, Tensor]:
        """Indices [number] of clips, a share of them of changing ones, and which these are, bool [number]."""
        device = self.ids.device
        changes = torch.rand(number, device=device) < changing
        index = torch.randint(self.plain, (number,), device=device)
        return torch.where(changes, torch.randint(self.plain, len(self.ids), (number,), device=device), index), changes

    def renew(self, fresh: "LatentClips", turn: int) -> None:
        """Overwrite some clips by fresh ones of the same source, changing ones by changing ones, the next each turn."""
        parts = ((0, self.plain, fresh.plain), (self.plain, len(self.ids), len(fresh.ids) - fresh.plain))
        slots = torch.cat(
            [first + (turn * number + torch.arange(number)) % (end - first) for first, end, number in parts]
        ).to(self.ids.device)
        for field in fields(self):
            getattr(self, field.name).index_copy_(0, slots, getattr(fresh, field.name))


@dataclass(frozen=True)
class Renewal:
    """Replaces clips while a transformer learns from them, so that it sees none too often; sources take turns."""

    clips: tuple[LatentClips, ...]
    sources: tuple[Source, ...]
    vae: AutoencoderKLWan
    recipe: Recipe
    seed: int
    device: str

    def __call__(self, step: int) -> None:
        """Renew a batch of clips, now and then."""
        if not self.recipe.renew_every or step % self.recipe.renew_every:
            return
        turn = step // self.recipe.renew_every
        which, round_ = turn % len(self.clips), turn // len(self.clips)
        number, seed = self.recipe.encode_batch, self.seed + 1_000_003 * (turn + 1)
        fresh = encode_clips(self.vae, self.sources[which], number, self.recipe, seed, self.device)
        self.clips[which].renew(fresh, round_)


def encode_clips(
    vae: AutoencoderKLWan, source: Source, number: int, recipe: Recipe, seed: int, device: str, change_every: int = 1
) -> LatentClips:
    """Render and encode so many clips; changes are at multiples of `change_every` latents."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = build_tokenizer()
    num_frames = 4 * recipe.clip_latents - 3
    before = source.draw(number, generator)
    after = source.changed(before, generator)
    # A change that any length of history can precede and the rest of a window follow.
    lengths = recipe.history_lengths
    low, high = max(lengths) + 1, recipe.clip_latents - recipe.window + min(lengths)
    low, high = -(-low // change_every), high // change_every
    change = change_every * torch.randint(low, high + 1, (number,), generator=generator)
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


def noise_levels(number: int, recipe: Recipe, device: torch.device) -> Tensor:
    """An even number of noise levels [number], spread evenly over the quantiles of their two distributions."""
    half = number // 2
    quantile = (torch.arange(half, device=device) + torch.rand(2, half, device=device)) / half
    middle = shifted(torch.special.ndtri(quantile[0]).sigmoid(), recipe.flow_shift)
    return torch.cat([middle, shifted(quantile[1], recipe.high_noise_shift)])


def worn(x0: Tensor, recipe: Recipe) -> Tensor:
    """Latents [B, C, T, h, w] as a sampler leaves them, not quite clean: so that errors are not passed on."""
    shape = (len(x0), 1, 1, 1, 1)
    some = (torch.rand(shape, device=x0.device) < 0.75).float()
    noise = recipe.history_noise * torch.rand(shape, device=x0.device) * torch.randn_like(x0)
    tint = recipe.history_tint * torch.rand(shape, device=x0.device) * torch.randn_like(x0[:, :, :1, :1, :1])
    return x0 + some * (noise + tint)


@dataclass(frozen=True)
class CaptionEncoder:
    """Token ids [B, 48] to what WanPipeline hands to the transformer: [B, 512, D], zeros after each caption's end.

    `length` may be less than 512: how many of these tokens there are.
    """

    text_encoder: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerFast
    recipe: Recipe
    length: int = MAX_TEXT_TOKENS

    def __call__(self, ids: Tensor, empty: float, foreign: Tensor | None = None) -> Tensor:
        """Encode captions, of which a share `empty` is left out and some words are not known.

        The recipe's share of them is replaced by `foreign` ones, where there are any.
        """
        pad, eos, unk = (getattr(self.tokenizer, f"{name}_token_id") for name in ("pad", "eos", "unk"))
        kind = torch.rand(len(ids), 1, device=ids.device)
        ids = torch.where(kind < empty, self._empty(ids), ids)
        unknown_share = torch.full_like(kind, self.recipe.unknown_words)
        if foreign is not None:
            is_foreign = (kind >= empty) & (kind < empty + self.recipe.foreign_captions)
            ids = torch.where(is_foreign, foreign, ids)
            unknown_share = torch.where(is_foreign, 0.5, unknown_share)
        unknown = torch.rand(ids.shape, device=ids.device) < unknown_share
        unknown |= kind > 1 - self.recipe.unknown_captions
        return self._encode(torch.where(unknown & (ids != pad) & (ids != eos), unk, ids))

    def empty(self, ids: Tensor) -> Tensor:
        """As many empty captions."""
        return self._encode(self._empty(ids))

    def _empty(self, ids: Tensor) -> Tensor:
        empty = torch.full_like(ids, self.tokenizer.pad_token_id)
        empty[:, :1].fill_(self.tokenizer.eos_token_id)  # assigning would copy it from the host
        return empty

    def _encode(self, ids: Tensor) -> Tensor:
        mask = ids != self.tokenizer.pad_token_id
        hidden = self.text_encoder(ids, mask.long()).last_hidden_state * mask[..., None]
        return F.pad(hidden, (0, 0, 0, self.length - ids.shape[1]))
