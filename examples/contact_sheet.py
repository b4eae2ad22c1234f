"""A streaming client: a contact sheet of the run that grows by a row with each committed segment.

    python examples/contact_sheet.py
    python examples/contact_sheet.py --run RUN --every 4

The first line makes a short run, on the running Ray or on its own. The second follows an existing run from its first
segment, active or ended.
"""

import argparse

import numpy as np
from PIL import Image

from edit_ray import LongVideoClient

SHORT_RUN = {
    "sampling": {"num_inference_steps": 20, "seed": 5},
    "video": {"num_segments": 3},
    "prompt_segments": [{"start": "0s", "prompt": "an orange triangle bouncing on a navy background"}],
    "continuity": {"mode": "history"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="A contact sheet of a run, while it grows.")
    parser.add_argument("--run", help="the run to follow (default: a short one is made)")
    parser.add_argument("--every", type=int, default=6, help="frames per picture")
    given = parser.parse_args()
    client = LongVideoClient()
    rows: list[np.ndarray] = []
    for segment in client.stream(given.run or client.submit(SHORT_RUN)):
        row = np.concatenate(list(segment.frames[:: given.every]), axis=1)  # uint8 [H, W of all, 3]
        rows.append(row)
        width = max(row.shape[1] for row in rows)
        padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
        Image.fromarray(np.concatenate(padded)).save("contact_sheet.png")
        print(f"contact_sheet.png has {len(rows)} rows, the last of segment {segment.index}", flush=True)


if __name__ == "__main__":
    main()
