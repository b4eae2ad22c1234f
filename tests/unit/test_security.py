"""What no file and no socket of ours can carry, and what no client can ask for."""

import ast
from pathlib import Path

import pytest
from pydantic import ValidationError

from edit_ray.cli import main
from edit_ray.config import Config, config_of, load_config
from edit_ray.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
MODULES = [path for folder in ("edit_ray", "jobs") for path in sorted((ROOT / folder).rglob("*.py"))]
# What reads a pickle, makes one, or runs text as code. Ray pickles what its calls carry: its ports are trusted.
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "multiprocessing"}
CALLS = {"eval", "exec", "os.system", "yaml.load", "torch.save"}
CALLS |= {f"{module}.load" for module in ("torch", "torch.jit", "np", "numpy")}
CONVERTER = "edit_ray/engine/checkpoint_process.py"  # reads tensors alone, in a process of its own


def test_nothing_of_ours_reads_or_writes_pickles_or_runs_text():
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names} & PICKLES
            elif isinstance(node, ast.ImportFrom):
                names = {str(node.module).partition(".")[0]} & PICKLES
            elif isinstance(node, ast.Call):
                names = {ast.unparse(node.func)} & CALLS
                if path == ROOT / CONVERTER and "weights_only=True" in map(ast.unparse, node.keywords):
                    names -= {"torch.load"}
                names |= {keyword.arg for keyword in node.keywords if keyword.arg in ("shell", "allow_pickle")}
            else:
                continue
            found += [f"{path.relative_to(ROOT)}:{node.lineno} {name}" for name in names]
    assert len(MODULES) > 100
    assert found == []


@pytest.mark.parametrize("key", ["plugins", "imports", "model.trust_remote_code", "engine.plugins"])
def test_no_configuration_names_code_to_load(key):
    with pytest.raises(ConfigError, match=r"is an unknown key"):
        load_config(ROOT / "configs" / "tiny.yaml", [f"{key}=os"])
    data = load_config(ROOT / "configs" / "tiny.yaml").model_dump(mode="json")
    section, _, name = key.rpartition(".")
    (data[section] if section else data)[name] = "os"
    with pytest.raises(ConfigError, match=rf"^{key} is an unknown key"):  # as `LongVideoClient.submit` takes it
        config_of(data)
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):  # where a client is not ours
        Config.model_validate(data)


@pytest.mark.parametrize("policy", ["os:system", "os.system", "../policy", "my_policies:MyPolicy"])
def test_a_policy_is_a_name_that_an_installed_package_gave(policy):
    with pytest.raises(ConfigError, match=r"cache\.policy"):
        load_config(ROOT / "configs" / "tiny.yaml", [f"cache.policy={policy}"])


def test_nothing_that_others_wrote_is_obeyed_by_a_terminal(tmp_path, capsys, monkeypatch):
    """An argument, as everything that is printed, passes one place."""
    evil = "\x1b]0;owned\x07\x1b[2J\u202e\x9b8m\r"
    assert main(["report", f"run{evil}"]) != 0
    said = capsys.readouterr()
    assert "\\x1b]0;owned\\x07\\x1b[2J\\u202e\\x9b8m\\r" in said.err
    assert all(character.isprintable() or character == "\n" for character in said.out + said.err)
