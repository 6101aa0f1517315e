// PTX that the kernels share: packed half arithmetic, tensor-core products, asynchronous copies. No CUDA header needed.
#pragma once

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;

#define DEVICE __device__ __forceinline__

#define kMinusInfinity __int_as_float(0xff800000)
constexpr uint32_t kOnesF16 = 0x3c003c00u, kOnesBf16 = 0x3f803f80u;

DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float tanh_fast(float x) {  // 2^-11 relative
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two 16-bit floats in a register; the first argument is the lower half.
DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
DEVICE float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
DEVICE float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE float bf16_at(const uint8_t* p) { return __uint_as_float((uint32_t)*(const uint16_t*)p << 16); }
DEVICE uint16_t to_bf16(float x) { return (uint16_t)pack_bf16(x, 0.f); }
DEVICE uint32_t mul_f16(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("mul.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
DEVICE uint32_t sub_f16(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
DEVICE uint32_t equal_f16(uint32_t a, uint32_t b) {  // 1.0 where equal, else 0
  uint32_t y;
  asm("set.eq.f16x2.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
DEVICE uint32_t mul_bf16(uint32_t a, uint32_t b) {  // as a fused multiply-add, which Ampere has too
  uint32_t y;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(0x80008000u));
  return y;
}
DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(selector));
  return y;
}

// A fragment of 8 x 8 16-bit values, transposed across the warp.
DEVICE uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// c [16, 8] += a [16, 16] b [16, 8], or = where it is the `first` product. Lane 4 g + j holds: a0 row g, a1 row g + 8, both at columns 2j, 2j + 1; a2, a3 the
// same rows at columns 2j + 8, 2j + 9; b0 rows 2j, 2j + 1 and b1 rows 2j + 8, 2j + 9 of column g; c0, c1 row g and
// c2, c3 row g + 8 at columns 2j, 2j + 1.
DEVICE void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                    bool first = false) {
  if (first)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.f));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                     bool first = false) {
  if (first) c[0] = c[1] = c[2] = c[3] = 0.f;
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c [16, 8] += a [16, 8] b [8, 8] in tf32, which reads the upper 19 bits of a float. Lane 4 g + j holds: a0 row g, a1 row
// g + 8, both at column j; a2, a3 the same rows at column j + 4; b0 row j and b1 row j + 4 of column g; c as above.
DEVICE void mma_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
DEVICE float tf32_of(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }  // what the product reads

DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// One stage of a ring in shared memory that whole records stream through. On Hopper and later a single thread asks the
// copy engine for a record; before, every thread copies a part of it.
#if __CUDA_ARCH__ >= 900
DEVICE void ring_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
DEVICE void ring_expect(uint32_t barrier, uint32_t num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(num_bytes) : "memory");
}
DEVICE void ring_copy(uint32_t to, const void* from, uint32_t num_bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(num_bytes), "r"(barrier)
               : "memory");
}
DEVICE void ring_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
#else
DEVICE void ring_copy_part(uint32_t to, const uint8_t* from, uint32_t num_bytes, int thread, int num_threads) {
  for (uint32_t at = 16 * thread; at < num_bytes; at += 16 * num_threads)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + at), "l"(from + at) : "memory");
}
DEVICE void ring_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void ring_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#endif
