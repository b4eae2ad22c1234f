"""LoRA files of random weights, in the dialects that people publish."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

DIALECTS = ("diffusers", "wan", "kohya", "lightx2v")
_ORIGINAL = {
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_out.0": "cross_attn.o",
    "attn1.to_": "self_attn.",
    "attn2.to_": "cross_attn.",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
}


class Change(NamedTuple):
    """What a LoRA adds to a linear layer, at the weight 1."""

    weight: Tensor
    bias: Tensor | None = None


def save_lora(
    file: Path, transformer: nn.Module, dialect: str = "diffusers", *, seed: int = 0, rank: int = 3, layers=""
):
    """Write a LoRA for a transformer's linear layers whose names contain `layers`; returns the changes by layer."""
    generator, tensors, changes = torch.Generator().manual_seed(seed), {}, {}

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    for name, linear in transformer.named_modules():
        in_block = name.startswith("blocks.")
        outside = dialect != "kohya" and any(part in name for part in ("time_proj", "text_emb", "proj_out"))
        if not isinstance(linear, nn.Linear) or layers not in name or not (in_block or outside):
            continue
        down, up = draw(rank, linear.in_features), draw(linear.out_features, rank)
        if dialect == "diffusers":
            key, roles, scale = f"transformer.{name}", ("lora_A", "lora_B"), 1.0
        else:
            for ours, theirs in _ORIGINAL.items():
                name_there = name.replace(ours, theirs)
                if name_there != name:
                    break
            key, roles, scale = f"diffusion_model.{name_there}", ("lora_down", "lora_up"), 1.0
            if dialect == "kohya":
                key = "lora_unet_" + name_there.replace(".", "_")
            if dialect != "wan" and in_block:
                scale, tensors[f"{key}.alpha"] = 0.5 / rank, torch.tensor(0.5)
        bias = draw(linear.out_features) if dialect == "lightx2v" else None
        if bias is not None:
            tensors[f"{key}.diff_b"] = bias
        if dialect == "lightx2v" and name == "proj_out":
            tensors[f"{key}.diff"] = whole = draw(linear.out_features, linear.in_features)
            changes[name] = Change(whole, bias)
            continue
        tensors |= {f"{key}.{roles[0]}.weight": down, f"{key}.{roles[1]}.weight": up}
        changes[name] = Change(scale * up @ down, bias)
    if dialect == "lightx2v":  # zeroes, which diffusers leaves out
        tensors["diffusion_model.blocks.0.norm3.diff"] = torch.zeros(24)
    save_file(tensors, file)
    return changes
