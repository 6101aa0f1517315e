// Where the exact tokens of a page lie: in runs of the pool, and behind them in the rows that the step computes.
#pragma once
#include "page.cuh"

struct PageList {
  const int* slots;      // [P] of the sealed pages; negative: nothing to do
  const int* is_first;   // [P] 1 where the page begins a sequence
  const int* run_slots;  // [P, max_runs]
  const int* num_old;    // [P] tokens in runs
  const int* rows;       // [P] of the first token that is not, among the step's rows
  int max_runs;
};

// The D keys (part 0) or values (1) of a page's token, bf16 in the stored basis. rows: [T, H, D] of that part.
DEVICE const uint16_t* exact_token(const uint8_t* pool, int64_t slot_bytes, int64_t runs_start, const uint16_t* rows,
                                   const PageList& pages, int page, int head, int part, int token) {
  if (token >= pages.num_old[page])
    return rows + ((int64_t)(pages.rows[page] + token - pages.num_old[page]) * Page::num_heads + head) * D;
  const int64_t slot = pages.run_slots[page * pages.max_runs + token / Page::run_tokens];
  return (const uint16_t*)(pool + slot * slot_bytes + runs_start + (2 * head + part) * kRunBytes) +
         token % Page::run_tokens * D;
}

// Row u (of 8, or 4 in a block of 32 rows) of lane g in a tile block.
DEVICE int tile_row(int u, int g) { return 16 * (u / 2) + 2 * g + u % 2; }
// Where column t of a value block lies among its 64.
DEVICE int turned(int t) { return t / 4 % 4 * 16 + t / 16 * 4 + t % 4; }

// Bytes of 8 (ROWS 64) or 4 (32) codes of a lane and column in each plane; calls emit(byte offset in the codes, byte).
template <int BITS, int ROWS, class Emit>
DEVICE void each_code_byte(const int* codes, int block, int columns, int g, int column, Emit emit) {
  constexpr int kCodes = ROWS / 8;
  int plane = 0, shift = 0;
#pragma unroll
  for (int width = BITS == 3 ? 2 : BITS == 5 ? 4 : BITS; width > 0; width = width > 1 && width < BITS ? BITS - width : 0) {
    const int digits = 8 / width;
#pragma unroll
    for (int row = 0; row < (kCodes * width + 7) / 8; row++) {
      int byte = 0;
#pragma unroll
      for (int n = 0; n < digits; n++)
        if (row * digits + n < kCodes) byte |= (codes[row * digits + n] >> shift & ((1 << width) - 1)) << (width * n);
      emit(plane + block * (ROWS * columns * width / 8) + (row * 8 + g) * columns + column, byte, width, shift, row);
    }
    plane += S * D * width / 8;
    shift += width;
  }
}
