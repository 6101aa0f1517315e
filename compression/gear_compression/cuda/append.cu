// New keys and values: into the stored basis, rounded to bf16, and those that stay open into their runs.
//
// A warp takes one (token, head); lane x the channels x, x + 32, …
#include "pages.cuh"

constexpr int kThreads = 128;
constexpr int kPer = D / 32;

struct Args {
  uint8_t* pool;
  int64_t slot_bytes, runs_start;
  uint16_t* keys;  // [T, H, D] bf16, in place
  uint16_t* values;
  int64_t key_stride, value_stride;  // from one token to the next, entries
  const int* slots;    // [T] runs; negative: the token's page is sealed within the step
  const int* offsets;  // [T] token of the run
  int num_tokens;
};

// Times an orthonormal Hadamard matrix, in blocks of the largest power of two that divides D.
DEVICE void rotate(float (&x)[kPer]) {
  constexpr int kBlock = D & -D;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 1; half < kBlock && half < 32; half *= 2)
#pragma unroll
    for (int i = 0; i < kPer; i++) {
      const float other = __shfl_xor_sync(~0u, x[i], half);
      x[i] = lane & half ? other - x[i] : x[i] + other;
    }
#pragma unroll
  for (int half = 32; half < kBlock; half *= 2)
#pragma unroll
    for (int i = 0; i < kPer; i++)
      if ((i & half / 32) == 0) {
        const float low = x[i], high = x[i + half / 32];
        x[i] = low + high, x[i + half / 32] = low - high;
      }
  const float scale = rsqrtf((float)kBlock);
#pragma unroll
  for (int i = 0; i < kPer; i++) x[i] *= scale;
}

template <bool ROTATE>
DEVICE void append_row(uint16_t* row, uint16_t* run) {
  const int lane = threadIdx.x % 32;
  uint16_t y[kPer];
#pragma unroll
  for (int i = 0; i < kPer; i++) y[i] = row[lane + 32 * i];
  if constexpr (ROTATE) {
    float x[kPer];
#pragma unroll
    for (int i = 0; i < kPer; i++) x[i] = __uint_as_float((uint32_t)y[i] << 16);
    rotate(x);
#pragma unroll
    for (int i = 0; i < kPer; i++) row[lane + 32 * i] = y[i] = to_bf16(x[i]);
  }
  if (run != nullptr)
#pragma unroll
    for (int i = 0; i < kPer; i++) run[lane + 32 * i] = y[i];
}

extern "C" __global__ void __launch_bounds__(kThreads) append(const __grid_constant__ Args args) {
  const int item = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  const int token = item / Page::num_heads, head = item % Page::num_heads;
  if (token >= args.num_tokens) return;
  const int64_t slot = args.slots[token];
  uint16_t* run = nullptr;
  if (slot >= 0)
    run = (uint16_t*)(args.pool + slot * args.slot_bytes + args.runs_start + 2 * head * kRunBytes + 2 * args.offsets[token] * D);
  append_row<Options::rotate_keys>(args.keys + token * args.key_stride + head * D, run);
  append_row<Options::rotate_values>(args.values + token * args.value_stride + head * D, run ? run + kRunBytes / 2 : run);
}
