// Decode attention straight from GEAR pages: one query token a sequence, codes read into the tensor core.
//
// A CTA takes one (sequence, KV head, split of the context) and up to 8 query heads; a warp takes blocks of 64 tokens.
// Records stream through a ring in shared memory. Tokens are the rows of the score product and channels
// the rows of the output product, so codes are always the A operand and 8 queries the columns of B. The scale folds
// into q for keys and into p for values; p never leaves registers. The last CTA of a (sequence, head) to finish merges the
// splits, in their order, so the same input gives the same bits.
#include "record.cuh"

constexpr int kWarps = 2;
constexpr int kThreads = 32 * kWarps;
constexpr int kQueries = 8;           // columns of a product
constexpr int kRows = 64;             // tokens of a block
constexpr int kBlocks = S / kRows;    // of a page
// Where a page is one block, warps take turns at pages: on Hopper each stage of the ring has a page, and whoever has read
// it asks for the next; before, where all threads copy together, a stage has a page for every warp.
constexpr bool kWarpsAlternate = kBlocks < kWarps;
#if __CUDA_ARCH__ >= 900
constexpr int kStages = kWarpsAlternate ? 3 : 2;
#else
constexpr int kStages = 2, kPages = kWarpsAlternate ? kWarps / kBlocks : 1;  // pages of a stage
#endif
constexpr int kWords = kColumns / 16;  // of a lane, in a key block's row; a value block has kColumns rows
constexpr int kParts = D / kColumns;
constexpr int kTiles = kColumns / 16;  // of a value block: 16 channels each
constexpr int kMaxSplits = 64;
// q times its scale must stay inside fp16. Counted scales are subnormals worth 2^-24, so q is lifted there.
constexpr float kQueryWorth = Keys::scale_bits == 8 ? 0x1p-6f : 8.f;   // of the q in a fragment
constexpr float kScaledWorth = Keys::scale_bits == 8 ? 0x1p18f : 8.f;  // of its product with a scale
constexpr float kWeightLog2 = 4.f;     // p is lifted by 2^4, away from fp16's subnormals
constexpr float kLowest = -1e30f;      // the peak of no tokens at all
constexpr float kSlack = 4.f;          // p may pass 1 by 2^4 before everything is rescaled
constexpr float kValueWorth = 16.f;    // p * scale is lifted by it where scales are counted in a unit
constexpr float kUnitWorth = Values::scale_bits == 8 ? kValueWorth : 1.f;

using KeyStrip = Strip<Keys::bits, false>;
constexpr bool kEvenValues = Values::rank > 0 || Values::outliers > 0;  // exact parts join the sum of the codes
using ValueStrip = Strip<Values::bits, kEvenValues>;

struct Args {
  const uint8_t* pool;
  int64_t slot_bytes;
  int64_t records_start;  // of this layer in a sealed page
  int64_t runs_start;     // of this layer in a run of open tokens
  const int* page_table;  // [N, max_pages]
  const int* open_slots;  // [N, max_runs]
  const int* lengths;     // [N] tokens, the query's own included
  const uint16_t* q;      // [N, H * group, D] bf16
  void* out;              // the same shape, bf16 or float
  float* partial;         // [N * H * group, num_splits, D] outputs, then [N * H * group, num_splits] log2 of the weights' sums
  int* arrived;           // [N * H * query tiles], zero before and after
  int max_pages, max_runs, num_heads, group, num_splits, pages_per_split, window;
  float scaling, softcap;
};

// What a warp has summed so far. Column c & 1 of a fragment is query 2 j + (c & 1).
struct Sums {
  float out[kParts * kTiles][4];  // rows: channels 16 i + 2 g and 16 i + 2 g + 1 of a value block
  float offset[4];                // what the codes' zero takes off every channel, in all rows alike
  float peak[2];                  // a score of about the largest, times log2(e); nothing until total is above 0
  float total[4];                 // of weights, in all rows alike

  // What scores are given less of, so that 2^score is a weight.
  DEVICE float base(int c) const { return peak[c] - kWeightLog2; }

  DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < kParts * kTiles; m++) out[m][0] = out[m][1] = out[m][2] = out[m][3] = 0.f;
    offset[0] = offset[1] = offset[2] = offset[3] = 0.f;
    peak[0] = peak[1] = 0.f;
    total[0] = total[1] = total[2] = total[3] = 0.f;
  }
};

// Queries as B fragments: column g is query g, and lane j has the channels of its words. First as they come, bf16 pairs of
// neighbouring channels (0, 1) and (2, 3) of a word's four.
using ExactQueries = uint32_t[kParts][kWords][2];

DEVICE void load_queries(const uint16_t* q, int num_queries, int g, int j, ExactQueries& out) {
#pragma unroll
  for (int b = 0; b < kParts; b++)
#pragma unroll
    for (int w = 0; w < kWords; w++) {
      uint2 x = make_uint2(0, 0);
      if (g < num_queries) x = *(const uint2*)(q + g * D + b * kColumns + 4 * kWords * j + 4 * w);
      out[b][w][0] = x.x, out[b][w][1] = x.y;
    }
}

struct Queries {
  uint32_t f16[kParts][kWords][2];  // / kQueryWorth: channels (0, 2) and (1, 3) of a word's four
  uint32_t bf16[kParts][kWords][2];
  float sum[2];  // over all channels, of queries 2 j and 2 j + 1

