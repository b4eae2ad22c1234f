"""Every file in configs/ is right for a model of its layout, and makes a video of one."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edit_ray import EditWanPipeline
from edit_ray.config import config_of, load_config
from edit_ray.config.strict_yaml import parse
from edit_ray.runs.folder import RunFolder
from edit_ray.testing import save_random_wan
from tests.loras import save_lora

pytestmark = pytest.mark.usefixtures("one_thread")
FOLDER = Path(__file__).resolve().parents[2] / "configs"
# What `save_random_wan` makes like the model of each file; None: as it is.
LAYOUTS = {
    "tiny": None,
    "wan21_t2v_1_3b": {},
    "wan21_t2v_14b": {},
    "wan21_i2v_14b": {"layout": "image_clip"},
    "wan22_i2v_a14b_lightning": {"layout": "image", "two_experts": True},
    "wan22_ti2v_5b": {"expand_timesteps": True},
}
SMALL = {"height": 32, "width": 32, "num_frames": 17, "negative_prompt": ""}


def test_every_file_is_known():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(LAYOUTS)


@pytest.fixture
def config(request, tmp_path):
    """The configuration of a file, for a made model, LoRAs of random weights, and a picture; two segments."""
    name = request.param
    written = load_config(FOLDER / f"{name}.yaml", check_model=False)  # as it is
    data = parse((FOLDER / f"{name}.yaml").read_text()).data
    model, sampling = data["model"], data["sampling"] | SMALL
    if "num_inference_steps" in sampling:
        sampling["num_inference_steps"] = 3
    if (layout := LAYOUTS[name]) is not None:
        model |= {"path": str(save_random_wan(tmp_path / "model", **layout)), "torch_dtype": "float32", "device": "cpu"}
    pipe = EditWanPipeline.from_pretrained(model["path"]) if model.get("loras") else None
    for index, lora in enumerate(model.get("loras", ())):
        lora["path"] = str(tmp_path / f"{index}.safetensors")
        save_lora(tmp_path / f"{index}.safetensors", getattr(pipe, lora.get("expert", "transformer")), "lightx2v")
    if data["continuity"].get("init"):
        picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / data["continuity"]["init"])
        data["continuity"]["init"] = str(tmp_path / data["continuity"]["init"])
    prompts = [{"segment": index, "prompt": f"a {colour} circle"} for index, colour in enumerate(("red", "blue"))]
    changes = {"sampling": sampling, "video": {"num_segments": 2}, "prompt_segments": prompts}
    small = {"engine": data["engine"] | {"cpu_threads": 1}, "store": {"host_bytes": 2**20, "allow_tmpfs": True}}
    made = config_of(data | changes | small)
    assert made.sampling.sigmas == written.sampling.sigmas
    return made


@pytest.mark.parametrize("config", LAYOUTS, indirect=True)
async def test_it_makes_a_video(finish, config, tmp_path):
    (tmp_path / "runs").mkdir()
    status = await finish(config, root=tmp_path / "runs")
    assert (status.state, status.committed) == ("done", 2), status.error
    assert RunFolder(tmp_path / "runs", "one").final.stat().st_size > 0
