"""Two worker nodes on this machine, of which one dies in the middle of a run: `python -m tests.chaos.nodes FOLDER`.

Each node has a cache folder of its own, which goes with it; the folder of runs is shared. What was seen is printed as
JSON.
"""

import json
import logging
import shutil
import sys
from pathlib import Path

import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster

from edit_ray import LongVideoClient
from edit_ray.actors import launch
from edit_ray.testing import save_random_wan

SEGMENTS = 6
HEAD = {"num_cpus": 0, "resources": {launch.SCHEDULER_RESOURCE: 1}, "include_dashboard": False}


def config_of(model):
    return {
        "model": {"path": str(model)},
        "sampling": {"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 20, "seed": 3},
        "video": {"num_segments": SEGMENTS},
        "prompt_segments": [{"start": "0s", "prompt": "a red circle"}],
        "continuity": {"mode": "history", "history_latents": 2},
        "cache": {
            "policy": "warmstart_reuse",
            "inner": "fbcache",
            "rel_l1_thresh": 0.2,
            "warm_steps": 4,
            "reuse_window": 3,
        },
        "store": {"host_bytes": 2**14, "allow_tmpfs": True, "directory": "$EDIT_RAY_DISK"},
        "engine": {"start_timeout_s": 300.0, "cpu_threads": 1},
    }


def nodes():
    """On which node each of our actors lives."""
    return {
        actor["Name"]: actor["Address"]["NodeID"]
        for actor in actors().values()
        if actor["Name"] in (launch.SCHEDULER, launch.DENOISER, launch.CACHE_STORE) and actor["State"] == "ALIVE"
    }


def main(root):
    model = save_random_wan(root / "model", expand_timesteps=True)
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    first = cluster.add_node(num_cpus=1, env_vars={"EDIT_RAY_DISK": str(root / "node-1")})
    ray.init(address=cluster.address, namespace=launch.NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    client = LongVideoClient(output=root / "runs")
    list(client.stream(client.submit(config_of(model), run_id="whole"), frames=False))
    cluster.add_node(num_cpus=1, env_vars={"EDIT_RAY_DISK": str(root / "node-2")})
    stream = client.stream(client.submit(config_of(model), run_id="hurt"), frames=False)
    indices = [next(stream).index, next(stream).index]
    before, first_cache = nodes(), len(list((root / "node-1").glob("*.safetensors")))
    cluster.remove_node(first, allow_graceful=False)
    shutil.rmtree(root / "node-1")
    segments = list(stream)
    found = {
        "segments": indices + [segment.index for segment in segments],
        "before": before,
        "after": nodes(),
        "lost": first.node_id,
        "head": cluster.head_node.node_id,
        "entries_lost": first_cache,
        "made_again": sum(segment.statistics.get("segments_made_again", 0) for segment in segments),
        "state": client.status("hurt").state,
    }
    launch.end_actors()
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
