// Sealing: exact tokens of full pages to records, the steps of reference/pages.py in the same order.
//
// A CTA compresses the keys or the values of one (page, layer, head), so a page never depends on its neighbours. Sums
// run in another order than in the definition, so a value on the edge between two codes may take the other one; two runs
// give the same bytes.
#include "pages.cuh"

constexpr int kThreads = 256;
constexpr int kStride = D + 2;  // of a token in shared memory: rows and columns are both read without bank conflicts
constexpr float kTiny = 1e-30f;

struct Args {
  uint8_t* pool;
  int64_t slot_bytes;
  int64_t records_start, records_stride;  // of the first layer, and from one layer to the next
  int64_t runs_start, runs_stride;
  const uint16_t* keys;    // [T, H, D] bf16: rows of the step
  const uint16_t* values;  // the same
  const float* key_start;    // [S, R], orthonormal: where the subspace iteration begins
  const float* value_start;
  PageList pages;
};

DEVICE uint16_t bf16_up(float x) {  // the smallest bf16 that is at least x
  const uint32_t bits = __float_as_uint(x);
  return (bits >> 16) + ((bits & 0xffff) != 0 && !(bits >> 31));
}
DEVICE uint16_t bf16_down(float x) { return bf16_up(-x) ^ 0x8000; }

DEVICE float block_max(float x, float* scratch) {
#pragma unroll
  for (int lane = 1; lane < 32; lane *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lane));
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float y = scratch[0];
#pragma unroll
  for (int w = 1; w < kThreads / 32; w++) y = fmaxf(y, scratch[w]);
  return y;
}

// One part: its matrix in shared memory and what is known of it so far. V vectors of N entries; keys run along tokens.
template <class Part, bool IS_KEYS>
struct Sealing {
  static constexpr int V = Part::num_vectors, N = Part::vector_len, R = Part::rank, G = Part::num_groups;
  static constexpr int kRank = R > 0 ? R : 1;
  static constexpr int O = Part::outliers;
  static constexpr bool kGaussian = Part::symmetric && Part::bits <= 3;  // its step may be the best one for a Gaussian
  static constexpr float kLevels = (1 << Part::bits) - 1;
  static constexpr int kParts = kThreads / V;  // threads that share a vector; what is left over of them does nothing
  static_assert(kParts > 0 && V % 32 == 0 && Part::group_size % kParts == 0);
  // The factors are fitted to the matrix itself, or to one of float32 beside it: what its codes miss, without outliers.
  static constexpr bool kTargetApart = R > 0 && (!Part::low_rank_first || O > 0);
  static constexpr int kTargetStride = D + 1;

  uint16_t* x;     // [S, kStride] bf16
  float* a;        // [S, R]: factors of the tokens, then as they read back
  float* b;        // [D, R]
  float* scale;    // [G, V], first the largest entry
  float* zero;     // [G, V], first the smallest
  float* inverse;  // [G, V] of scale
  float* apart;    // [S, kTargetStride]
  float* partial;  // [4, kThreads / V, G, V]: what threads that share a vector have found
  uint8_t* index;  // [V, O]: outliers
  float* scratch;  // [32]
  uint8_t* record;
  int num_sinks;

  DEVICE Sealing(uint8_t* shared, uint8_t* to, int sinks) : record(to), num_sinks(sinks) {
    a = (float*)shared;  // 16-byte aligned where R is a multiple of 4
    b = a + S * R;
    scale = b + D * R;
    zero = scale + G * V;
    inverse = zero + G * V;
    apart = inverse + G * V;
    partial = apart + (kTargetApart ? S * kTargetStride : 0);
    scratch = partial + 4 * kThreads * G;
    x = (uint16_t*)(scratch + 32);
    index = (uint8_t*)(x + S * kStride);
  }

