"""A video that continues while it is watched, and follows what is typed: a line is the next prompt.

    python examples/type_prompts.py my_causal_model --prompt "a red circle"

It needs a causal model, and plays in a window if ffplay is installed; `type_prompts.mp4` has all of it in any case.
With `keep:` before a prompt earlier chunks keep theirs, with `cut:` a new scene begins. An empty line ends the video.
"""

import argparse
import contextlib
import queue
import shutil
import subprocess
import sys
import threading

import imageio_ffmpeg
import torch

from edit_ray import EditCausalWanPipeline
from edit_ray.engine.causal_stream import CausalStream

FPS = 16


def typed() -> "queue.SimpleQueue[str]":
    """The lines of the standard input, as they come; an empty one at its end."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line.strip())
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    return lines


def follow(stream: CausalStream, line: str) -> None:
    """Continue with a typed prompt."""
    word, colon, rest = line.partition(":")
    if colon and word in ("keep", "cut"):
        stream.send(prompt=rest.strip(), switch=word)
    else:
        stream.send(prompt=line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the folder of a causal model")
    parser.add_argument("--prompt", default="a red circle", help="the first one")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 832), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--chunks", type=int, default=10_000, help="the most that are made")
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = EditCausalWanPipeline.from_pretrained(asked.model, torch_dtype=dtype, device=device)
    height, width = asked.size
    raw = ["-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", f"{width}x{height}", "-framerate", f"{FPS}"]
    player = None
    if shutil.which("ffplay"):
        player = subprocess.Popen(["ffplay", "-loglevel", "error", *raw, "-"], stdin=subprocess.PIPE)
    video = imageio_ffmpeg.write_frames("type_prompts.mp4", (width, height), fps=FPS, macro_block_size=1)
    video.send(None)
    lines, ends = typed(), False
    stream = pipe.stream(asked.prompt, height=height, width=width)
    while not ends and stream.next_chunk < asked.chunks:
        chunk = next(stream)
        assert chunk.frames is not None, "the stream decodes"
        for frame in chunk.frames:
            video.send(frame.tobytes())
        print(f"chunk {chunk.index}: {len(chunk.frames)} frames in {chunk.statistics.seconds:.2f} s", flush=True)
        if player is not None and player.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # its window was closed
                player.stdin.write(chunk.frames.tobytes())
        while not lines.empty():
            line = lines.get()
            ends = not line
            if line:
                print(f"chunk {stream.next_chunk} follows {line!r}", flush=True)
                follow(stream, line)
    stream.close()
    video.close()
    print("type_prompts.mp4")


if __name__ == "__main__":
    main()