  DEVICE Queries(const ExactQueries& exact, int j) {
    float mine = 0.f;
#pragma unroll
    for (int b = 0; b < kParts; b++)
#pragma unroll
      for (int w = 0; w < kWords; w++) {
        const uint32_t x = exact[b][w][0], y = exact[b][w][1];
        const Quad quad = quad_of_bf16(make_uint2(x, y), 1.f / kQueryWorth);
        f16[b][w][0] = quad.even, f16[b][w][1] = quad.odd;
        if constexpr (Keys::outliers > 0) bf16[b][w][0] = permute(x, y, 0x5410), bf16[b][w][1] = permute(x, y, 0x7632);
        mine += low_bf16(x) + high_bf16(x) + low_bf16(y) + high_bf16(y);
      }
    mine += __shfl_xor_sync(~0u, mine, 1);
    mine += __shfl_xor_sync(~0u, mine, 2);
    sum[0] = __shfl_sync(~0u, mine, 8 * j);  // lane 4 (2 j)
    sum[1] = __shfl_sync(~0u, mine, 8 * j + 4);
  }
};

// The part of q . B that a lane's word of channels adds, for the low-rank factors of the keys. b: channel block, w: word.
DEVICE void add_coefficients(const uint8_t* record, const Queries& q, int b, int w, int g, int j, float (&x)[4],
                             bool first) {
  if constexpr (Keys::factor_bits == 4) {  // rows are ranks 2 g and 2 g + 1
    constexpr int kPairs = Keys::rank / 2;
    uint32_t word = 0;
    if (g < kPairs)
      word = *(const uint32_t*)(record + Keys::channels_factor + (b * kPairs + g) * kColumns + 4 * kWords * j + 4 * w);
    const uint32_t y = word >> 8;
    mma_f16(x, word & 0x000f000fu, word & 0x00f000f0u, y & 0x000f000fu, y & 0x00f000f0u, q.f16[b][w][0], q.f16[b][w][1],
            first);
  } else {  // row g is rank g
    uint2 words = make_uint2(0, 0);
    if (g < Keys::rank)
      words = *(const uint2*)(record + Keys::channels_factor + 2 * (g * D + b * kColumns + 4 * kWords * j + 4 * w));
    const Quad a = quad_of_bf16(words, 1.f);
    mma_f16(x, a.even, 0, a.odd, 0, q.f16[b][w][0], q.f16[b][w][1], first);
  }
}

constexpr uint32_t kFactorZeroF16 = 0xc700c700u;  // -7 twice: less the code that means 0
static_assert(Format::factor_zero == 7);

// Coefficients q . B as the B operand of their product with A: ranks are its rows.
struct Coefficients {
  uint32_t low, high;
};

DEVICE Coefficients finish_coefficients(const uint8_t* record, const Queries& q, int g, float (&x)[4]) {
  if constexpr (Keys::factor_bits == 4) {
    uint32_t scales = 0;  // of ranks 2 g and 2 g + 1
    if (2 * g < Keys::rank) scales = *(const uint32_t*)(record + Keys::factor_scale + 4 * g);
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const float worth = c < 2 ? 16777216.f : 1048576.f;
      x[c] = (x[c] * (worth * kQueryWorth) - Format::factor_zero * q.sum[c & 1]) * (c < 2 ? low_bf16(scales) : high_bf16(scales));
    }
    return {transpose(pack_f16(x[0], x[1])), transpose(pack_f16(x[2], x[3]))};  // ranks (4 j, 4 j + 2), (+ 1, + 3)
  } else {
    return {transpose(pack_f16(x[0] * kQueryWorth, x[1] * kQueryWorth)), 0};  // ranks (2 j, 2 j + 1)
  }
}

// exact [4][4] = A (q . B) of the block's four tiles, in units of its codes: those of 4-bit codes, 2^-24 and 2^-20.
DEVICE void low_rank_scores(const uint8_t* record, int block, Coefficients x, int g, int j, float (&exact)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int pair = (block * 4 + i) * 8 + g;  // of tokens
    if constexpr (Keys::factor_bits == 4) {
      uint32_t word = 0;
      if (4 * j < Keys::rank) word = *(const uint32_t*)(record + Keys::tokens_factor + pair * Keys::rank + 4 * j);
      const uint32_t y = word >> 8;
      mma_f16(exact[i], word & 0x000f000fu, word & 0x00f000f0u, y & 0x000f000fu, y & 0x00f000f0u, x.low, x.high, true);
    } else {
      uint32_t low = 0, high = 0;
      if (2 * j < Keys::rank) {
        const uint8_t* at = record + Keys::tokens_factor + 2 * (2 * pair * Keys::rank + 2 * j);
        low = *(const uint32_t*)at;
        high = *(const uint32_t*)(at + 2 * Keys::rank);
      }
      mma_f16(exact[i], pack_f16(low_bf16(low), high_bf16(low)), pack_f16(low_bf16(high), high_bf16(high)), 0, 0, x.low, 0,
              true);
    }
  }
}