  DEVICE static int token_of(int v, int i) { return IS_KEYS ? i : v; }
  DEVICE static int channel_of(int v, int i) { return IS_KEYS ? v : i; }
  DEVICE float exact(int token, int channel) const { return low_bf16(x[token * kStride + channel]); }
  DEVICE bool is_outlier(int v, int i) const {
    bool found = false;
#pragma unroll
    for (int o = 0; o < O; o++) found |= index[v * O + o] == i;
    return found;
  }
  DEVICE int code_of(float rest, int v, int i) const {
    const int at = i / Part::group_size * V + v;
    return (int)fminf(fmaxf(rintf((rest - zero[at]) * inverse[at]), 0.f), kLevels);
  }
  DEVICE float dequantized(int code, int v, int i) const {
    const int at = i / Part::group_size * V + v;
    return code * scale[at] + zero[at];
  }
  // A vector's own factors, read once; those of its entries are the other matrix's rows.
  DEVICE void own_factors(int v, float (&own)[kRank]) const {
#pragma unroll
    for (int r = 0; r < R; r++) own[r] = (IS_KEYS ? b : a)[v * R + r];
  }
  DEVICE float product(int i, const float (&own)[kRank]) const {
    float other[kRank], sum = 0.f;
    load_factors((IS_KEYS ? a : b) + i * R, other);
#pragma unroll
    for (int r = 0; r < R; r++) sum += own[r] * other[r];
    return sum;
  }
  DEVICE static void load_factors(const float* row, float (&out)[kRank]) {  // in as wide loads as the rank allows
#pragma unroll
    for (int r = 0; r < R; r += 4) {
      if (R % 4 == 0) {
        const float4 y = *(const float4*)(row + r);
        out[r] = y.x, out[r + 1] = y.y, out[r + 2] = y.z, out[r + 3] = y.w;
      } else {
#pragma unroll
        for (int k = r; k < R && k < r + 4; k++) out[k] = row[k];
      }
    }
  }
  // What the codes are computed from.
  DEVICE float rest(int v, int i, const float (&own)[kRank]) const {
    float y = exact(token_of(v, i), channel_of(v, i));
    if (R > 0 && Part::low_rank_first) y -= product(i, own);
    return y;
  }
  DEVICE float target(int token, int channel) const {
    return kTargetApart ? apart[token * kTargetStride + channel] : exact(token, channel);
  }
  DEVICE float set_target_apart() {  // nothing at sinks and outliers; the largest entry that this thread has seen
    float largest = 0.f;
#pragma unroll 4
    for (int at = threadIdx.x; at < S * D; at += kThreads) {
      const int token = at / D, channel = at % D, v = IS_KEYS ? channel : token, i = IS_KEYS ? token : channel;
      float y = exact(token, channel);
      if (!Part::low_rank_first) y -= dequantized(code_of(y, v, i), v, i);
      if (token < num_sinks || (O > 0 && is_outlier(v, i))) y = 0.f;
      apart[token * kTargetStride + channel] = y;
      largest = fmaxf(largest, fabsf(y));
    }
    return largest;
  }

  DEVICE void select_outliers() {  // o / 2 smallest, then o / 2 largest; of equals the earlier counts as smaller
    for (int v = threadIdx.x; v < V; v += kThreads)
#pragma unroll
      for (int o = 0; o < O; o++) {
        float best = 0.f;
        int at = -1;
        for (int i = IS_KEYS ? num_sinks : 0; i < N; i++) {
          bool taken = false;
#pragma unroll
          for (int p = 0; p < o; p++) taken |= index[v * O + p] == i;
          const float y = exact(token_of(v, i), channel_of(v, i));
          if (!taken && (at < 0 || (o < O / 2 ? y < best : y >= best))) best = y, at = i;
        }
        index[v * O + o] = at;
      }
    __syncthreads();
  }

