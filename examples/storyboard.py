"""A long video with a storyboard: prompt, guidance and seed change between segments.

    python examples/storyboard.py

It uses the running Ray, or starts one. docs/long-video.md has storyboards in files.
"""

from edit_ray import LongVideoClient

STORYBOARD = {
    "sampling": {"num_inference_steps": 20, "seed": 11},
    "video": {"num_segments": 3},
    "prompt_segments": [
        {"start": "0s", "prompt": "a red circle bouncing on a black background"},
        {"segment": 1, "prompt": "a red circle and a blue square bouncing on a black background"},
        {"segment": 2, "prompt": "a blue square bouncing on a black background", "guidance_scale": 6.0, "seed": 12},
    ],
    "continuity": {"mode": "history"},
    "cache": {"policy": "teacache", "rel_l1_thresh": 0.1},
}


def main() -> None:
    client = LongVideoClient()
    run_id = client.submit(STORYBOARD)
    for segment in client.stream(run_id, frames=False):
        seam = segment.statistics.get("seam_score")
        joined = "" if seam is None else f", joins with a score of {seam:.2f} (0 is seamless)"
        print(f"segment {segment.index}: frames from {segment.first_frame}{joined} | {segment.prompt}", flush=True)
    print(f"{client.status(run_id).path}/final.mp4")


if __name__ == "__main__":
    main()
