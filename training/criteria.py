"""What an evaluation asks: how much it samples, and criteria with their figures and bars."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Size:
    """How much is evaluated: clips, samples of each kind, continuations, chains and their segments, batch.

    Of the small world's samples, the height and width in pixels and the number of steps. Of the causal model's streams,
    the chunks: 23 have 273 frames.
    """

    clips: int = 64
    long_clips: int = 16
    rendered: int = 256
    samples: int = 64
    continuations: int = 32
    chains: int = 8
    segments: int = 8
    batch: int = 16
    world_size: tuple[int, int] = (128, 128)
    world_steps: int = 30
    stream_chunks: int = 23


QUICK = Size(clips=8, long_clips=2, rendered=64, samples=8, continuations=4, chains=1, segments=4, batch=4)


@dataclass(frozen=True)
class Result:
    """One criterion: `figure` has to be at least, or with `most` at most, the bar; without one it is for comparison."""

    name: str
    figure: float
    bar: float | None
    unit: str
    most: bool = False

    @property
    def passed(self) -> bool:
        """Whether the bar is met, if there is one."""
        if self.bar is None:
            return True
        return self.figure <= self.bar if self.most else self.figure >= self.bar

    def __str__(self) -> str:
        if self.bar is None:
            return f"      {self.name:<52} {self.figure:8.2f} {self.unit}"
        verdict, sign = "PASS" if self.passed else "FAIL", "<=" if self.most else ">="
        return f"{verdict}  {self.name:<52} {self.figure:8.2f} {self.unit:<4} {sign} {self.bar:g}"


def percent(flags: Tensor) -> float:
    """Share of true flags, in percent."""
    return 100 * flags.float().mean().item()