  // Columns of a [S, R] made orthogonal and of length 1 (0 if nothing is left), by the first warp. Each column in its turn
  // is taken out of all behind it, whose products with it are summed at once. A second pass removes what rounding left of
  // nearly dependent columns.
  DEVICE void orthonormalize(int passes) {
    constexpr int kTokens = (S + 31) / 32;  // of a lane
    if (threadIdx.x < 32) {
      const int lane = threadIdx.x;
      float column[kRank][kTokens];
#pragma unroll
      for (int r = 0; r < R; r++)
#pragma unroll
        for (int k = 0; k < kTokens; k++) column[r][k] = a[(lane + 32 * k) * R + r];
#pragma unroll 1
      for (int pass = 0; pass < passes; pass++) {
        float taken[kRank] = {};  // of each column's squared length
#pragma unroll
        for (int r = 0; r < R; r++) {
          float product[kRank];
#pragma unroll
          for (int e = r; e < R; e++) product[e] = dot(column[r], column[e]);
          const float left = product[r];
          const float unit = left <= 1e-10f * (taken[r] + left) ? 0.f : rsqrtf(fmaxf(left, kTiny));
#pragma unroll
          for (int e = r + 1; e < R; e++) {
            const float times = product[e] * unit * unit;
            taken[e] += product[e] * times;
#pragma unroll
            for (int k = 0; k < kTokens; k++) column[e][k] -= times * column[r][k];
          }
#pragma unroll
          for (int k = 0; k < kTokens; k++) column[r][k] *= unit;
        }
      }
#pragma unroll
      for (int r = 0; r < R; r++)
#pragma unroll
        for (int k = 0; k < kTokens; k++) a[(lane + 32 * k) * R + r] = column[r][k];
    }
    __syncthreads();
  }
  template <int COUNT>
  DEVICE static float dot(const float (&p)[COUNT], const float (&q)[COUNT]) {
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < COUNT; k++) sum += p[k] * q[k];
#pragma unroll
    for (int lane = 1; lane < 32; lane *= 2) sum += __shfl_xor_sync(~0u, sum, lane);
    return sum;
  }

  // Two neighbouring channels of the target.
  DEVICE float2 target_pair(int token, int channel) const {
    if constexpr (kTargetApart) return make_float2(target(token, channel), target(token, channel + 1));
    const uint32_t y = *(const uint32_t*)(x + token * kStride + channel);
    return make_float2(low_bf16(y), high_bf16(y));
  }

  // out = times * target in, a row for each token; or turned, times * targetᵀ in, a row for each channel. A warp takes 16
  // rows; what tf32 does not hold of a factor, or of a target that is no bf16, is a product of its own. The order of rows
  // and of entries is such that lanes read different banks.
  template <bool TURNED>
  DEVICE void multiply(const float* in, float* out, float times) {
    constexpr int kTiles = (TURNED ? D : S) / 16, kLen = TURNED ? S : D, kRankTiles = (kRank + 7) / 8;
    const int g = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
#pragma unroll 1
    for (int tile = threadIdx.x / 32; tile < kTiles; tile += kThreads / 32) {
      float sum[kRankTiles][4] = {}, rest[kRankTiles][4] = {};
      const int row = TURNED ? 16 * tile + 2 * g : tile / 2 * 32 + 4 * g + tile % 2 * 2;  // and the one behind it
#pragma unroll 4
      for (int k = 0; k < kLen; k += 8) {
        const int entry = TURNED ? k / 32 * 32 + 8 * j + k % 32 / 4 : k + 2 * j;  // likewise
        const float2 one = TURNED ? target_pair(entry, row) : target_pair(row, entry);
        const float2 two = TURNED ? target_pair(entry + 1, row) : target_pair(row + 1, entry);
        const float y[4] = {one.x, TURNED ? one.y : two.x, TURNED ? two.x : one.y, two.y};
#pragma unroll
        for (int n = 0; n < kRankTiles; n++) {
          const bool there = R % 8 == 0 || 8 * n + g < R;
          const float factor[2] = {there ? in[entry * R + 8 * n + g] : 0.f, there ? in[(entry + 1) * R + 8 * n + g] : 0.f};
          const float less[2] = {factor[0] - tf32_of(factor[0]), factor[1] - tf32_of(factor[1])};
          mma_tf32(sum[n], y, factor);
          mma_tf32(rest[n], y, less);
          if constexpr (kTargetApart) {
            const float z[4] = {y[0] - tf32_of(y[0]), y[1] - tf32_of(y[1]), y[2] - tf32_of(y[2]), y[3] - tf32_of(y[3])};
            mma_tf32(rest[n], z, factor);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kRankTiles; n++)
#pragma unroll
        for (int c = 0; c < 4; c++)
          if (8 * n + 2 * j + c % 2 < R) out[(row + c / 2) * R + 8 * n + 2 * j + c % 2] = (sum[n][c] + rest[n][c]) * times;
    }
    __syncthreads();
  }

  // a bᵀ ≈ target by subspace iteration from a fixed start; a orthonormal. largest: entry that this thread has seen of x.
  DEVICE void fit(const float* start, float largest) {
    if constexpr (kTargetApart) largest = set_target_apart();
    const float times = 1.f / block_max(fmaxf(largest, kTiny), scratch);
    for (int at = threadIdx.x; at < S * R; at += kThreads) a[at] = start[at];
    __syncthreads();
#pragma unroll 1
    for (int round = 0;; round++) {
      multiply<true>(a, b, round < Options::rounds ? times : 1.f);
      if (round == Options::rounds) break;
      multiply<false>(b, a, times);
      orthonormalize(round == Options::rounds - 1 ? 2 : 1);  // before, a need only stay well-conditioned
    }
  }

  // The scale at which an entry is half a step off at most.
  DEVICE static float fine_enough(float y) {
    return fmaxf(y / (-Format::factor_zero - 0.5f), y / (15.5f - Format::factor_zero));
  }

  DEVICE void store_factors() {
    if constexpr (Part::factor_bits == 16) {
      for (int at = threadIdx.x; at < S * R; at += kThreads) {
        const uint16_t y = to_bf16(a[at]);
        a[at] = low_bf16(y);
        ((uint16_t*)(record + Part::tokens_factor))[IS_KEYS ? at : at % R * S + at / R] = y;
      }
      for (int at = threadIdx.x; at < D * R; at += kThreads) {
        const uint16_t y = to_bf16(b[at]);
        b[at] = low_bf16(y);
        ((uint16_t*)(record + Part::channels_factor))[at % R * D + at / R] = y;
      }
    } else {  // codes 0 … 15 that mean -7 … 8, one scale a column
      constexpr float kZero = Format::factor_zero;
      for (int r = threadIdx.x / 32; r < R; r += kThreads / 32) {
        const int lane = threadIdx.x % 32;
        float a_scale = kTiny, b_scale = kTiny;
        for (int token = lane; token < S; token += 32) a_scale = fmaxf(a_scale, fine_enough(a[token * R + r]));
        for (int channel = lane; channel < D; channel += 32) b_scale = fmaxf(b_scale, fine_enough(b[channel * R + r]));
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
          a_scale = fmaxf(a_scale, __shfl_xor_sync(~0u, a_scale, step));
          b_scale = fmaxf(b_scale, __shfl_xor_sync(~0u, b_scale, step));
        }
        const uint16_t stored = bf16_up(fmaxf(a_scale * b_scale, kTiny));
        if (lane == 0) ((uint16_t*)(record + Part::factor_scale))[r] = stored;
        for (int token = lane; token < S; token += 32) {
          float& y = a[token * R + r];
          y = fminf(fmaxf(rintf(y / a_scale) + kZero, 0.f), 15.f);
        }
        for (int channel = lane; channel < D; channel += 32) {
          float& y = b[channel * R + r];
          y = fminf(fmaxf(rintf(y / b_scale) + kZero, 0.f), 15.f);
        }
        scratch[r] = low_bf16(stored);
      }
      __syncthreads();
      for (int at = threadIdx.x; at < S / 2 * R; at += kThreads) {  // two tokens by rank
        const int pair = at / R, r = at % R;
        record[Part::tokens_factor + at] = (int)a[2 * pair * R + r] | (int)a[(2 * pair + 1) * R + r] << 4;
      }
      for (int at = threadIdx.x; at < R / 2 * D; at += kThreads) {  // two ranks by channel, in blocks of channels
        const int block = at / (R / 2 * kColumns), pair = at / kColumns % (R / 2), channel = block * kColumns + at % kColumns;
        record[Part::channels_factor + at] = (int)b[channel * R + 2 * pair] | (int)b[channel * R + 2 * pair + 1] << 4;
      }
      __syncthreads();
      for (int at = threadIdx.x; at < S * R; at += kThreads) a[at] -= kZero;
      for (int at = threadIdx.x; at < D * R; at += kThreads) b[at] = (b[at] - kZero) * scratch[at % R];
    }
    __syncthreads();
  }

  // The step of symmetric codes: the whole range, or where that is wider the best one for a Gaussian (reference/codes.py).
  DEVICE static float symmetric_step(float most, float mean_square) {
    const float whole_range = most * (2.f / kLevels);
    if (!kGaussian) return whole_range;
    return fminf(whole_range, sqrtf(mean_square) * (Part::bits == 2 ? Format::gaussian_step_2 : Format::gaussian_step_3));
  }

  // Ranges of what is kept, rounded to stored zeros and scales: zeros down, scales up.
  DEVICE void store_scales() {
    constexpr int kShare = Part::group_size / kParts, kCount = kParts * G * V;
    static_assert(Part::group_size % kParts == 0);
    const int v = threadIdx.x % V, part = threadIdx.x / V;
    if (part < kParts) {
      float own[kRank];
      own_factors(v, own);
#pragma unroll 1
      for (int group = 0; group < G; group++) {
        float low = -kMinusInfinity, high = kMinusInfinity, squares = 0.f, count = 0.f;  // the last two for a Gaussian's step
        const int first = group * Part::group_size + part * kShare;
#pragma unroll 4
        for (int i = first; i < first + kShare; i++) {
          if (token_of(v, i) < num_sinks || (O > 0 && is_outlier(v, i))) continue;
          const float y = rest(v, i, own);
          low = fminf(low, y), high = fmaxf(high, y);
          if (kGaussian) squares += y * y, count += 1.f;
        }
        float* to = partial + (part * G + group) * V + v;
        to[0] = low, to[kCount] = high;
        if (kGaussian) to[2 * kCount] = squares, to[3 * kCount] = count;
      }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < G * V; at += kThreads) {
      float low = -kMinusInfinity, high = kMinusInfinity, squares = 0.f, count = 0.f;
#pragma unroll
      for (int part = 0; part < kParts; part++) {
        const float* from = partial + part * G * V + at;
        low = fminf(low, from[0]), high = fmaxf(high, from[kCount]);
        if (kGaussian) squares += from[2 * kCount], count += from[3 * kCount];
      }
      if (low > high) low = high = 0.f;  // nothing is kept here
      zero[at] = low;
      scale[at] = Part::symmetric ? symmetric_step(fmaxf(high, -low), squares / fmaxf(count, 1.f)) : high;
    }
    __syncthreads();
    float most = 0.f;
    for (int at = threadIdx.x; at < G * V; at += kThreads) most = fmaxf(most, fabsf(zero[at]));
    uint16_t zero_unit = 0, scale_unit = 0;
    if (Part::scale_bits == 8 && !Part::symmetric) zero_unit = bf16_up(fmaxf(block_max(most, scratch) / 127.f, kTiny));
    most = 0.f;
    for (int at = threadIdx.x; at < G * V; at += kThreads) {
      if (!Part::symmetric) {
        if (Part::scale_bits == 16) {
          const uint16_t stored = bf16_down(zero[at]);
          ((uint16_t*)(record + Part::zero))[at] = stored;
          zero[at] = low_bf16(stored);
        } else {
          const float unit = low_bf16(zero_unit);
          const float count = fminf(fmaxf(floorf(zero[at] / unit), -128.f), 127.f);
          ((signed char*)(record + Part::zero))[at] = (signed char)count;
          zero[at] = count * unit;
        }
        scale[at] = (scale[at] - zero[at]) / kLevels;
      }
      most = fmaxf(most, scale[at]);
    }
    if (Part::scale_bits == 8) scale_unit = bf16_up(fmaxf(block_max(most, scratch) / 255.f, kTiny));
    for (int at = threadIdx.x; at < G * V; at += kThreads) {
      if (Part::scale_bits == 16) {
        const uint16_t stored = bf16_up(fmaxf(scale[at], kTiny));
        ((uint16_t*)(record + Part::scale))[at] = stored;
        scale[at] = low_bf16(stored);
      } else {
        const float unit = low_bf16(scale_unit);
        const float count = fminf(fmaxf(ceilf(scale[at] / unit), 1.f), 255.f);
        record[Part::scale + at] = (uint8_t)count;
        scale[at] = count * unit;
      }
      if (Part::symmetric) zero[at] = scale[at] * (-kLevels * 0.5f);
      inverse[at] = 1.f / scale[at];
    }
    if (Part::scale_bits == 8 && threadIdx.x == 0) {
      ((uint16_t*)(record + Part::unit))[0] = scale_unit;
      ((uint16_t*)(record + Part::unit))[1] = zero_unit;
    }
    __syncthreads();
  }

  DEVICE void store_codes() {  // a vector is a column of tiles, of keys and of values alike
    constexpr int kRows = IS_KEYS ? 64 : kColumns, kCodes = kRows / 8;
    constexpr int kAcross = IS_KEYS ? kColumns : 64;  // columns of a block
    const int v = threadIdx.x % V, part = threadIdx.x / V;
    if (part < kParts) {
      const int column = IS_KEYS ? v % kColumns : turned(v % 64);
      float own[kRank];
      own_factors(v, own);
#pragma unroll 1
      for (int lane = part; lane < N / kCodes; lane += kParts) {  // 8 lanes g a block
        const int block = lane / 8, g = lane % 8;
        int codes[kCodes];
#pragma unroll
        for (int u = 0; u < kCodes; u++) {
          const int i = block * kRows + tile_row(u, g);
          codes[u] = code_of(rest(v, i, own), v, i);
        }
        const int token_block = IS_KEYS ? block : v / 64, channel_block = IS_KEYS ? v / kColumns : block;
        each_code_byte<Part::bits, kRows>(codes, token_block * (D / kColumns) + channel_block, kAcross, g, column,
                                          [&](int at, int byte, int, int, int) { record[Part::codes + at] = byte; });
      }
    }
  }

  DEVICE void store_outliers() {  // what is still missing there
    for (int at = threadIdx.x; at < V * O; at += kThreads) {
      const int v = at % V, o = at / V, i = index[v * O + o];
      float own[kRank];
      own_factors(v, own);
      const float y = rest(v, i, own);
      float missing = y - dequantized(code_of(y, v, i), v, i);
      if (R > 0 && !Part::low_rank_first) missing -= product(i, own);
      ((uint16_t*)(record + Part::outlier_value))[at] = to_bf16(missing);
      record[Part::outlier_index + at] = index[v * O + o];
    }
  }

  DEVICE void run(const float* start, float largest) {
    if constexpr (O > 0) select_outliers();
    if constexpr (R > 0 && Part::low_rank_first) fit(start, largest), store_factors();
    store_scales();
    store_codes();
    if constexpr (R > 0 && !Part::low_rank_first) fit(start, largest), store_factors();
    if constexpr (O > 0) store_outliers();
  }
};

