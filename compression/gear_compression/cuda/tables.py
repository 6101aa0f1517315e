"""The integers of a step, as the kernels read them: from a packed batch on the host to a handful of int32 arrays.

No tensor is computed with here, so that every index can be tested without a GPU. Decoding sequences come first in a
batch; a prompt chunk is cut into tiles of queries that lie in one page, and sees the pages before it dequantised.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gear_compression.layout import Layout
from gear_compression.paged import PagedBatch
from gear_compression.triton.tiles import tokens_of_a_tile

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SealArrays:
    """Pages that fill in this step, as `gear::seal_pages` takes them."""

    slots: Ints  # [P]
    is_first: Ints
    run_slots: Ints  # [P, R]
    num_old: Ints
    rows: Ints

    def arrays(self) -> list[Ints]:
        return [self.slots, self.is_first, self.run_slots, self.num_old, self.rows]


@dataclass(frozen=True, slots=True)
class ChunkArrays:
    """Some of a step's prompt chunks: as many as find room for the pages before them in the scratch."""

    slots: Ints  # [P] pages to dequantise
    is_first: Ints
    rows: Ints  # of the scratch, where they go
    tiles: Ints  # [M, 6] as `prefill_attention` takes them

    def arrays(self) -> list[Ints]:
        return [self.slots, self.is_first, self.rows, self.tiles]


@dataclass(frozen=True, slots=True)
class StepArrays:
    """T rows, the first `num_decodes` of them of as many decoding sequences."""

    num_decodes: int
    slots: Ints  # [T] run that the row's keys and values go to; −1: its page is sealed within the step
    offsets: Ints  # [T] and the token of it
    page_table: Ints  # [num_decodes, P]
    open_slots: Ints  # [num_decodes, R] of the page that the new token belongs to
    lengths: Ints  # [num_decodes] with the new token
    filled_by_chunks: SealArrays  # before a layer attends
    filled_by_decodes: SealArrays  # once all layers have attended
    chunks: list[ChunkArrays]
    own_rows: (
        Ints  # rows of the chunks' own pages: of the step's rows, or T + i for entry i of the next two; may be [0]
    )
    old_slots: Ints  # runs of tokens of those pages that were computed before
    old_offsets: Ints


