"""Work that each step repeats, as CUDA graphs: thousands of kernels for the price of one launch."""

from collections import Counter
from collections.abc import Callable, Hashable

import torch

EAGER_TIMES = 2  # before work is captured: what compiles or allocates on first use has then done so


class StepGraphs:
    """Does work of several kinds again and again; on a GPU, from the third time on, as a CUDA graph for each kind.

    Work of one kind differs only in what its tensors hold. It reads and writes tensors that outlive it, draws from the
    device's default generator, and neither waits for the GPU nor copies from the host.
    """

    def __init__(self, device: torch.device, wanted: bool = True) -> None:
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._times: Counter[Hashable] = Counter()
        self._wanted = wanted and device.type == "cuda"
        if self._wanted:
            # One stream for all of it, so that autograd's nodes never come from another one; and one pool of memory,
            # since graphs run one after the other and leave nothing in it.
            self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, kind: Hashable, work: Callable[[], None]) -> None:
        """Do the work."""
        if not self._wanted:
            work()
            return
        self._times[kind] += 1
        if self._times[kind] <= EAGER_TIMES:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                work()
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        if kind not in self.graphs:
            self.graphs[kind] = self._captured(work)
        self.graphs[kind].replay()

    def _captured(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as that which watches over messages between GPUs, may go on meanwhile.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            work()
        return graph
