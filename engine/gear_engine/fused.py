"""Projections of one vector by several matrices, done as one product, on any device and in any dtype.
It knows the names that architectures give such projections; it refuses to know what they are for.

A step at batch 1 spends its time starting products, not computing them: three a layer are saved. The modules stay where
they are and answer as before; only the first of a group to be asked multiplies.
"""

import functools
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

# Children of one module that transformers calls with the same input.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fuse_projections(model: nn.Module) -> int:
    """Let every group of plain linear layers share one product; returns how many layers now do. Repeating is harmless.

    Quantised layers, layers that something has hooked into and names that are not known stay as they are. The weights
    of a group become views of one tensor, so what they take in memory, and under which names, stays the same. Call it
    where the model is to stay: moved to another device or dtype, it would have to be fused again.
    """
    num_fused = 0
    for parent in list(model.modules()):
        for names in GROUPS:
            layers = [getattr(parent, name, None) for name in names]
            linears = [layer for layer in layers if _is_plain(layer)]
            if len(linears) == len(names) and _agree(linears):
                _Shared(linears)
                num_fused += len(linears)
    return num_fused


def _is_plain(layer: object) -> TypeGuard[nn.Linear]:
    """Exactly `nn.Linear`, with ordinary weights, and called as its class says."""
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


class _Shared:
    """The stacked weights of some linear layers, and the product that is being handed out."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        self.weight = _stacked([linear.weight for linear in linears])
        self.bias = None if linears[0].bias is None else _stacked([linear.bias for linear in linears])
        self._sizes = [linear.out_features for linear in linears]
        self._input: Tensor | None = None
        self._parts: dict[int, Tensor] = {}
        for i, linear in enumerate(linears):
            linear.forward = functools.partial(self._part, i)  # type: ignore[method-assign]

    def _part(self, i: int, x: Tensor) -> Tensor:
        """The rows of layer i of the product with x, which is computed when it is first asked for."""
        if self._input is not x or i not in self._parts:
            product = functional.linear(x, self.weight, self.bias)
            self._input, self._parts = x, dict(enumerate(product.split(self._sizes, dim=-1)))
        part = self._parts.pop(i)
        if not self._parts:
            self._input = None  # nothing outlives the layer that asked
        return part


@torch.no_grad()
def _stacked(parameters: list[Tensor]) -> Tensor:
    """All of them in one tensor [ΣO, …], of which they are views from now on."""
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, rows in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
        parameter.data = rows
    return whole
