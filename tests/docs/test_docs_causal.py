"""docs/causal.md: its code and its command run, and its table is that of the options."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edit_ray.cli.main import main
from edit_ray.engine.causal_options import CausalOptions
from edit_ray.testing import save_random_wan
from tests.documented import blocks, replaced, run_by
from tests.unit.test_convert import original

PAGE = "docs/causal.md"
TEXT = (Path(__file__).resolve().parents[2] / PAGE).read_text()
SMALLER = {"height=480": "height=32", "width=832": "width=32"}

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_code_runs(tmp_path, monkeypatch, capsys):
    """In one piece: later blocks use the pipeline of earlier ones."""
    monkeypatch.chdir(tmp_path)
    save_random_wan(tmp_path / "my_causal_model", num_layers=6, causal={})
    names = {}
    for block in blocks(PAGE, "python"):
        code = block.code
        for old, new in SMALLER.items():
            code = code.replace(old, new)
        exec(compile(code, f"<{PAGE}>", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:5]] == ["0", "1", "2", "3", "4"]
    assert printed[5].startswith(
        "KVEntry(branch='cond', layer=0, chunk=0, tier='device', shape=(2, 1, 12, 2, 12), bytes="
    )
    assert len(printed) == 8
    assert printed[7] == "{0: 'device', 1: 'host', 2: 'host', 3: 'host', 4: 'host', 5: 'host'}"
    assert names["video"].shape == (81, 32, 32, 3)


def test_the_command_converts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = save_random_wan(tmp_path / "wan_random")
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    torch.save({"generator_ema": original(weights)}, tmp_path / "self_forcing_dmd.pt")
    ((_, command),) = run_by("tests/docs/test_docs_causal.py::test_the_command_converts")
    assert main(replaced(command, {})[1:]) == 0, capsys.readouterr().err
    assert (tmp_path / "my_causal_model" / "model_index.json").is_file()


def test_the_table_is_that_of_the_options():
    rows = re.findall(r"^\| `(\w+)` \| `?([^|`]+)`? \|", TEXT, re.MULTILINE)
    defaults = CausalOptions().model_dump()
    assert [name for name, _ in rows] == list(defaults)
    for name, default in rows:
        given = [float(part) for part in default.split(",")] if name == "timesteps" else default.strip()
        expected = pytest.approx(defaults[name], abs=0.05) if name == "timesteps" else f"{defaults[name]}"
        assert given == expected if name != "context_noise" else float(given) == defaults[name]
