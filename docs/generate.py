"""Writes the pages that are made from the code: `python docs/generate.py`.

A test compares them with the committed ones.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edit_ray.cache.options import CacheOptions
from edit_ray.cache.policies import POLICIES
from edit_ray.cache.policies.option_types import option_schema
from edit_ray.cli import main
from edit_ray.config import Config
from edit_ray.config.model import PromptSegment
from edit_ray.config.strict_yaml import dump
from edit_ray.options import Options, describe
from edit_ray.tiers.options import NODE_VARIABLES

ROOT = Path(__file__).resolve().parents[1]

CONFIGURATION = """# Configuration

Made from the models that read a configuration, by `python docs/generate.py`; do not edit.

A run's configuration is one YAML file; `--set SECTION.KEY=VALUE` changes one value, `--print-config` shows all of them.
Only `video` and `prompt_segments` must be given. An unknown key is an error that names the nearest known one, every
mistake is told at once, and nothing starts before all is right. [configs/tiny.yaml](../configs/tiny.yaml) has every key
with a comment, [wan21_t2v_1_3b.yaml](../configs/wan21_t2v_1_3b.yaml) and
[wan21_t2v_14b.yaml](../configs/wan21_t2v_14b.yaml) are for Wan2.1.
"""

ENVIRONMENT = """## Environment

| variable | of | what it says |
|---|---|---|
| `EDIT_RAY_OUTPUT` | client, job | the folder that holds runs, unless `--output` or `output.directory` says it |
| `EDIT_RAY_OWNER` | client, job | whose the runs are that it submits, instead of the login name |
| `EDIT_RAY_MODEL_ROOTS` | every node | folders, parted by `:`, from which alone models are loaded |
| `RAY_ADDRESS`, `RAY_AUTH_MODE`, `RAY_AUTH_TOKEN` | client, job, nodes | Ray's own: which cluster, and its token |

`store.directory` may name variables of the node that it is on, such as `$NVME/edit_ray`: {variables}. Others are
refused, as whoever submits a run would see what they hold.
"""

SIZING = """# Sizing

Made by `edit-ray plan` through `python docs/generate.py`; do not edit. [Stores and tiers](stores.md) has the words.