def num_scratch_tokens(layout: Layout, max_len: int, max_batch_tokens: int) -> int:
    """Of dequantised pages: the longest sequence's, and beside it those of as many short prompts as a step takes."""
    return (max_len // layout.page_size + 1) * layout.page_size + max_batch_tokens


def step_arrays(batch: PagedBatch, layout: Layout, scratch_tokens: int) -> StepArrays:
    """`scratch_tokens`: how many dequantised tokens the scratch holds, at least those of the longest sequence."""
    S = layout.page_size
    starts = batch.query_start.numpy()
    context = batch.context_len.numpy()
    page_table, before, after = batch.page_table.numpy(), batch.open_slots.numpy(), batch.next_open_slots.numpy()
    num_new = np.diff(starts)
    num_decodes = int((num_new == 1).cumprod().sum())
    ends = context + num_new

    # Where each row goes.
    of_row = np.repeat(np.arange(len(num_new)), num_new)
    positions = np.arange(starts[-1]) - starts[of_row] + context[of_row]
    pages, in_page = positions // S, positions % S
    runs = in_page // layout.run_tokens
    fills = pages < ends[of_row] // S
    slots = np.where(fills, -1, after[of_row, runs])
    decoding = of_row < num_decodes
    if layout.is_raw:  # a raw page is sealed where it lies
        slots = np.where(fills, page_table[of_row, np.minimum(pages, page_table.shape[1] - 1)], slots)
    else:  # the last token of a page that a decode fills stands beside the others, from where all are sealed together
        slots = np.where(fills & decoding, before[of_row, runs], slots)
    own = after[:num_decodes].copy()
    full = fills[:num_decodes]
    own[full] = slots[:num_decodes][full, None] if layout.is_raw else before[:num_decodes][full]

    chunks, own_rows, old = _chunks(starts, context, ends, num_decodes, page_table, before, layout, scratch_tokens)
    decodes = np.flatnonzero(full) if not layout.is_raw else np.zeros(0, np.int64)
    filled = [] if layout.is_raw else [
        (n, page) for n in range(num_decodes, len(ends)) for page in range(context[n] // S, ends[n] // S)
    ]  # fmt: skip
    of, page = np.array(filled, np.int64).reshape(-1, 2).T
    return StepArrays(
        num_decodes=num_decodes,
        slots=_ints(slots),
        offsets=_ints(in_page % layout.run_tokens),
        page_table=_ints(page_table[:num_decodes]),
        open_slots=_ints(own),
        lengths=_ints(ends[:num_decodes]),
        filled_by_chunks=SealArrays(
            slots=_ints(page_table[of, page]),
            is_first=_ints(page == 0),
            run_slots=_ints(before[of]),
            num_old=_ints(np.maximum(context[of] - page * S, 0)),
            rows=_ints(starts[of] + np.maximum(page * S - context[of], 0)),
        ),
        filled_by_decodes=SealArrays(
            slots=_ints(page_table[decodes, pages[decodes]]),
            is_first=_ints(pages[decodes] == 0),
            run_slots=_ints(before[decodes]),
            num_old=np.full(len(decodes), S, np.int32),
            rows=np.zeros(len(decodes), np.int32),
        ),
        chunks=chunks,
        own_rows=own_rows,
        old_slots=_ints(old[:, 0]),
        old_offsets=_ints(old[:, 1]),
    )


def _chunks(
    starts: NDArray[np.int64],
    context: NDArray[np.int64],
    ends: NDArray[np.int64],
    num_decodes: int,
    page_table: NDArray[np.int64],
    before: NDArray[np.int64],
    layout: Layout,
    scratch_tokens: int,
) -> tuple[list[ChunkArrays], Ints, NDArray[np.int64]]:
    """(chunks, own_rows, [(old slot, old offset)]) as in `StepArrays`."""
    S, tile_tokens = layout.page_size, tokens_of_a_tile(layout.page_size)
    num_rows = int(starts[-1])
    extra: list[int] = []  # rows of pages of which some tokens were computed before
    old: list[tuple[int, int]] = []
    groups: list[ChunkArrays] = []
    tiles: list[list[int]] = []
    past: list[tuple[int, int, int]] = []  # (slot, is first, row)
    used = 0
    for n in range(num_decodes, len(ends)):
        begin, end = int(context[n]), int(ends[n])
        num_past = (end - 1) // S
        if used + num_past * S > scratch_tokens:
            groups.append(_group(past, tiles))
            tiles, past, used = [], [], 0
        past += [(int(page_table[n, page]), page == 0, used + page * S) for page in range(num_past)]
        own_row = int(starts[n]) - begin  # of token 0, were it among the rows
        num_old = begin % S
        first_row = own_row + begin - num_old
        if num_old:
            first_row = num_rows + len(extra)
            extra += range(num_rows + len(old), num_rows + len(old) + num_old)
            old += [(int(before[n, t // layout.run_tokens]), t % layout.run_tokens) for t in range(num_old)]
            extra += range(own_row + begin, own_row + min(end, begin - num_old + S))
        at = begin
        while at < end:
            page = at // S * S
            stop = min(end, page + S, at // tile_tokens * tile_tokens + tile_tokens)
            row = first_row if page < begin else own_row + page
            tiles.append([own_row + at, stop - at, at - page, row, used, page])
            at = stop
        used += num_past * S
    if tiles:
        groups.append(_group(past, tiles))
    own_rows = np.array([*range(num_rows), *extra] if extra else [], np.int32)
    return groups, own_rows, np.array(old, np.int64).reshape(-1, 2)


def _group(past: list[tuple[int, int, int]], tiles: list[list[int]]) -> ChunkArrays:
    slots, is_first, rows = _ints(np.array(past, np.int64).reshape(-1, 3)).T
    longest_first = sorted(tiles, key=lambda tile: -tile[5])  # the last ones to start are then the shortest
    return ChunkArrays(slots.copy(), is_first.copy(), rows.copy(), np.array(longest_first, np.int32))


def _ints(values: NDArray[np.generic]) -> Ints:
    return np.ascontiguousarray(values, np.int32)
