// The yardstick: how fast this card moves bytes, by a kernel that does nothing else.
#include "mma.cuh"

struct Args {
  const uint4* from;
  uint4* to;
  int64_t count;  // of 16 bytes, a multiple of 1024
};

extern "C" __global__ void __launch_bounds__(256) copy(const __grid_constant__ Args args) {
  const int64_t at = (int64_t)blockIdx.x * 1024 + threadIdx.x;
  uint4 x[4];
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = __ldcs(args.from + at + 256 * i);
#pragma unroll
  for (int i = 0; i < 4; i++) __stcs(args.to + at + 256 * i, x[i]);
}