A residual has as many bytes as a segment has tokens times the model's width times the bytes of its type. The tables
say how many of them wait for later segments at a time, which is what `store.disk_bytes` has to hold, and how much is
written and read. `store.host_bytes` needs two of them at least; more only spares reading from disk. The simulated times
assume the speeds that are named below each table; they are no measurements of a run.
"""

# The architecture of Wan2.1 that a plan depends on, as in the JSON files of the published models.
WAN = {"1.3B": (12, 30), "14B": (40, 40)}
CASES = (
    ("The embedded model, as in `configs/tiny.yaml`", None, "configs/tiny.yaml", ()),
    ("Wan2.1 1.3B, 480 × 832, whole stack", "1.3B", "configs/wan21_t2v_1_3b.yaml", ()),
    ("Wan2.1 1.3B, 480 × 832, groups of 10 blocks", "1.3B", "configs/wan21_t2v_1_3b.yaml", ("cache.granularity=10",)),
    ("Wan2.1 14B, whole stack", "14B", "configs/wan21_t2v_14b.yaml", ()),
)
REUSE = ("policy=warmstart_reuse", "inner=teacache", "warm_steps=2", "reuse_window=4")


def generated() -> dict[str, str]:
    """The text of each page."""
    return {
        "docs/configuration.md": configuration_page(),
        "docs/sizing.md": sizing_page(),
        "docs/policies.md": _filled("docs/policies.md", "front", best_below_half()),
        "docs/comparison.md": _filled("docs/comparison.md", "measured", measured()),
    }


def _filled(page: str, mark: str, block: str) -> str:
    """The page with the block between its two marks."""
    before, _, rest = (ROOT / page).read_text().partition(f"<!-- {mark} -->")
    return f"{before}<!-- {mark} -->\n{block}\n<!-- /{mark} -->{rest.partition(f'<!-- /{mark} -->')[2]}"


def _results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / name / "results.json").read_text())


def configuration_page() -> str:
    """Every section with its options, their defaults and what is valid."""
    schema = Config.model_json_schema()
    parts = [CONFIGURATION]
    for name, field in Config.model_fields.items():
        section = PromptSegment if name == "prompt_segments" else field.annotation
        assert isinstance(section, type)
        assert issubclass(section, Options)
        about = (section.__doc__ or "").strip()
        parts.append(
            f"## {name}\n\n{'A list of:' + chr(10) + chr(10) if section is PromptSegment else ''}{_paragraphs(about)}\n"
        )
        parts.append(_table(section, schema["$defs"][section.__name__], schema))
        if section is CacheOptions:
            parts += _policies()
    variables = ", ".join(f"`${name}`" for name in NODE_VARIABLES)
    return "\n".join([*parts, ENVIRONMENT.format(variables=variables)])


def _policies() -> Iterator[str]:
    """The options of every policy that has some."""
    for name in POLICIES.names():
        cls = POLICIES.find(name)
        schema = option_schema(cls) if cls.__module__.startswith("edit_ray.") and name != "always" else {}
        if schema:
            yield f"### {name}\n\n{_paragraphs((cls.__doc__ or '').strip())}\n"
            rows = ["| key | default | it must be | what it does |", "|---|---|---|---|"]
            for key, node in schema["properties"].items():
                default = f"`{_shown(node['default'])}`" if node.get("default") is not None else ""
                about = node["description"].replace("|", "\\|")
                rows.append(f"| `{key}` | {default} | {describe(node, schema)} | {about} |")
            yield "\n".join(rows) + "\n"


def _paragraphs(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines())


def _table(section: type[Options], node: dict[str, Any], schema: dict[str, Any]) -> str:
    rows = ["| key | default | it must be |", "|---|---|---|"]
    for name, field in section.model_fields.items():
        valid = describe(node["properties"][name], schema).replace("|", "\\|")
        default = "" if field.is_required() else f"`{_shown(field.default)}`"
        rows.append(f"| `{name}` | {default} | {valid} |")
    return "\n".join(rows) + "\n"


def _shown(value: Any) -> str:
    return dump({"x": value})[3:].strip().removesuffix("\n...")


def best_below_half() -> str:
    """What was measured of each method at half of the blocks or fewer."""
    points = _results("front")["points"]
    best: dict[str, tuple[float, Any]] = {}
    for point in points:
        psnr = sum(point["psnr"]) / len(point["psnr"])
        if point["share"] <= 0.5 and psnr > best.get(point["method"], (0.0, None))[0]:
            best[point["method"]] = psnr, point
    rows = ["| method | setting | blocks | PSNR |", "|---|---|---|---|"]
    for method, (psnr, point) in sorted(best.items(), key=lambda item: -item[1][0]):
        setting = ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in point["setting"].items())
        name = f"`{method}`" if point["group"] == "ours" else method
        rows.append(f"| {name} | {setting} | {point['share']:.3f} | {psnr:.2f} dB |")
    return "\n".join(rows)


def measured() -> str:
    """Some figures with their results."""
    front, tuned, joins, tiers = map(_results, ("front", "tuned", "continuity", "tiered_longrun"))
    half = next(point for point in front["front"] if point["speedup"] == 2)
    ours, peer = (sum(half[who]["psnr"]) / len(half[who]["psnr"]) for who in ("ours", "peer"))
    inside, less = (re.search(r" is ([\d.]+)", verdict) for verdict in joins["verdicts"][:2])
    assert inside is not None
    assert less is not None
    found, unseen = tuned["found"], tuned["unseen"]
    most = tiers["summary"]["most_bytes"] / 2**20
    generations = len(tiers["rows"])
    rows = [
        (
            f"PSNR against the uncached videos with half of the blocks: {ours:.1f} dB with `{half['ours']['method']}`, "
            f"{peer:.1f} dB with the best of the other packages ({half['peer']['method']})",
            front,
            "front/front.md",
        ),
        (
            f"`edit-ray tune`, asked for {tuned['psnr']:g} dB: `{found['policy']}` with {found['blocks']:.0%} of the "
            f"blocks, {unseen['psnr']:.1f} dB on prompts that it had not seen",
            tuned,
            "tuned/results.json",
        ),
        (
            f"How visible joins are with `history`: {inside[1]} times what is seen inside segments, {less[1]} times "
            "less than without",
            joins,
            "continuity/continuity.md",
        ),
        (
            f"Memory of all tiers over {generations} generations of new residuals: at most {most:,.0f} MiB, flat from "
            f"generation {tiers['summary']['flat_from']} on",
            tiers,
            "tiered_longrun/results.json",
        ),
    ]
    lines = ["| figure | on | result |", "|---|---|---|"]
    for said, result, file in rows:
        lines.append(f"| {said} | {result['device']} | [{result['date'][:10]}](../benchmarks/results/{file}) |")
    return "\n".join(lines)


def sizing_page() -> str:
    """What `edit-ray plan` says of some runs."""
    parts = [SIZING]
    with tempfile.TemporaryDirectory() as folder:
        for title, model, config, changes in CASES:
            shown = ["--config", config]
            given = list(shown)
            if model is not None:
                reuse = [f"cache.{change}" for change in REUSE] + list(changes)
                shown += [f"--set {change}" for change in reuse]
                given += [word for change in reuse for word in ("--set", change)]
                given += ["--set", f"model.path={_wan(Path(folder, model), *WAN[model])}"]
            said = _said("plan", given).replace(f"{folder}/{model}", f"Wan2.1 {model}")
            parts.append(f"## {title}\n\n```console\nedit-ray plan {' '.join(shown)}\n```\n\n```text\n{said}```\n")
    return "\n".join(parts)


def _said(command: str, arguments: list[str]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.chdir(ROOT):
        code = main([command, *arguments])
    assert code == 0, said.getvalue()
    return said.getvalue()


def _wan(folder: Path, heads: int, layers: int) -> Path:
    """A folder with the JSON files alone that a plan reads of a Wan2.1 model."""
    files: dict[str, Any] = {
        "model_index.json": {
            "_class_name": "WanPipeline",
            "tokenizer": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "WanTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLWan"],
        },
        "transformer/config.json": {
            "patch_size": [1, 2, 2],
            "in_channels": 16,
            "num_attention_heads": heads,
            "attention_head_dim": 128,
            "num_layers": layers,
        },
        "vae/config.json": {"z_dim": 16},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


if __name__ == "__main__":
    os.umask(0o022)
    for page, text in generated().items():
        (ROOT / page).write_text(text)
