"""Small batches on a GPU as CUDA graphs; `model.graphs = False` turns them off.

Few pictures or texts keep a GPU busy for less time than Python takes to launch their hundred kernels. A CUDA graph
holds these launches. It is captured when a number of pictures, or a number and length of texts, is first encoded on a
stream, and replayed after. Where a capture fails, the model says so once and goes on without graphs.

No GPU has run this yet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MOST_INPUTS = 32  # pictures or texts in a batch; for more, launches take less time than the kernels
MOST_GRAPHS = 64  # kept for a tower; each holds the memory of all its intermediate results
WARM_UPS = 2


class Graph(NamedTuple):
    inputs: Tensor  # is read by a replay
    output: Tensor  # is written by it
    replay: Callable[[], None]


class Graphs:
    """The graphs of one tower."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, Graph] = {}
        self._weights: list[tuple] = []
        self._lock = threading.Lock()  # a graph has one input and one output: no other thread may come between

    def run(self, form: Callable[[Tensor], Tensor], inputs: Tensor, weights: Sequence[Tensor], *setting) -> Tensor:
        """form(inputs), from a graph. weights: all that `form` reads. setting: what else it depends on.

        A graph reads weights where they were when it was captured: edits in place count, and all graphs are dropped
        when a weight lies elsewhere.
        """
        where = [(weight.data_ptr(), weight.dtype, weight.stride()) for weight in weights]
        key = inputs.shape, inputs.dtype, inputs.device, stream(inputs), *setting
        with self._lock:
            if where != self._weights:
                self._graphs.clear()
                self._weights = where
            graph = self._graphs.pop(key, None) or capture(form, inputs)
            self._graphs[key] = graph  # the last one is the one used last
            if len(self._graphs) > MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            graph.inputs.copy_(inputs)
            graph.replay()
            return graph.output.clone()


def stream(inputs: Tensor) -> int:
    """The current stream of the device; streams don't wait for each other, so that each needs graphs of its own."""
    return torch.cuda.current_stream(inputs.device).cuda_stream if inputs.is_cuda else 0


def capture(form: Callable[[Tensor], Tensor], inputs: Tensor) -> Graph:
    """Run `form` a few times, so that kernels are compiled and plans made, and then record its launches."""
    with torch.cuda.device_of(inputs), torch.inference_mode(False), torch.no_grad():
        inputs = inputs.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                form(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may load data
            output = form(inputs)
    return Graph(inputs, output, graph.replay)