// outliers [4][4] = those of each channel, added to the tokens they belong to by a product with a one-hot matrix, whose
// fp16 ones read as 2^-7 in bf16.
DEVICE void outlier_scores(const uint8_t* record, int block, const Queries& q, int g, int j, float (&outliers)[4][4]) {
#pragma unroll
  for (int o = 0; o < Keys::outliers; o++)
#pragma unroll
    for (int b = 0; b < kParts; b++) {
      const int channel = o * D + b * kColumns + 4 * kWords * j;
      uint32_t index[kWords];
      load_words<kWords>(record + Keys::outlier_index + channel, index);
#pragma unroll
      for (int w = 0; w < kWords; w++) {
        const uint2 value = *(const uint2*)(record + Keys::outlier_value + 2 * (channel + 4 * w));
        const uint32_t b0 = mul_bf16(q.bf16[b][w][0], permute(value.x, value.y, 0x5410));
        const uint32_t b1 = mul_bf16(q.bf16[b][w][1], permute(value.x, value.y, 0x7632));
        const uint32_t even = permute(index[w], 0x64646464u, 0x4240), odd = permute(index[w], 0x64646464u, 0x4341);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const uint32_t low = (0x6400u + block * kRows + 16 * i + 2 * g) * 0x10001u, high = low + 0x10001u;
          mma_bf16(outliers[i], equal_f16(even, low), equal_f16(even, high), equal_f16(odd, low), equal_f16(odd, high), b0,
                   b1);
        }
      }
    }
}

// scores [4][4] of a block, times `scaling` and less `base` of each query: tile i has tokens 16 i + 2 g (c 0, 1) and
// 16 i + 2 g + 1 (c 2, 3), columns are queries.
DEVICE void key_scores(const uint8_t* record, int block, const Queries& q, float scaling, const float (&base)[2], int g,
                       int j, float (&scores)[4][4]) {
  constexpr int kGroups = Keys::group_size >= kRows ? 1 : kRows / Keys::group_size;  // in a block
  constexpr int kTilesOfGroup = 4 / kGroups;
  const int first_group = Keys::num_groups == 1 ? 0 : block * kRows / Keys::group_size;

  float codes[4][4], zeros[kGroups][4], coefficients[2][4];
#pragma unroll
  for (int b = 0; b < kParts; b++) {
    KeyStrip strips[kWords];
    load_strips<Keys::bits, false, kRows, kWords>(record + Keys::codes, block * kParts + b, S * D / 8, g, j, strips);
    if constexpr (Keys::rank > 0) {
#pragma unroll
      for (int w = 0; w < kWords; w++) add_coefficients(record, q, b, w, g, j, coefficients[w & 1], b == 0 && w < 2);
    }
#pragma unroll
    for (int group = 0; group < kGroups; group++) {
      const int row = (first_group + group) * D + b * kColumns + 4 * kWords * j;  // of scales and zeros
#pragma unroll
      for (int w = 0; w < kWords; w++) {
        const bool first = b == 0 && w == 0;
        const Quad scale = load_scales<Keys::scale_bits>(record + Keys::scale + row * (Keys::scale_bits / 8), w);
        const uint32_t b0 = mul_f16(q.f16[b][w][0], scale.even), b1 = mul_f16(q.f16[b][w][1], scale.odd);
        if constexpr (Keys::symmetric) {
          mma_f16(zeros[group], kOnesF16, 0, kOnesF16, 0, b0, b1, first);
        } else if constexpr (Keys::scale_bits == 16 && Keys::outliers > 0) {  // q is there in bf16 too
          const uint2 zero = *(const uint2*)(record + Keys::zero + 2 * (row + 4 * w));
          mma_bf16(zeros[group], permute(zero.x, zero.y, 0x5410), 0, permute(zero.x, zero.y, 0x7632), 0, q.bf16[b][w][0],
                   q.bf16[b][w][1], first);
        } else {
          const Quad zero = load_zeros<Keys::scale_bits>(record + Keys::zero + row * (Keys::scale_bits / 8), w);
          mma_f16(zeros[group], zero.even, 0, zero.odd, 0, q.f16[b][w][0], q.f16[b][w][1], first);
        }
#pragma unroll
        for (int i = group * kTilesOfGroup; i < (group + 1) * kTilesOfGroup; i++) {
          uint32_t a[4];
          strips[w].unpack(i, a);
          mma_f16(codes[i], a[0], a[1], a[2], a[3], b0, b1, first);
        }
      }
    }
  }

  float scale_unit = kScaledWorth * scaling, zero_unit = kQueryWorth * scaling;
  if constexpr (Keys::scale_bits == 8) {
    scale_unit *= bf16_at(record + Keys::unit);
    zero_unit *= bf16_at(record + Keys::unit + 2);
  }
  if constexpr (Keys::symmetric) zero_unit = -0.5f * ((1 << Keys::bits) - 1) * scale_unit;
  else if constexpr (Keys::scale_bits == 16 && Keys::outliers > 0) zero_unit = scaling;
  float same[2] = {-base[0], -base[1]};  // for all tokens
  float exact[4][4];
  if constexpr (Keys::rank > 0) {
#pragma unroll
    for (int c = 0; c < 4; c++) coefficients[0][c] += coefficients[1][c];
    const Coefficients x = finish_coefficients(record, q, g, coefficients[0]);
    low_rank_scores(record, block, x, g, j, exact);
    if constexpr (Keys::factor_bits == 4) {
      float zero[4];
      mma_f16(zero, kFactorZeroF16, kFactorZeroF16, kFactorZeroF16, kFactorZeroF16, x.low, x.high, true);
      same[0] += zero[0] * scaling, same[1] += zero[1] * scaling;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const float worth = c < 2 ? KeyStrip::low_worth(i) : KeyStrip::high_worth(i);
      // A zero's row is the same in all g, and so is its sum in c 0 and 1.
      const float bias = zeros[i / kTilesOfGroup][c & 1] * zero_unit + same[c & 1];
      scores[i][c] = codes[i][c] * (worth * scale_unit) + bias;
      if constexpr (Keys::rank > 0) {
        const float factor_worth = Keys::factor_bits == 16 ? 1.f : c < 2 ? 16777216.f : 1048576.f;
        scores[i][c] += exact[i][c] * (factor_worth * scaling);
      }
    }
  if constexpr (Keys::outliers > 0) {
    float outliers[4][4] = {};
    outlier_scores(record, block, q, g, j, outliers);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int c = 0; c < 4; c++) scores[i][c] += outliers[i][c] * (scaling * 128.f);
  }
}

