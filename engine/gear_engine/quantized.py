"""Weights in 8 bits, made at load: every linear layer multiplies in FP8, with a scale for each output and each token.
It knows linear layers; it refuses to know checkpoints that are quantised already, which transformers loads.

Weights are rounded once, activations at every product (the largest of a row becomes the largest that FP8 has), and sums
are float32. One matrix at a time is in float32 on the device, so that no more than the 8-bit weights need fit there.
"""

import itertools

import torch
from torch import Tensor, nn

from gear_engine.fused import Product, Shared, Stacked, fuse_projections, plain_linears
from gear_engine.protocol import EngineStartError

QUANTIZATIONS = ("none", "fp8")
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of a row of zeros
MULTIPLE = 16  # of rows and columns, which the product asks for
FIRST_CAPABILITY = (8, 9)  # of GPUs that multiply FP8: Ada, Hopper
ROUTERS = ("gate", "router")  # which choose experts: a few rows, on whose order everything hangs


def check_device(device: str) -> None:
    """Raises EngineStartError where FP8 is not multiplied, or so slowly that nobody can want it."""
    if device == "cpu":
        raise EngineStartError(
            "--quantization fp8 is for a GPU (a CPU multiplies FP8 many times slower than float32): leave it out"
        )
    if (capability := torch.cuda.get_device_capability()) < FIRST_CAPABILITY:
        raise EngineStartError(
            "--quantization fp8 needs a GPU of compute capability 8.9 or above (Ada, Hopper), and this one has "
            f"{'.'.join(map(str, capability))}: leave it out"
        )


@torch.no_grad()
def quantize_linears(model: nn.Module, device: torch.device) -> int:
    """Move a model to the device, its linear layers in FP8 and fused where `fused` knows how; returns how many.

    What stays as it is: embeddings, the output layer, routers, parameters that are in no linear layer (experts held as
    one tensor), and shapes that are no multiple of 16. The weights before are let go of one by one.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    chosen = {x for x in plain_linears(model) if x is not head and names[x] not in ROUTERS and _fits(x)}
    ours = {id(parameter) for linear in chosen for parameter in linear.parameters()}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if id(tensor) not in ours:  # a copy: they may be mapped from a file, all of which stays with the last
            tensor.data = tensor.data.to(device, copy=True)

    def stacking(linears: list[nn.Linear]) -> Product:
        return _Fp8Product(linears, device) if chosen.issuperset(linears) else Stacked(linears)

    fuse_projections(model, stacking)
    for linear in chosen.intersection(plain_linears(model)):
        Shared([linear], stacking([linear]))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return len(chosen)


def _fits(linear: nn.Linear) -> bool:
    return linear.in_features % MULTIPLE == 0 and linear.out_features % MULTIPLE == 0


class _Fp8Product:
    """One product with the weights of some layers, which become views of it, as scales do: nothing is held twice."""

    def __init__(self, linears: list[nn.Linear], device: torch.device) -> None:
        sizes = [linear.out_features for linear in linears]
        self.weight = torch.empty(sum(sizes), linears[0].in_features, dtype=FP8, device=device)
        self.scale = torch.empty(sum(sizes), device=device)
        biases = [linear.bias.to(device) for linear in linears if linear.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        parts = zip(linears, self.weight.split(sizes), self.scale.split(sizes), strict=True)
        for linear, weight, scale in parts:
            codes, scales = quantize_rows(linear.weight.to(device))
            weight.copy_(codes)
            scale.copy_(scales[:, 0])
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.register_buffer("weight_scale", scale)
        if self.bias is not None:
            for linear, bias in zip(linears, self.bias.split(sizes), strict=True):
                linear.bias = nn.Parameter(bias, requires_grad=False)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., I] → [..., O] in the dtype of x."""
        codes, scales = quantize_rows(x.reshape(-1, x.shape[-1]))
        y = torch._scaled_mm(codes, self.weight.t(), scale_a=scales, scale_b=self.scale[None], out_dtype=torch.bfloat16)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], len(self.weight))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [R, I] → (codes [R, I] in FP8, scale [R, 1] float32): x ≈ codes · scale. NaN or infinity spoils its row."""
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) / FP8_MAX).clamp(min=SMALLEST_SCALE)
    return (wide / scale).to(FP8), scale
