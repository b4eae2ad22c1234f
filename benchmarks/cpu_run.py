"""The run of the embedded model that is measured on a CPU with one thread of torch."""

from typing import Any


def config_for(segments: int, steps: int) -> dict[str, Any]:
    """A run that denoises for longer than it decodes: a core is free for others most of the time."""
    return {
        "model": {"path": "builtin:tiny_wan", "device": "cpu"},
        "sampling": {"height": 96, "width": 96, "num_frames": 33, "num_inference_steps": steps, "seed": 7},
        "video": {"num_segments": segments},
        "prompt_segments": [{"segment": 0, "prompt": "a red circle bouncing on a black background"}],
        "continuity": {"mode": "history", "history_latents": 3},
        "engine": {"cpu_threads": 1},
    }