// scores [tiles][4] → weights 2^score. They come less sums.base(): the peak is the largest score of the first block, and
// stays until another passes it by more than kSlack. Then what was summed shrinks.
template <int TILES>
DEVICE void softmax_step(float (&scores)[TILES][4], Sums& sums) {
  float rise[2] = {kMinusInfinity, kMinusInfinity};
#pragma unroll
  for (int i = 0; i < TILES; i++)
#pragma unroll
    for (int c = 0; c < 4; c++) rise[c & 1] = fmaxf(rise[c & 1], scores[i][c]);
  const bool started = sums.total[0] > 0.f && sums.total[1] > 0.f;
  if (__any_sync(~0u, fmaxf(rise[0], rise[1]) > kSlack + kWeightLog2 || !started)) {
    float shrink[2];
#pragma unroll
    for (int c = 0; c < 2; c++) {
#pragma unroll
      for (int lane = 4; lane < 32; lane *= 2) rise[c] = fmaxf(rise[c], __shfl_xor_sync(~0u, rise[c], lane));
      rise[c] -= kWeightLog2;  // of the peak
      if (sums.total[c] > 0.f) rise[c] = fmaxf(rise[c], 0.f);
      else if (rise[c] == kMinusInfinity) rise[c] = 0.f;  // every token is masked
      shrink[c] = sums.total[c] > 0.f ? exp2_fast(-rise[c]) : 1.f;
      sums.peak[c] += rise[c];
    }
#pragma unroll
    for (int m = 0; m < kParts * kTiles; m++)
#pragma unroll
      for (int c = 0; c < 4; c++) sums.out[m][c] *= shrink[c & 1];
#pragma unroll
    for (int c = 0; c < 2; c++) sums.offset[c] *= shrink[c], sums.total[c] *= shrink[c];
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
      for (int c = 0; c < 4; c++) scores[i][c] -= rise[c & 1];
  }
#pragma unroll
  for (int i = 0; i < TILES; i++)
#pragma unroll
    for (int c = 0; c < 4; c++) scores[i][c] = exp2_fast(scores[i][c]);
}

constexpr float kLog2e = 1.4426950408889634f;

// With a soft-cap, scores are capped before they become exponents; without, they come as exponents less sums.base().
DEVICE float score_scaling(const Args& args) { return Options::softcap ? args.scaling : args.scaling * kLog2e; }

// Tokens outside [first, last) get no weight. token: of the block's first row.
template <int TILES>
DEVICE void mask_scores(float (&scores)[TILES][4], int token, int first, int last, int g) {
#pragma unroll
  for (int i = 0; i < TILES; i++)
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const int at = token + 16 * i + 2 * g + c / 2;
      if (at < first || at >= last) scores[i][c] = kMinusInfinity;
    }
}

template <int TILES>
DEVICE void cap_scores(float (&scores)[TILES][4], const Args& args, const float (&base)[2]) {
#pragma unroll
  for (int i = 0; i < TILES; i++)
#pragma unroll
    for (int c = 0; c < 4; c++)
      scores[i][c] = args.softcap * kLog2e * tanh_fast(scores[i][c] / args.softcap) - base[c & 1];
}

DEVICE void load_value_strips(const uint8_t* record, int block, int b, int g, int j, ValueStrip (&strips)[4]) {
  load_strips<Values::bits, kEvenValues, kColumns, 4>(record + Values::codes, block * kParts + b, S * D / 8, g, j, strips);
}

// sums.out += p V of a block; p [4][4] as softmax_step leaves it. strips: of the first channels.
DEVICE void add_values(const uint8_t* record, int block, const float (&p)[4][4], ValueStrip (&strips)[4], Sums& sums, int g,
                       int j) {
  uint32_t weights[4][2], scaled[4][2];  // B fragments: rows are tokens 16 i + 4 j + (0, 2) and (1, 3)
  constexpr uint32_t kTwoTo12F16 = 0x6c006c00u;
  uint32_t unit = 0;
  float zero_unit = 1.f;
  if constexpr (Values::scale_bits == 8) {
    const float x = bf16_at(record + Values::unit) * (kValueWorth * 0x1p12f);
    unit = pack_f16(x, x);
    zero_unit = bf16_at(record + Values::unit + 2);
  }
  float zeros[4] = {}, factors[4] = {};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    weights[i][0] = transpose(pack_f16(p[i][0], p[i][1]));
    weights[i][1] = transpose(pack_f16(p[i][2], p[i][3]));
    const int token = block * kRows + 16 * i + 4 * j;
    Quad scale = load_scales<Values::scale_bits>(record + Values::scale, token / 4);
    if constexpr (Values::scale_bits == 8) {  // lifted in two steps, neither of which leaves fp16
      scale = {mul_f16(scale.even, kTwoTo12F16), mul_f16(scale.odd, kTwoTo12F16)};
      scale = {mul_f16(scale.even, unit), mul_f16(scale.odd, unit)};
    }
    scaled[i][0] = mul_f16(weights[i][0], scale.even);
    scaled[i][1] = mul_f16(weights[i][1], scale.odd);
    mma_f16(sums.total, kOnesF16, kOnesF16, kOnesF16, kOnesF16, weights[i][0], weights[i][1]);
    if constexpr (Values::symmetric) {
      mma_f16(sums.offset, kOnesF16, kOnesF16, kOnesF16, kOnesF16, scaled[i][0], scaled[i][1]);
    } else {
      const Quad zero = load_zeros<Values::scale_bits>(record + Values::zero, token / 4);
      mma_f16(zeros, zero.even, 0, zero.odd, 0, weights[i][0], weights[i][1]);
    }
    if constexpr (Values::rank > 0) {
      uint2 words = make_uint2(0, 0);
      if (g < Values::rank) words = *(const uint2*)(record + Values::tokens_factor + 2 * (g * S + token));
      const Quad a = quad_of_bf16(words, 1.f);
      mma_f16(factors, a.even, 0, a.odd, 0, weights[i][0], weights[i][1]);
    }
  }
  if constexpr (!Values::symmetric) sums.offset[0] += zeros[0] * zero_unit, sums.offset[1] += zeros[1] * zero_unit;

