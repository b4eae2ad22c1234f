"""The shortest program that makes a video.

python examples/text_to_video.py
"""

import torch
from diffusers.utils import export_to_video

from edit_ray import EditWanPipeline


def main() -> None:
    pipe = EditWanPipeline.from_pretrained("builtin:tiny_wan", torch_dtype=torch.float32, device="cpu")
    video = pipe(
        prompt="a green triangle bouncing on a white background",
        height=128,
        width=128,
        num_frames=33,
        num_inference_steps=20,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(1),
    )[0]  # [F, H, W, 3], float32 in 0–1
    print(export_to_video(video, "text_to_video.mp4", fps=16))


if __name__ == "__main__":
    main()
