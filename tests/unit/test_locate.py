"""The three meanings of a model's path, and hub ids without a network."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from edit_ray.engine.model_files import local_folder, locate_model
from edit_ray.errors import ModelError

COMMIT = "0" * 40
FILES = {
    "model_index.json": {
        "_class_name": "WanPipeline",
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    },
    "transformer/config.json": {"patch_size": [1, 2, 2], "in_channels": 16},
    "vae/config.json": {"z_dim": 16},
}


def test_a_folder_is_itself_and_comes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").touch()
    assert locate_model(str(tmp_path / "model")) == str(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert locate_model("model") == "model"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate_model("~/model") == str(tmp_path / "model")
    assert local_folder(str(tmp_path / "model" / "model_index.json")) is None
    Path("org/name").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"'org/name' is the folder org/name, which has no model_index\.json"):
        locate_model("org/name")


def test_an_operator_says_where_models_may_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("allowed/a", "other/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model_index.json").touch()
    (tmp_path / "allowed" / "link").symlink_to(tmp_path / "other" / "b")
    monkeypatch.setenv("EDIT_RAY_MODEL_ROOTS", f"{tmp_path}/none:{tmp_path}/allowed")
    assert locate_model(f"{tmp_path}/allowed/a") == f"{tmp_path}/allowed/a"
    assert locate_model(locate_model("builtin:tiny_wan")).endswith("assets/tiny_wan")
    outside = ["other/b", "allowed/../other/b", "allowed/link"]
    for path in [*(f"{tmp_path}/{name}" for name in outside), "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]:
        with pytest.raises(ModelError, match=r"is not allowed here; models are builtin:… or folders in .*/allowed\.$"):
            locate_model(path)


@pytest.mark.parametrize("path", ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "a/b", "org/some_name.v2"])
def test_a_hub_id_is_returned_as_it_is(path: str) -> None:
    assert locate_model(path) == path


@pytest.mark.parametrize(
    "path",
    ["", "/", "name", "a/b/c", "../b", "a/..", "./b", "a/b\n", "a b/c", "a/b--c", "\0", "ä/b", "~nobody/x", "x" * 999],
)
def test_what_is_neither_names_both_meanings(path: str) -> None:
    with pytest.raises(ModelError, match=r"neither a folder nor a hub id like org/name|which has no model_index"):
        locate_model(path)


@pytest.mark.parametrize("path", ["builtin:", "builtin:tiny", "builtin:../errors.py"])
def test_an_unknown_builtin_names_the_known(path: str) -> None:
    with pytest.raises(ModelError, match="known are: builtin:tiny_wan"):
        locate_model(path)


def read_in_fresh_python(hub_ids: Sequence[str], home: Path, **environ: str) -> list[str]:
    """What `read_model_info` says of each, in a process in which the hub's client reads its settings anew."""
    code = (
        "import sys\nfrom edit_ray.engine.model_info import read_model_info\nfrom edit_ray.errors import ModelError\n"
        f"for hub_id in {hub_ids!r}:\n"
        "    try:\n        print(read_model_info(hub_id).height_step)\n"
        "    except ModelError as error:\n        print(error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    environment = {**kept, "HF_HOME": str(home), **environ}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_hub_id_is_read_from_an_offline_cache(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    for name, content in FILES.items():
        file = repository / "snapshots" / COMMIT / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    read, said = read_in_fresh_python(["org/name", "org/other"], tmp_path, HF_HUB_OFFLINE="1")
    assert read == "16"
    assert "nor a hub id that can be reached (offline mode is on, and it is not in the cache)" in said


def test_an_unreachable_hub_id_names_both_meanings_soon(tmp_path: Path) -> None:
    began = time.monotonic()
    (said,) = read_in_fresh_python(["org/name"], tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert time.monotonic() - began < 15
    assert said.startswith(f"'org/name' is neither a folder (there is no {tmp_path}/org/name) nor a hub id that can be")
    assert "the hub cannot be reached" in said


class _Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does, without a body: `none` is unknown, `gated` is gated, `name` has no such file."""

    def do_HEAD(self) -> None:
        codes = {"none": "RepoNotFound", "gated": "GatedRepo", "name": "EntryNotFound"}
        code = next((code for name, code in codes.items() if self.path.startswith(f"/org/{name}/")), None)
        self.send_response({"GatedRepo": 403, None: 500}.get(code, 404))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


ANSWERS = {
    "org/none": "the hub knows no such model, or it is private",
    "org/gated": "grants access to it only on request",
    "org/name": "'org/name' has no model_index.json",
    "org/broken": "the hub answered 500",
}


def test_the_hub_s_answer_is_told_in_a_few_words(tmp_path: Path, endpoint: str) -> None:
    told = read_in_fresh_python(list(ANSWERS), tmp_path, HF_ENDPOINT=endpoint)
    for words, said in zip(ANSWERS.values(), told, strict=True):
        assert words in said