#pragma unroll
  for (int b = 0; b < kParts; b++) {
    ValueStrip next[4];
    if (b + 1 < kParts) load_value_strips(record, block, b + 1, g, j, next);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int t = 0; t < kTiles; t++) {
        uint32_t a[4];
        strips[i].unpack(t, a);
        mma_f16(sums.out[b * kTiles + t], a[0], a[1], a[2], a[3], scaled[i][0], scaled[i][1]);
      }
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (b + 1 < kParts) strips[i] = next[i];
  }

  if constexpr (Values::outliers > 0) {
#pragma unroll
    for (int o = 0; o < Values::outliers; o++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int token = block * kRows + 16 * i + 4 * j;
        const uint2 words = *(const uint2*)(record + Values::outlier_value + 2 * (o * S + token));
        // A one-hot 1.0 in fp16 reads as 2^-7 in bf16; with 2^-17 this joins codes worth 2^-24.
        const float lift = kUnitWorth * 0x1p-17f;
        const uint32_t b0 = mul_bf16(transpose(pack_bf16(p[i][0] * lift, p[i][1] * lift)), permute(words.x, words.y, 0x5410));
        const uint32_t b1 = mul_bf16(transpose(pack_bf16(p[i][2] * lift, p[i][3] * lift)), permute(words.x, words.y, 0x7632));
        const uint32_t index = *(const uint32_t*)(record + Values::outlier_index + o * S + token);
        const uint32_t mine = (0x6400u + 2 * g) * 0x10001u;  // less this, an index is the tile's first channel or its second
        const uint32_t i0 = sub_f16(permute(index, 0x64646464u, 0x4240), mine);
        const uint32_t i1 = sub_f16(permute(index, 0x64646464u, 0x4341), mine);
#pragma unroll
        for (int m = 0; m < kParts * kTiles; m++) {
          const uint32_t low = pack_f16(16.f * m, 16.f * m), high = pack_f16(16.f * m + 1.f, 16.f * m + 1.f);
          mma_bf16(sums.out[m], equal_f16(i0, low), equal_f16(i0, high), equal_f16(i1, low), equal_f16(i1, high), b0, b1);
        }
      }
  }
  if constexpr (Values::rank > 0) {
    const float lift = kUnitWorth * 0x1p-24f;
    const uint32_t x = transpose(g < Values::rank ? pack_bf16(factors[0] * lift, factors[1] * lift) : 0u);  // ranks 2 j, + 1
#pragma unroll
    for (int m = 0; m < kParts * kTiles; m++) {
      uint32_t first = 0, second = 0;  // channels 16 m + 2 g and + 1, of ranks 2 j and 2 j + 1
      if (2 * j < Values::rank) {
        const uint8_t* at = record + Values::channels_factor + 2 * (2 * j * D + 16 * m + 2 * g);
        first = *(const uint32_t*)at;
        second = *(const uint32_t*)(at + 2 * D);
      }
      mma_bf16(sums.out[m], permute(first, second, 0x5410), permute(first, second, 0x7632), 0, 0, x, 0);
    }
  }
}

// The tokens of a block from `first` on.
DEVICE void attend_block(const Args& args, const uint8_t* record, int block, int token, int first, const Queries& q,
                         Sums& sums, int g, int j) {
  float scores[4][4];
  const float base[2] = {sums.base(0), sums.base(1)}, none[2] = {0.f, 0.f};
  key_scores(record, block, q, score_scaling(args), Options::softcap ? none : base, g, j, scores);
  if constexpr (Options::softcap) cap_scores<4>(scores, args, base);
  if constexpr (Options::window) mask_scores<4>(scores, token, first, token + kRows, g);
  else mask_scores<1>(*(float(*)[1][4])&scores, token, first, token + kRows, g);  // only sinks, of the first tile
  ValueStrip strips[4];  // on their way while the weights are computed
  load_value_strips(record, block, 0, g, j, strips);
  softmax_step<4>(scores, sums);
  add_values(record, block, scores, strips, sums, g, j);
}

