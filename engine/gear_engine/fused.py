"""Projections of one vector by several matrices, done as one product, on any device and in any dtype.
It knows the names that architectures give such projections; it refuses to know what they are for.

A step at batch 1 spends its time starting products, not computing them: three a layer are saved. The modules stay where
they are and answer as before; only the first of a group to be asked multiplies.
"""

from collections.abc import Callable, Iterator
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

# Children of one module that transformers calls with the same input.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

Product = Callable[[Tensor], Tensor]
# Makes x -> [x @ W1ᵀ, x @ W2ᵀ, …] of some layers, and says what becomes of their own weights.
Stacking = Callable[[list[nn.Linear]], Product]


class Stacked:
    """One product with all their weights, which become views of one tensor: nothing is held twice."""

    @torch.no_grad()
    def __init__(self, linears: list[nn.Linear]) -> None:
        self.weight = _as_one([x.weight for x in linears])
        self.bias = None if linears[0].bias is None else _as_one([linear.bias for linear in linears])

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


def fuse_projections(model: nn.Module, stacking: Stacking = Stacked) -> int:
    """Let every group of plain linear layers share one product; returns how many layers now do. Repeating is harmless.

    Layers that are not plain and names that are not known stay as they are. Parameters keep their names, and with
    `Stacked` their values and bytes. Call it where the model is to stay: moved to another device or dtype, it would
    have to be fused again.
    """
    num_fused = 0
    for parent in list(model.modules()):
        for names in GROUPS:
            linears = [layer for name in names if is_plain(layer := getattr(parent, name, None))]
            if len(linears) == len(names) and _agree(linears):
                Shared(linears, stacking(linears))
                num_fused += len(linears)
    return num_fused


def plain_linears(model: nn.Module) -> Iterator[nn.Linear]:
    """The layers that may be replaced: see `is_plain`."""
    return (module for module in model.modules() if is_plain(module))


def is_plain(layer: object) -> TypeGuard[nn.Linear]:
    """Exactly `nn.Linear`, not a quantised kind of it, without hooks, and called as its class says."""
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and type(layer.weight) is nn.Parameter
        and layer.weight.dtype.is_floating_point
        and not layer.weight.is_meta
        and not (layer._forward_hooks or layer._forward_pre_hooks)
    )


def _agree(linears: list[nn.Linear]) -> bool:
    kinds = {(x.in_features, x.weight.dtype, x.weight.device, x.bias is None) for x in linears}
    return len(kinds) == 1


class Shared:
    """One product for several layers, of which each takes its part."""

    def __init__(self, linears: list[nn.Linear], product: Product) -> None:
        self._product = product
        self._sizes = [linear.out_features for linear in linears]
        self._input: Tensor | None = None
        self._parts: dict[int, Tensor] = {}
        for i, linear in enumerate(linears):
            linear.__class__ = _SharedLinear
            linear.share, linear.index = self, i  # type: ignore[assignment]

    def part(self, i: int, x: Tensor) -> Tensor:
        """The rows of layer i of the product with x, which is computed when it is first asked for."""
        if self._input is not x or i not in self._parts:
            self._input, self._parts = x, dict(enumerate(self._product(x).split(self._sizes, dim=-1)))
        part = self._parts.pop(i)
        if not self._parts:
            self._input = None  # nothing outlives the layer that asked
        return part


class _SharedLinear(nn.Linear):
    """One of a group. A class, and no function on each module: layers that look alike are then compiled once."""

    share: Shared
    index: int

    def forward(self, x: Tensor) -> Tensor:
        return self.share.part(self.index, x)


def _as_one(parameters: list[Tensor]) -> Tensor:
    """All of them in one tensor [ΣO, …], of which they are views from now on."""
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, rows in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
        parameter.data = rows
    return whole
