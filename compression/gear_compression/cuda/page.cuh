// The numbers of a page that every kernel needs, from the layout that it is compiled for.
#pragma once
#include "layout.cuh"
#include "mma.cuh"

constexpr int D = Page::head_dim;
constexpr int S = Page::page_size;
constexpr int kColumns = D % 64 == 0 ? 64 : 32;  // channels of a tile block
constexpr int64_t kRunBytes = 2 * Page::run_tokens * D;  // of one head's keys in a run of exact tokens
constexpr int kPer = D / 32;  // channels of a lane where a warp has all of a token: lane x those at x, x + 32, …

// A token of a warp times an orthonormal Hadamard matrix, in blocks of the largest power of two that divides D.
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
