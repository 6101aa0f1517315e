"""A forward pass captured in pieces, cut at attention: a step with prompt chunks is launched a layer at a time.
It knows where the pieces leave their tensors; it refuses to know what they compute.

What attention does changes from step to step with the sequences; all that lies between is the same for a number of
tokens. Launched kernel by kernel it costs the host 0.5 ms a layer, longer than a short chunk keeps the device busy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gear_compression.cuda.backend import CudaBackend


@dataclass(frozen=True, slots=True)
class Cut:
    """One layer's attention: q, k, v where the piece before leaves them, out where the next one reads it."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scaling: float
    window: int
    softcap: float


class Pieces:
    """Holds the graphs of a forward pass over a fixed number of tokens, of which a step may have fewer."""

    def __init__(
        self, backend: CudaBackend, forward: Callable[[], object], pool: Any, stream: torch.cuda.Stream
    ) -> None:
        """`forward` reads its input from, and leaves its result in, memory that stays. `pool` and `stream`: those that
        other graphs are captured with, which never run at the same time; with both the same they share their memory.
        """
        self._backend, self._pool = backend, pool
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._cuts: list[Cut] = []
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                backend.attend = lambda q, *_: torch.zeros_like(q)
                forward()  # lazy set-up of libraries must not happen while capturing
                torch.cuda.synchronize()
                torch.cuda.empty_cache()  # what that has left can serve no capture
                backend.attend = self._cut
                self._begin()
                forward()
                self._graphs[-1].capture_end()
        finally:
            backend.attend = backend.attend_layer
        torch.cuda.current_stream().wait_stream(stream)

    def _begin(self) -> None:
        self._graphs.append(torch.cuda.CUDAGraph())
        self._graphs[-1].capture_begin(pool=self._pool)

    def _cut(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int, softcap: float) -> Tensor:
        self._graphs[-1].capture_end()
        self._begin()
        out = torch.empty_like(q)
        q, k, v, left = (_place_of(tensor) for tensor in (q, k, v, out))
        self._cuts.append(Cut(q, k, v, left, scaling, window, softcap))
        return out

    def replay(self, num_tokens: int, *, to_the_end: bool) -> None:
        """The pass over the first `num_tokens` rows, with the backend's present tables; other rows hold anything.

        Not `to_the_end`: up to the last attention, for a step of which nobody wants to know the result.
        """
        for graph, cut in zip(self._graphs, self._cuts, strict=False):  # there is one graph more
            graph.replay()
            q, k, v, out = (x[:num_tokens] for x in (cut.q, cut.k, cut.v, cut.out))
            self._backend.attend_layer(q, k, v, cut.scaling, cut.window, cut.softcap, out)
        if to_the_end:
            self._graphs[-1].replay()


def _place_of(tensor: Tensor) -> Tensor:
    """The same memory, not owned: the pool gives it to the next layer, as it would if attention were captured."""
    assert tensor.is_contiguous()
    assert tensor.element_size() == 2
    return torch.as_tensor(_Place(tensor), device=tensor.device).view(tensor.dtype)


class _Place:
    """Memory by its address, as other libraries hand it to PyTorch, which would own it otherwise."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape), "typestr": "<i2", "data": (tensor.data_ptr(), False), "version": 3,
        }  # fmt: skip
