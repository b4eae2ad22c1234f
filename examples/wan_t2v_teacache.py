"""Text to video with TeaCache: skipped steps, time and PSNR of several thresholds.

    python examples/wan_t2v_teacache.py
    python examples/wan_t2v_teacache.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --wan-variant t2v-1.3B \
        --dtype bfloat16 --device cuda --height 480 --width 832 --guidance-scale 5

The second command needs a GPU, and downloads the model first.
"""

import argparse
import time

import torch
from diffusers.utils import export_to_video

from edit_ray import EditWanPipeline

PROMPT = "a blue circle and a pink square bouncing on a gray background"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Text to video with TeaCache.")
    parser.add_argument("--model", default="builtin:tiny_wan")
    parser.add_argument("--wan-variant", help="whose coefficients: t2v-1.3B, t2v-14B; without it the model's own")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--num-frames", type=int, default=33)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    return parser.parse_args()


def main() -> None:
    given = options()
    dtype = getattr(torch, given.dtype)
    pipe = EditWanPipeline.from_pretrained(given.model, torch_dtype=dtype, device=given.device)
    pipe.set_progress_bar_config(disable=True)

    def generate() -> tuple[torch.Tensor, float]:
        started = time.perf_counter()
        video = pipe(
            given.prompt,
            height=given.height,
            width=given.width,
            num_frames=given.num_frames,
            num_inference_steps=given.steps,
            guidance_scale=given.guidance_scale,
            generator=torch.Generator(given.device).manual_seed(7),
        )[0]
        return torch.as_tensor(video), time.perf_counter() - started

    coefficients = {"wan_variant": given.wan_variant} if given.wan_variant else {}
    generate()  # the first call is slower
    uncached, without = generate()
    print(f"no cache             {without:6.2f} s")
    for threshold in (0.1, 0.2, 0.3):
        pipe.enable_cache("teacache", num_inference_steps=given.steps, rel_l1_thresh=threshold, **coefficients)
        video, took = generate()
        skipped = pipe.cache.stats["cond"].skip_rate
        pipe.disable_cache()
        error = (video - uncached).square().mean().clamp_min(1e-12)
        print(
            f"rel_l1_thresh={threshold}  {took:8.2f} s, {without / took:.2f}x, {skipped:.0%} of the steps skipped, "
            f"{-10 * error.log10().item():.1f} dB"
        )
    print(export_to_video(video.numpy(), "wan_t2v_teacache.mp4", fps=16))


if __name__ == "__main__":
    main()
