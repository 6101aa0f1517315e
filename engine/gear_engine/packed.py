"""Linear layers on a CPU: weights laid out as oneDNN multiplies them, in float32 or bfloat16, whichever is faster here.
It knows products of few rows (decoding) and of many (prompts); it refuses to know models beyond their linear layers.

Plain products read weights in the order that PyTorch keeps them in: on some processors that is half as fast in float32,
and in bfloat16 every product with a single row first turns the whole matrix around. Packed weights are turned once.
"""

import functools
import itertools
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gear_engine.fused import fuse_projections, plain_linears

FEW_ROWS = 32  # up to so many rows a product is bound by reading the weights, as in decoding
MARGIN = 1.2  # bfloat16 rounds: it must be so many times faster than float32 to be chosen

# The trial: beyond every cache when all matrices are read in turn, and over in a fraction of a second.
TRIAL_MATRICES, TRIAL_SIZE, TRIAL_ROUNDS = 16, 1024, 3
TRIAL_FEW_ROWS, TRIAL_MANY_ROWS = (1, 16), (512,)


@dataclass(frozen=True, slots=True)
class Products:
    """In which dtype a model multiplies. Sums are float32, and what lies between products keeps the model's dtype."""

    few_rows: torch.dtype  # decoding
    many_rows: torch.dtype  # prompts
    few_speedup: float | None = None  # of bfloat16 over float32, where that was measured
    many_speedup: float | None = None

    def __str__(self) -> str:
        few, many = (str(dtype).removeprefix("torch.") for dtype in (self.few_rows, self.many_rows))
        if self.few_speedup is None:
            return f"{few} for decoding, {many} for prompts"
        return (
            f"{few} for decoding, {many} for prompts (bfloat16 is {self.few_speedup:.1f}x and {self.many_speedup:.1f}x "
            "as fast as float32 here)"
        )


def can_pack() -> bool:
    """Whether this build of torch has oneDNN."""
    return torch.backends.mkldnn.is_available()


@torch.inference_mode()
def fastest_products() -> Products:
    """Multiply by matrices of either dtype for a moment, and choose for few rows and for many."""
    if not (can_pack() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return Products(torch.float32, torch.float32)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that the thread's own clock tells, which stands still while a neighbour computes
    try:
        few, many = _trial()
    finally:
        torch.set_num_threads(num_threads)
    chosen = [torch.bfloat16 if speedup >= MARGIN else torch.float32 for speedup in (few, many)]
    return Products(chosen[0], chosen[1], few, many)


def _trial() -> tuple[float, float]:
    """How many times as fast bfloat16 is, with few rows and with many."""
    matrices = [torch.full((TRIAL_SIZE, TRIAL_SIZE), 0.01 * i) for i in range(TRIAL_MATRICES)]
    packed = {dtype: [_packed(matrix, dtype) for matrix in matrices] for dtype in (torch.float32, torch.bfloat16)}
    return _speedup(packed, TRIAL_FEW_ROWS, TRIAL_MATRICES), _speedup(packed, TRIAL_MANY_ROWS, 2)


def _speedup(packed: dict[torch.dtype, list[Tensor]], num_rows: tuple[int, ...], num_matrices: int) -> float:
    """Time of float32 ÷ time of bfloat16, each the best of interleaved rounds."""
    seconds = dict.fromkeys(itertools.product(packed, num_rows), torch.inf)
    for _, (dtype, rows) in itertools.product(range(TRIAL_ROUNDS), seconds):
        x = torch.ones(rows, TRIAL_SIZE)
        start = time.thread_time()
        for weight in packed[dtype][:num_matrices]:
            _multiply(x, weight, None)
        seconds[dtype, rows] = min(seconds[dtype, rows], time.thread_time() - start)
    full, half = (sum(seconds[dtype, rows] for rows in num_rows) for dtype in (torch.float32, torch.bfloat16))
    return full / half


def pack_linears(model: nn.Module, products: Products) -> int:
    """Give every plain linear layer packed weights, fused where `fused` knows how; returns the bytes that they take.

    The layers' own weights are let go of one by one and cannot be had back: they are empty from then on.
    """
    packing = _Packing(products)
    fuse_projections(model, packing)
    for linear in list(plain_linears(model)):
        linear.forward = packing([linear])  # type: ignore[method-assign]
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.clone()  # weights are mapped from a file, all of which stays in memory with the last
    return packing.num_bytes


class _Packing:
    """Makes packed products of linear layers, and counts their bytes."""

    def __init__(self, products: Products) -> None:
        self._products = products
        self.num_bytes = 0

    def __call__(self, linears: list[nn.Linear]) -> "functools.partial[Tensor]":
        weight = _joined([linear.weight.data for linear in linears])
        bias = None if linears[0].bias is None else _joined([linear.bias.data for linear in linears])
        dtypes = {self._products.few_rows, self._products.many_rows}
        packed = {dtype: _packed(weight, dtype) for dtype in dtypes}
        self.num_bytes += sum(tensor.nbytes for tensor in packed.values())
        for linear in linears:  # a new parameter: the old one may be the embedding's too
            linear.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        return functools.partial(
            _multiply_any, few=packed[self._products.few_rows], many=packed[self._products.many_rows], bias=bias
        )


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [O, I] in the layout that suits few rows; it serves many rows as well."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), TRIAL_FEW_ROWS[-1])


def _multiply_any(x: Tensor, few: Tensor, many: Tensor, bias: Tensor | None) -> Tensor:
    return _multiply(x, few if x.numel() <= FEW_ROWS * x.shape[-1] else many, bias)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., I] -> [..., O], in the dtype of x whatever that of the weight."""
    narrow = None if bias is None else bias.to(weight.dtype)
    return torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, narrow, "none", [], "").to(x.dtype)
