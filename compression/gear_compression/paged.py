"""Which tokens of which sequences a step computes, and in which slots of the pool their keys and values live.

Page-faithful, on every path: a token attends to its own page exactly and to every earlier page as it is sealed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gear_compression.layout import Layout


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """A packed batch of N sequences with T tokens in all. Integers on the host; −1 where a table has no slot.

    [0 .. context_len) is in the pool; the step computes [context_len .. context_len + num_new).
    """

    query_start: Tensor  # [N + 1] int64: first row of each sequence among the packed tokens
    context_len: Tensor  # [N] int64
    page_table: Tensor  # [N, P] int64: slots of sealed pages, those that this step seals included
    open_slots: Tensor  # [N, R] int64: runs of the page that is open before the step
    next_open_slots: Tensor  # [N, R] int64: runs of the page that is open after it (the same page or a later one)

    @property
    def num_sequences(self) -> int:
        return self.context_len.shape[0]


@dataclass(frozen=True, slots=True)
class Segment:
    """The tokens [start, end) of one sequence that a step computes within one page."""

    sequence: int
    page: int
    start: int
    end: int
    row: int  # of token `start` among the packed tokens
    own_start: int  # [own_start, start) of this page is in the pool already, exact
    fills_page: bool


def segments(batch: PagedBatch, page_size: int) -> Iterator[Segment]:
    """The step's tokens, sequence by sequence and page by page."""
    starts = batch.query_start.tolist()
    for n, context in enumerate(batch.context_len.tolist()):
        position, end = context, context + starts[n + 1] - starts[n]
        while position < end:
            page = position // page_size
            stop = min(end, (page + 1) * page_size)
            yield Segment(
                sequence=n,
                page=page,
                start=position,
                end=stop,
                row=starts[n] + position - context,
                own_start=page * page_size,
                fills_page=stop == (page + 1) * page_size,
            )
            position = stop


def open_runs(slab: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """slab [num_slots, page_bytes] uint8 → its slots as runs [num_slots, L, H, 2, run_tokens, D], a view."""
    shape = (layout.num_layers, layout.num_kv_heads, 2, layout.run_tokens, layout.head_dim)
    flat = slab.view(dtype)[:, : torch.Size(shape).numel()]
    return flat.unflatten(1, shape)


def exact_page(
    runs: Tensor, batch: PagedBatch, segment: Segment, layer: int, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """K and V [H, m, D] of the segment's page up to segment.end: what is in the pool, then the step's own rows.

    runs: as `open_runs` gives them. k, v [T, H, D]: all rows of the step, already rounded to the pool's dtype.
    """
    rows = slice(segment.row, segment.row + segment.end - segment.start)
    new = torch.stack([k[rows], v[rows]]).permute(2, 0, 1, 3)  # [H, 2, new, D]
    num_old = segment.start - segment.own_start
    if num_old:
        run_tokens = runs.shape[4]
        slots = batch.open_slots[segment.sequence, : -(-num_old // run_tokens)]
        old = runs[slots, layer].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :num_old]  # [H, 2, num_old, D]
        new = torch.cat([old.to(new.dtype), new], dim=2)
    return new[:, 0], new[:, 1]


@dataclass(frozen=True, slots=True)
class OpenRows:
    """Where a step's rows go that stay in open pages: row rows[i] to token offsets[i] of slot slots[i]."""

    rows: Tensor
    slots: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, batch: PagedBatch, layout: Layout) -> "OpenRows":
        starts = batch.query_start.tolist()
        next_slots = batch.next_open_slots.tolist()
        rows, slots, offsets = [], [], []
        for n, context in enumerate(batch.context_len.tolist()):
            end = context + starts[n + 1] - starts[n]
            for position in range(max(context, end - end % layout.page_size), end):
                run, offset = divmod(position % layout.page_size, layout.run_tokens)
                rows.append(starts[n] + position - context)
                slots.append(next_slots[n][run])
                offsets.append(offset)
        return cls(*(torch.tensor(x, dtype=torch.int64) for x in (rows, slots, offsets)))

    def write(self, runs: Tensor, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v [T, H, D] of the step, in the stored basis; runs as `open_runs` gives them."""
        if len(self.rows):
            both = torch.stack([k[self.rows], v[self.rows]], dim=2)  # [rows, H, 2, D]
            runs[self.slots, layer, :, :, self.offsets] = both.to(runs.dtype)
