"""Pools of random tokens for the GPU tests, with what their pages read back as."""

import torch
from torch import Tensor

from gear_compression.layout import Layout
from gear_compression.reference.pages import compress_pages, decompress_pages
from gear_compression.reference.rotation import hadamard


def random_tokens(layout: Layout, length: int, generator: torch.Generator) -> Tensor:
    """K and V [L, 2, length, H, D] bf16 in the stored basis; keys with channels far from zero, as real ones have."""
    L, H, D = layout.num_layers, layout.num_kv_heads, layout.head_dim
    bias = torch.randn(L, 2, 1, H, D, generator=generator) * torch.tensor([3.0, 0.0]).view(1, 2, 1, 1, 1)
    return (torch.randn(L, 2, length, H, D, generator=generator) + bias).bfloat16()


class Pool:
    """Sequences of random tokens as an engine would leave them: full pages sealed by the definition, the rest open."""

    def __init__(self, layout: Layout, lengths: list[int], seed: int = 0) -> None:
        self.layout, self.lengths = layout, lengths
        L, H, S = layout.num_layers, layout.num_kv_heads, layout.page_size
        g = torch.Generator().manual_seed(seed)
        num_slots = sum(n // S + 1 + layout.max_runs for n in lengths)
        slots = torch.randperm(num_slots, generator=g).tolist()
        slab = torch.randint(0, 256, (num_slots, layout.page_bytes), dtype=torch.uint8, generator=g)  # poison
        runs = runs_of(slab, layout)
        page_table = torch.full((len(lengths), max(max(lengths) // S, 1) + 1), -1, dtype=torch.int32)
        open_slots = torch.full((len(lengths), layout.max_runs), -1, dtype=torch.int32)
        self.exact: list[Tensor] = []  # of each sequence: K, V [L, 2, n, H, D] float32 as they read back
        for n, length in enumerate(lengths):
            sealed = max(length - 1, 0) // S  # the page of the last token is still open to it
            kv = random_tokens(layout, length, g)
            back = kv.float()
            for page in range(sealed):
                slot = page_table[n, page] = slots.pop()
                tokens = slice(page * S, (page + 1) * S)
                for layer in range(L):
                    if layout.is_raw:
                        runs[slot, layer] = kv[layer, :, tokens].permute(2, 0, 1, 3)
                        continue
                    first = torch.tensor([page == 0])
                    k, v = kv[layer, :, None, tokens]
                    records = compress_pages(k, v, layout, first, layer)
                    at = layout.layers[layer]
                    slab[slot, at.start : at.start + H * at.record_bytes] = records.flatten()
                    back[layer, :, tokens] = torch.stack(decompress_pages(records, layout, first, layer))[:, 0]
            for run in range(-(-(length - sealed * S) // layout.run_tokens)):
                slot = open_slots[n, run] = slots.pop()
                begin = sealed * S + run * layout.run_tokens
                end = min(begin + layout.run_tokens, length)
                runs[slot, :, :, :, : end - begin] = kv[:, :, begin:end].permute(0, 3, 1, 2, 4)
            self.exact.append(back)
        self.slab, self.page_table, self.open_slots = slab.cuda(), page_table.cuda(), open_slots.cuda()

    def attention(self, q: Tensor, layer: int, scaling: float, window: int = 0, softcap: float = 0.0) -> Tensor:
        """The last token's, by definition in float64: q [N, Q, D] → the same."""
        out = torch.zeros(q.shape, dtype=torch.float64)
        for n, length in enumerate(self.lengths):
            if length:
                first = max(0, length - window) if window else 0
                k, v = self.exact[n][layer, :, first:]
                out[n] = attend(q[n], k, v, self.layout, layer, scaling, softcap)
        return out


def runs_of(slab: Tensor, layout: Layout) -> Tensor:
    """[num_slots, L, H, 2, run_tokens, D] bf16, a view."""
    shape = (layout.num_layers, layout.num_kv_heads, 2, layout.run_tokens, layout.head_dim)
    return slab.view(torch.bfloat16)[:, : torch.Size(shape).numel()].unflatten(1, shape)


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, layer: int, scaling: float, softcap: float) -> Tensor:
    """One query in float64: q [Q, D], k, v [n, H, D] in the stored basis → [Q, D]."""
    group = q.shape[0] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qd,nqd->qn", q.double(), k) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    out = torch.einsum("qn,nqd->qd", scores.softmax(-1), v)
    return out @ hadamard(q.shape[1]).double() if layout.rotates(layer)[1] else out
