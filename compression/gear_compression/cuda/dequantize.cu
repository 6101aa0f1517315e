// Dequantising sealed pages into bf16 scratch for a prompt chunk, where many queries share the work.
//
// A CTA takes 64 tokens of one (page, head), keys or values; a thread a column of its tiles.
#include "pages.cuh"

constexpr int kThreads = 128;

struct Args {
  const uint8_t* pool;
  int64_t slot_bytes, records_start;
  const int* slots;     // [P]
  const int* is_first;  // [P]
  const int* rows;      // [P]: where a page's tokens go in the scratch
  uint16_t* keys;       // [H, rows, D] bf16
  uint16_t* values;
  int64_t head_stride;  // entries
};

template <int BITS>
DEVICE float stored_number(const uint8_t* at, int n, float unit, bool is_signed) {
  if (BITS == 16) return bf16_at(at + 2 * n);
  return (is_signed ? (int)((const signed char*)at)[n] : (int)at[n]) * unit;
}

// The codes of one lane and column.
template <int BITS, int ROWS>
DEVICE void read_codes(const uint8_t* codes, int block, int columns, int g, int column, int (&out)[ROWS / 8]) {
  constexpr int kCodes = ROWS / 8;
#pragma unroll
  for (int u = 0; u < kCodes; u++) out[u] = 0;
  each_code_byte<BITS, ROWS>(out, block, columns, g, column, [&](int at, int, int width, int shift, int row) {
    const int byte = codes[at], digits = 8 / width;
#pragma unroll
    for (int n = 0; n < 8; n++)
      if (n < digits && row * digits + n < kCodes) out[row * digits + n] |= (byte >> (width * n) & ((1 << width) - 1)) << shift;
  });
}

template <class Part, bool IS_KEYS>
DEVICE void dequantize_part(const Args& args, const uint8_t* record, int token_block, int num_sinks, uint16_t* out) {
  constexpr int V = Part::num_vectors, R = Part::rank, O = Part::outliers;
  constexpr int kRank = R > 0 ? R : 1;
  constexpr int kRows = IS_KEYS ? 64 : kColumns, kCodes = kRows / 8, kAcross = IS_KEYS ? kColumns : 64;
  float scale_unit = 1.f, zero_unit = 1.f;
  if (Part::scale_bits == 8) scale_unit = bf16_at(record + Part::unit), zero_unit = bf16_at(record + Part::unit + 2);
  // Columns: channels for keys, tokens for values. Neighbouring threads: neighbouring columns, then lanes g.
  constexpr int kColumnCount = IS_KEYS ? D : 64, kBlocks = IS_KEYS ? 1 : D / kColumns;
  for (int item = threadIdx.x; item < kColumnCount * 8 * kBlocks; item += kThreads) {
    // Keys: channels run fastest, so that rows are written whole. Values: g does, for the same reason.
    const int column = IS_KEYS ? item % kColumnCount : item / 8 % kColumnCount;
    const int g = IS_KEYS ? item / kColumnCount : item % 8;
    const int row_block = IS_KEYS ? 0 : item / (8 * kColumnCount);
    const int channel_block = IS_KEYS ? column / kColumns : row_block;
    int codes[kCodes];
    read_codes<Part::bits, kRows>(record + Part::codes, token_block * (D / kColumns) + channel_block, kAcross, g,
                                  IS_KEYS ? column % kColumns : turned(column), codes);
    float factor[kRank];  // of the column
#pragma unroll
    for (int r = 0; r < R; r++) {
      if (Part::factor_bits == 16) {
        factor[r] = IS_KEYS ? bf16_at(record + Part::channels_factor + 2 * (r * D + column))
                            : bf16_at(record + Part::tokens_factor + 2 * (r * S + token_block * 64 + column));
      } else {
        const int byte = record[Part::channels_factor + (column / kColumns * (R / 2) + r / 2) * kColumns + column % kColumns];
        factor[r] = ((byte >> (r % 2 * 4) & 15) - (float)Format::factor_zero) * bf16_at(record + Part::factor_scale + 2 * r);
      }
    }
#pragma unroll
    for (int u = 0; u < kCodes; u++) {
      const int token = token_block * 64 + (IS_KEYS ? tile_row(u, g) : column);
      const int channel = IS_KEYS ? column : row_block * kColumns + tile_row(u, g);
      const int v = IS_KEYS ? channel : token, i = IS_KEYS ? token : channel;
      const int at = i / Part::group_size * V + v;
      const float scale = stored_number<Part::scale_bits>(record + Part::scale, at, scale_unit, false);
      const float zero = Part::symmetric ? scale * (-0.5f * ((1 << Part::bits) - 1))
                                         : stored_number<Part::scale_bits>(record + Part::zero, at, zero_unit, true);
      float y = codes[u] * scale + zero;
#pragma unroll
      for (int r = 0; r < R; r++) {
        float other;
        if (Part::factor_bits == 16)
          other = IS_KEYS ? bf16_at(record + Part::tokens_factor + 2 * (token * R + r))
                          : bf16_at(record + Part::channels_factor + 2 * (r * D + channel));
        else
          other = (record[Part::tokens_factor + token / 2 * R + r] >> (token % 2 * 4) & 15) - (float)Format::factor_zero;
        y += factor[r] * other;
      }
#pragma unroll
      for (int o = 0; o < O; o++)
        if (record[Part::outlier_index + o * V + v] == i) y += bf16_at(record + Part::outlier_value + 2 * (o * V + v));
      uint16_t stored = to_bf16(y);
      if (token < num_sinks) stored = ((const uint16_t*)(record + Part::sinks))[token * D + channel];
      out[(int64_t)token * D + channel] = stored;
    }
  }
}

// Grid (pages * blocks of 64 tokens, 2 * heads).
extern "C" __global__ void __launch_bounds__(kThreads) dequantize(const __grid_constant__ Args args) {
  const int page = blockIdx.x / (S / 64), token_block = blockIdx.x % (S / 64), head = blockIdx.y / 2;
  if (args.slots[page] < 0) return;
  const uint8_t* record = args.pool + args.slots[page] * args.slot_bytes + args.records_start + (int64_t)head * Page::record_bytes;
  const int num_sinks = args.is_first[page] ? Page::sink_tokens : 0;
  const int64_t at = head * args.head_stride + (int64_t)args.rows[page] * D;
  if (blockIdx.y % 2 == 0) dequantize_part<Keys, true>(args, record, token_block, num_sinks, args.keys + at);
  else dequantize_part<Values, false>(args, record, token_block, num_sinks, args.values + at);
}