// What an entry of the output's sums is worth in units of the codes that join it, a power of two.
DEVICE float code_worth(int m, int c) {
  return (c < 2 ? ValueStrip::low_worth(m % kTiles) : ValueStrip::high_worth(m % kTiles)) / kUnitWorth;
}
// From sums of values to sums of codes that others may join.
DEVICE void open_to_codes(Sums& sums) {
#pragma unroll
  for (int m = 0; m < kParts * kTiles; m++)
#pragma unroll
    for (int c = 0; c < 4; c++) sums.out[m][c] *= 1.f / code_worth(m, c);
}
// And back, with what the codes' zero adds, all rows alike.
DEVICE void settle_codes(Sums& sums) {
  constexpr float kHalf = 0.5f * ((1 << Values::bits) - 1);
#pragma unroll
  for (int m = 0; m < kParts * kTiles; m++)
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const float zero = Values::symmetric ? -kHalf / kUnitWorth * sums.offset[c & 1] : sums.offset[c & 1];
      sums.out[m][c] = sums.out[m][c] * code_worth(m, c) + zero;
    }
}

// Sixteen exact tokens, bf16 rows of D channels: this lane's keys are those of tokens 2 g and 2 g + 1 from `key` on, its
// values those of tokens 4 j … 4 j + 3 from `value` on. Tokens outside [first, last) count for nothing.
DEVICE void add_exact(const uint8_t* key, const uint8_t* value, const ExactQueries& q, const Args& args,
                      int token, int first, int last, Sums& sums, int g, int j) {
  float scores[1][4] = {};
  const bool key_inside = token + 2 * g < last;
#pragma unroll
  for (int b = 0; b < kParts; b++) {
    uint2 low[kWords], high[kWords];
    const uint8_t* at = key + 2 * (b * kColumns + 4 * kWords * j);
#pragma unroll
    for (int w = 0; w < kWords; w++) {
      low[w] = key_inside ? *(const uint2*)(at + 8 * w) : make_uint2(0, 0);
      high[w] = key_inside ? *(const uint2*)(at + 2 * D + 8 * w) : make_uint2(0, 0);
    }
#pragma unroll
    for (int w = 0; w < kWords; w++) mma_bf16(scores[0], low[w].x, high[w].x, low[w].y, high[w].y, q[b][w][0], q[b][w][1]);
  }
  const float scaling = score_scaling(args), base[2] = {sums.base(0), sums.base(1)};
#pragma unroll
  for (int c = 0; c < 4; c++) scores[0][c] = scores[0][c] * scaling - (Options::softcap ? 0.f : base[c & 1]);
  if constexpr (Options::softcap) cap_scores<1>(scores, args, base);
  mask_scores<1>(scores, token, first, last, g);
  softmax_step<1>(scores, sums);
  const uint32_t b0 = transpose(pack_bf16(scores[0][0], scores[0][1])), b1 = transpose(pack_bf16(scores[0][2], scores[0][3]));
  mma_bf16(sums.total, kOnesBf16, kOnesBf16, kOnesBf16, kOnesBf16, b0, b1);
#pragma unroll
  for (int m = 0; m < kParts * kTiles; m++) {
    uint32_t x[4];
#pragma unroll
    for (int t = 0; t < 4; t++)
      x[t] = token + 4 * j + t < last ? *(const uint32_t*)(value + 2 * (t * D + 16 * m + 2 * g)) : 0u;
    mma_bf16(sums.out[m], permute(x[0], x[2], 0x5410), permute(x[0], x[2], 0x7632), permute(x[1], x[3], 0x5410),
             permute(x[1], x[3], 0x7632), b0, b1);
  }
}

// Exact tokens [from, to) of a sequence, counted from its first; `slots` are the runs that hold them from token `base` on.
DEVICE void add_runs(const Args& args, const int* slots, int head, int base, int from, int to, int first,
                     const ExactQueries& q, Sums& sums, int warp, int g, int j) {
  const auto row = [&](int token, int part) {
    const int at = min(token, to - 1) - base;
    const int64_t slot = slots[at / Page::run_tokens];
    return args.pool + slot * args.slot_bytes + args.runs_start + (2 * head + part) * kRunBytes +
           2 * (int64_t)(at % Page::run_tokens) * D;
  };
  for (int token = base + (from - base) / 16 * 16 + 16 * warp; token < to; token += 16 * kWarps)
    add_exact(row((token + 2 * g), 0), row(token + 4 * j, 1), q, args, token, max(first, from), to, sums, g, j);
}

constexpr int kMergeRow = D + 4;  // of a query in shared memory: its output, then peak and total

DEVICE float warp_max(float x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}
DEVICE float warp_sum(float x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

DEVICE void share_sums(const Sums& sums, float* shared, int num_queries, int warp, int g, int j) {
#pragma unroll
  for (int c = 0; c < 4; c++) {
    if (2 * j + (c & 1) >= num_queries) continue;
    float* row = shared + (warp * kQueries + 2 * j + (c & 1)) * kMergeRow;
#pragma unroll
    for (int m = 0; m < kParts * kTiles; m++) row[16 * m + 2 * g + c / 2] = sums.out[m][c];
    if (g == 0 && c < 2) row[D] = sums.total[c] == 0.f ? kLowest : sums.peak[c], row[D + 1] = sums.total[c];
  }
}

// One query's output from all warps' sums, normalised, and log2 of its weight.
DEVICE float merge_warps(const float* shared, int query, int lane, float (&out)[kPer]) {
  float peak = kLowest, total = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; w++) peak = fmaxf(peak, shared[(w * kQueries + query) * kMergeRow + D]);
#pragma unroll
  for (int i = 0; i < kPer; i++) out[i] = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; w++) {
    const float* row = shared + (w * kQueries + query) * kMergeRow;
    const float weight = exp2_fast(row[D] - peak);
    total += weight * row[D + 1];
#pragma unroll
    for (int i = 0; i < kPer; i++) out[i] += weight * row[lane + 32 * i];
  }
  if (total == 0.f) return kLowest;  // no token here; a total that is not a number goes on