template <class Part, bool IS_KEYS>
DEVICE void seal_part(const Args& args, uint8_t* shared, int page, int layer, int head) {
  const int64_t slot = args.pages.slots[page];
  uint8_t* record = args.pool + slot * args.slot_bytes + args.records_start + layer * args.records_stride +
                    (int64_t)head * Page::record_bytes;
  const int num_sinks = args.pages.is_first[page] ? Page::sink_tokens : 0;
  Sealing<Part, IS_KEYS> sealing(shared, record, num_sinks);
  const int64_t runs_start = args.runs_start + layer * args.runs_stride;
  const uint16_t* rows = IS_KEYS ? args.keys : args.values;
  uint32_t largest = 0;  // without its sign, as a bf16
#pragma unroll 4
  for (int at = threadIdx.x; at < S * (D / 8); at += kThreads) {
    const int token = at / (D / 8), eighth = at % (D / 8);
    const uint16_t* from =
        exact_token(args.pool, args.slot_bytes, runs_start, rows, args.pages, page, head, IS_KEYS ? 0 : 1, token);
    uint4 y = *(const uint4*)(from + 8 * eighth);
    const uint4 nothing = make_uint4(0, 0, 0, 0);
    if (token < Page::sink_tokens)  // room that every page has
      *(uint4*)(record + Part::sinks + 2 * (token * D + 8 * eighth)) = token < num_sinks ? y : nothing;
    if (token < num_sinks) y = nothing;  // exact elsewhere: they must not weigh in the statistics
    uint32_t* to = (uint32_t*)(sealing.x + token * kStride + 8 * eighth);
    to[0] = y.x, to[1] = y.y, to[2] = y.z, to[3] = y.w;
#pragma unroll
    for (int i = 0; i < 4; i++) largest = max(largest, max(to[i] & 0x7fff, to[i] >> 16 & 0x7fff));
  }
  __syncthreads();
  sealing.run(IS_KEYS ? args.key_start : args.value_start, low_bf16(largest));
}

// Grid (pages, layers, 2 * heads).
extern "C" __global__ void __launch_bounds__(kThreads, 2) seal(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int page = blockIdx.x, layer = blockIdx.y, head = blockIdx.z / 2;
  if (args.pages.slots[page] < 0) return;
  if (blockIdx.z % 2 == 0) seal_part<Keys, true>(args, shared, page, layer, head);
  else seal_part<Values, false>(args, shared, page, layer, head);
}
