"""Page-faithful attention by definition: pages decompressed one by one, every query computed alone in float32."""

import torch
from torch import Tensor

from gear_compression.layout import Layout, RawLayout
from gear_compression.paged import OpenRows, PagedBatch, Segment, exact_page, open_runs, segments
from gear_compression.reference.pages import compress_pages, decompress_pages
from gear_compression.reference.rotation import hadamard


class ReferenceBackend:
    """Reads and writes the pool `slab` [num_slots, page_bytes] uint8 as the definition says. Slow; for tests."""

    name = "reference"

    def __init__(self, slab: Tensor, layout: Layout, raw_dtype: torch.dtype) -> None:
        """`raw_dtype`: of raw pages; the open pages of a GEAR format are bf16."""
        self.slab = slab
        self.layout = layout
        self.runs = open_runs(slab, layout, raw_dtype if layout.is_raw else torch.bfloat16)

    def plan(self, batch: PagedBatch) -> PagedBatch:
        """What all layers of a step share."""
        return batch

    def attend(
        self,
        batch: PagedBatch,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """q [T, Q, D], k, v [T, H, D] → [T, Q, D] float32; seals the pages that fill, appends the rest."""
        layout = self.layout
        rotation = hadamard(layout.head_dim)
        q, k, v = q.float(), k.float(), v.float()
        rotates_keys, rotates_values = layout.rotates(layer)
        if rotates_keys:
            q, k = _rotated(q, rotation), _rotated(k, rotation)
        if rotates_values:
            v = _rotated(v, rotation)
        k, v = k.to(self.runs.dtype), v.to(self.runs.dtype)
        out = torch.empty_like(q)
        for segment in segments(batch, layout.page_size):
            own_k, own_v = exact_page(self.runs, batch, segment, layer, k, v)
            if segment.fills_page:
                self._seal(int(batch.page_table[segment.sequence, segment.page]), layer, own_k, own_v, segment)
            past_k, past_v = self._sealed(batch.page_table[segment.sequence, : segment.page].tolist(), layer)
            for i in range(segment.end - segment.start):
                length = segment.start + i + 1
                keys = torch.cat([past_k, own_k], 1)[:, :length].float()
                values = torch.cat([past_v, own_v], 1)[:, :length].float()
                out[segment.row + i] = attend_one(q[segment.row + i], keys, values, scaling, sliding_window, softcap)
        OpenRows.of(batch, layout).write(self.runs, layer, k, v)
        return _rotated(out, rotation) if rotates_values else out

    def _seal(self, slot: int, layer: int, k: Tensor, v: Tensor, segment: Segment) -> None:
        """k, v [H, S, D]."""
        if isinstance(self.layout, RawLayout):
            self.runs[slot, layer] = torch.stack([k, v], dim=1)
            return
        is_first = torch.tensor([segment.page == 0])
        records = compress_pages(k.transpose(0, 1)[None], v.transpose(0, 1)[None], self.layout, is_first, layer)
        self._records(slot, layer)[:] = records[0]

    def _sealed(self, slots: list[int], layer: int) -> tuple[Tensor, Tensor]:
        """K and V [H, len(slots) · S, D] of a sequence's first pages."""
        ks, vs = [torch.empty(self.layout.num_kv_heads, 0, self.layout.head_dim)], []
        vs.append(ks[0])
        for page, slot in enumerate(slots):
            if isinstance(self.layout, RawLayout):
                k, v = self.runs[slot, layer].unbind(1)
            else:
                is_first = torch.tensor([page == 0])
                pages = decompress_pages(self._records(slot, layer)[None], self.layout, is_first, layer)
                k, v = (x[0].transpose(0, 1) for x in pages)
            ks.append(k)
            vs.append(v)
        return torch.cat(ks, 1), torch.cat(vs, 1)

    def _records(self, slot: int, layer: int) -> Tensor:
        """[H, record_bytes] uint8, a view."""
        layout = self.layout
        assert not isinstance(layout, RawLayout)
        at, H = layout.layers[layer], layout.num_kv_heads
        return self.slab[slot, at.start : at.start + H * at.record_bytes].view(H, at.record_bytes)


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """x [T, heads, D], each token alone."""
    return torch.stack([token @ rotation for token in x])


def attend_one(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, sliding_window: int | None, softcap: float | None
) -> Tensor:
    """The last token's attention: q [Q, D], k, v [H, n, D] float32 → [Q, D]."""
    group = q.shape[0] // k.shape[0]
    first = 0 if sliding_window is None else max(0, k.shape[1] - sliding_window)
    k, v = (x[:, first:].repeat_interleave(group, dim=0) for x in (k, v))
    scores = (k @ q[:, :, None])[..., 0] * scaling  # [Q, n]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.softmax(-1)[:, None] @ v)[:, 0]