#pragma unroll
  for (int i = 0; i < kPer; i++) out[i] = out[i] / total;
  return peak + log2f(total);
}

// One query's output from all splits, in their order, and as many loads under way at once as registers allow.
DEVICE void merge_splits(const float* rows, const float* weights, int num_splits, int lane, float (&out)[kPer]) {
  constexpr int kAtOnce = 16, kPerLane = kMaxSplits / 32;
  float mine[kPerLane], peak = kLowest, total = 0.f;  // of splits lane, lane + 32, …
#pragma unroll
  for (int k = 0; k < kPerLane; k++) {
    mine[k] = lane + 32 * k < num_splits ? __ldcg(weights + lane + 32 * k) : kMinusInfinity;
    peak = fmaxf(peak, mine[k]);
  }
  peak = warp_max(peak);
#pragma unroll
  for (int k = 0; k < kPerLane; k++) total += mine[k] = exp2_fast(mine[k] - peak);
  total = warp_sum(total);
#pragma unroll
  for (int i = 0; i < kPer; i++) out[i] = 0.f;
#pragma unroll
  for (int k = 0; k < kPerLane; k++)
#pragma unroll 1
    for (int first = 32 * k; first < min(num_splits, 32 * k + 32); first += kAtOnce) {
      float part[kAtOnce][kPer];
#pragma unroll
      for (int n = 0; n < kAtOnce; n++)
#pragma unroll
        for (int i = 0; i < kPer; i++) part[n][i] = __ldcg(rows + min(first + n, num_splits - 1) * D + lane + 32 * i);
#pragma unroll
      for (int n = 0; n < kAtOnce; n++) {
        const float weight = __shfl_sync(~0u, mine[k], first + n - 32 * k);  // 0 of those that are not there
#pragma unroll
        for (int i = 0; i < kPer; i++) out[i] += weight * part[n][i];
      }
    }
#pragma unroll
  for (int i = 0; i < kPer; i++) out[i] = out[i] / total;
}

// True in the CTA that is the last of a tile's splits to come here, with what the others wrote.
DEVICE bool is_last(int* arrived, int num_splits, int* flag, int thread) {
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    *flag = atomicAdd(arrived, 1) == num_splits - 1;
    if (*flag) *arrived = 0;
  }
  __syncthreads();
  if (*flag) __threadfence();
  return *flag;
}

