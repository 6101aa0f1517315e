// New keys and values: into the stored basis, rounded to bf16, and those that stay open into their runs.
//
// A warp takes one (token, head).
#include "page.cuh"

constexpr int kThreads = 128;

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