DEVICE void write_out(const Args& args, int64_t row, float (&out)[kPer], int lane) {
  if constexpr (Values::rotate) rotate(out);  // back from the Hadamard basis
#pragma unroll
  for (int i = 0; i < kPer; i++) {
    const int64_t at = row * D + lane + 32 * i;
    if constexpr (Options::float_out) ((float*)args.out)[at] = out[i];
    else ((uint16_t*)args.out)[at] = to_bf16(out[i]);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, Options::min_ctas) decode(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) uint8_t ring[];
#if __CUDA_ARCH__ >= 900
  __shared__ __align__(8) uint64_t barriers[kStages];
  __shared__ int asked[kStages];  // the page that each stage was last asked to hold, where warps take turns at pages
  __shared__ int readers[kStages];  // warps that have read what a stage held, else
#endif
  __shared__ int flag;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, j = lane % 4;
  const int query_tiles = (args.group + kQueries - 1) / kQueries;
  const int head = blockIdx.x / query_tiles, query_tile = blockIdx.x % query_tiles;
  const int split = blockIdx.y, sequence = blockIdx.z;
  const int num_queries = min(kQueries, args.group - query_tile * kQueries);
  const int* pages = args.page_table + (int64_t)sequence * args.max_pages;
#if __CUDA_ARCH__ >= 900
  int first_slots[kStages];  // without a window, they and the length are read at once
#pragma unroll
  for (int i = 0; i < kStages; i++) {
    const int page = split * args.pages_per_split + i;
    first_slots[i] = !Page::raw && !Options::window && page < args.max_pages ? pages[page] : -1;
  }
#endif
  const int length = args.lengths[sequence];
  if (length <= 0) return;  // padding of a captured batch

  const int first_token = Options::window ? max(0, length - args.window) : 0;
  const int num_sealed = (length - 1) / S, first_page = first_token / S;
  const int num_splits = max(1, (num_sealed - first_page + args.pages_per_split - 1) / args.pages_per_split);
  if (split >= num_splits) return;
  const int begin = first_page + split * args.pages_per_split, end = min(num_sealed, begin + args.pages_per_split);
  const int* open_slots = args.open_slots + (int64_t)sequence * args.max_runs;
  const int64_t row = ((int64_t)sequence * args.num_heads + head) * args.group + query_tile * kQueries;
  const uint16_t* q = args.q + row * D;

  const auto record_of = [&](int64_t slot) {
    return args.pool + slot * args.slot_bytes + args.records_start + (int64_t)head * Page::record_bytes;
  };
#if __CUDA_ARCH__ >= 900
  // Ask for the record in a slot to come to a stage.
  const auto ask = [&](int stage, int64_t slot) {
    const uint32_t barrier = shared_address(barriers + stage);
    ring_expect(barrier, Page::record_bytes);
    ring_copy(shared_address(ring + stage * Page::record_bytes), record_of(slot), Page::record_bytes, barrier);
  };
  if (!Page::raw && thread == 0) {
#pragma unroll
    for (int i = 0; i < kStages; i++) ring_init(shared_address(barriers + i)), readers[i] = 0;
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#pragma unroll
    for (int i = 0; i < kStages; i++) {
      if (begin + i < end) ask(i, Options::window ? pages[begin + i] : first_slots[i]);
      asked[i] = begin + i;
    }
  }
#else
  const auto fill = [&](int stage, int first) {  // all threads; a group is committed even where nothing is left
    for (int i = 0; i < min(kPages, end - first); i++)
      ring_copy_part(shared_address(ring + (stage * kPages + i) * Page::record_bytes), record_of(pages[first + i]),
                     Page::record_bytes, thread, kThreads);
    ring_commit();
  };
  if constexpr (!Page::raw)
#pragma unroll
    for (int i = 0; i < kStages; i++) fill(i, begin + i * kPages);
#endif

  // Exact tokens, while the first records are on their way.
  Sums sums;
  sums.clear();
  ExactQueries exact_q;
  load_queries(q, num_queries, g, j, exact_q);
  if constexpr (Page::raw) add_runs(args, pages, head, 0, begin * S, end * S, first_token, exact_q, sums, warp, g, j);
  if (split == num_splits - 1) {
    add_runs(args, open_slots, head, num_sealed * S, num_sealed * S, length, first_token, exact_q, sums, warp, g, j);
    if (Page::sink_tokens > 0 && num_sealed > 0 && first_token < Page::sink_tokens && warp == kWarps - 1) {
      const uint8_t* record = record_of(pages[0]);
      const int key = min(2 * g, Page::sink_tokens - 1), value = min(4 * j, Page::sink_tokens - 1);
      add_exact(record + Keys::sinks + 2 * key * D, record + Values::sinks + 2 * value * D, exact_q, args, 0, first_token,
                Page::sink_tokens, sums, g, j);
    }
  }

  if constexpr (!Page::raw) {
    open_to_codes(sums);
    const Queries queries(exact_q, j);
    const int first_coded = max(first_token, Page::sink_tokens);
    const auto attend = [&](int page, int block, int place) {  // the record lies at a place of the ring
      const int token = page * S + block * kRows;
      attend_block(args, ring + place * Page::record_bytes, block, token, first_coded, queries, sums, g, j);
    };
#if __CUDA_ARCH__ >= 900
    __syncthreads();  // the barriers are there
    const auto next_slot = [&](int page) { return page + kStages < end ? pages[page + kStages] : -1; };
    if constexpr (kWarpsAlternate) {
      for (int page = begin + warp; page < end; page += kWarps) {
        const int stage = (page - begin) % kStages, next = next_slot(page);
        while (*(volatile int*)(asked + stage) != page) {}  // the other warp reads what was there before
        ring_wait(shared_address(barriers + stage), (page - begin) / kStages & 1);
        attend(page, 0, stage);
        __syncwarp();
        if (lane == 0) {
          if (next >= 0) ask(stage, next);
          *(volatile int*)(asked + stage) = page + kStages;
        }
      }
    } else {
      for (int page = begin; page < end; page++) {
        const int stage = (page - begin) % kStages, next = next_slot(page);
        ring_wait(shared_address(barriers + stage), (page - begin) / kStages & 1);
#pragma unroll 1
        for (int block = warp; block < kBlocks; block += kWarps) attend(page, block, stage);
        __syncwarp();
        if (lane == 0) {  // the last warp that has read it asks for the next
          __threadfence_block();
          if (atomicAdd(readers + stage, 1) % kWarps == kWarps - 1 && next >= 0) ask(stage, next);
        }
      }
    }
#else
    for (int step = 0; begin + step * kPages < end; step++) {
      const int stage = step % kStages;
      ring_wait_group<kStages - 1>();
      __syncthreads();
#pragma unroll 1
      for (int unit = warp; unit < kPages * kBlocks; unit += kWarps) {
        const int page = begin + step * kPages + unit / kBlocks;
        if (page < end) attend(page, unit % kBlocks, stage * kPages + unit / kBlocks);
      }
      __syncthreads();
      fill(stage, begin + (step + kStages) * kPages);
    }
#endif
    settle_codes(sums);
  }

  float* shared = (float*)ring;
  __syncthreads();  // the ring is free
  share_sums(sums, shared, num_queries, warp, g, j);
  __syncthreads();
  float* weights = args.partial + (int64_t)gridDim.z * args.num_heads * args.group * args.num_splits * D;
  for (int query = warp; query < num_queries; query += kWarps) {
    float out[kPer];
    const float weight = merge_warps(shared, query, lane, out);
    if (num_splits == 1) {
      write_out(args, row + query, out, lane);
      continue;
    }
    const int64_t at = (row + query) * args.num_splits + split;
#pragma unroll
    for (int i = 0; i < kPer; i++) args.partial[at * D + lane + 32 * i] = out[i];
    if (lane == 0) weights[at] = weight;
  }
  if (num_splits == 1 || !is_last(args.arrived + (int64_t)sequence * gridDim.x + blockIdx.x, num_splits, &flag, thread)) return;
  for (int query = warp; query < num_queries; query += kWarps) {
    float out[kPer];
    const int64_t at = (row + query) * args.num_splits;
    merge_splits(args.partial + at * D, weights + at, num_splits, lane, out);
    write_out(args, row + query, out, lane);
  }
}
