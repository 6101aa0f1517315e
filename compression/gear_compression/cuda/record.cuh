// Reading a sealed record in tensor-core fragments. `Keys` and `Values` hold the byte offsets of PartLayout, generated
// from the page layout that this file is compiled for; reference/tiles.py says in which order the codes lie.
#pragma once
#include "page.cuh"

// A strip is what one lane reads of a block: 64 rows (8 of them its own) by 4 neighbouring columns, BITS words.
// Tile i are the rows 16 i + 2 g (low) and 16 i + 2 g + 1 (high); each code becomes an fp16 subnormal, exact in the
// tensor core, worth code * 2^-24 times a power of two that low_worth and high_worth undo.
template <int BITS, bool EVEN>
struct Strip {
  uint32_t words[BITS];

  static DEVICE constexpr float low_worth(int tile) {
    return EVEN || BITS != 2 ? 16777216.f : (tile & 1 ? 1048576.f : 16777216.f);
  }
  static DEVICE constexpr float high_worth(int tile) {
    if (EVEN || BITS == 8) return 16777216.f;
    if (BITS == 2) return tile & 1 ? 262144.f : 4194304.f;
    return BITS == 3 ? 4194304.f : 1048576.f;
  }

  // a0, a2: the low rows at columns (0, 2) and (1, 3); a1, a3: the high rows.
  DEVICE void unpack(int tile, uint32_t (&a)[4]) const {
    if (BITS == 8) {
      pair<0x00ff00ffu>(words[2 * tile], a[0], a[2]);
      pair<0x00ff00ffu>(words[2 * tile + 1], a[1], a[3]);
    } else if (BITS == 4 || BITS == 5) {
      const uint32_t x = words[tile], top = words[BITS - 1];
      pair<0x000f000fu>(x, a[0], a[2]);
      if (EVEN) pair<0x000f000fu>(x >> 4, a[1], a[3]);
      else pair<0x00f000f0u>(x, a[1], a[3]);
      if (BITS == 5) {
        add<0x00100010u>(shifted(top, 4 - 2 * tile), a[0], a[2]);
        if (EVEN) {
          add<0x00100010u>(shifted(top, 3 - 2 * tile), a[1], a[3]);
        } else {  // to bit 8, which for the last byte is bit 32 of a word
          a[1] |= shifted(top, 7 - 2 * tile) & 0x01000100u;
          a[3] |= shifted(top >> 8, 7 - 2 * tile) & 0x01000100u;
        }
      }
    } else {
      const bool move = EVEN || BITS == 3;
      const uint32_t x = move ? words[tile / 2] >> (4 * (tile & 1)) : words[tile / 2];
      if (move || tile % 2 == 0) {
        pair<0x00030003u>(x, a[0], a[2]);
        if (EVEN) pair<0x00030003u>(x >> 2, a[1], a[3]);
        else pair<0x000c000cu>(x, a[1], a[3]);
      } else {
        pair<0x00300030u>(x, a[0], a[2]);
        pair<0x00c000c0u>(x, a[1], a[3]);
      }
      if (BITS == 3) {
        const uint32_t top = words[BITS - 1];
        add<0x00040004u>(shifted(top, 2 - 2 * tile), a[0], a[2]);
        if (EVEN) add<0x00040004u>(shifted(top, 1 - 2 * tile), a[1], a[3]);
        else add<0x00100010u>(shifted(top, 3 - 2 * tile), a[1], a[3]);
      }
    }
  }

 private:
  static DEVICE uint32_t shifted(uint32_t x, int left) { return left >= 0 ? x << left : x >> -left; }
  template <uint32_t MASK>
  static DEVICE void pair(uint32_t x, uint32_t& even, uint32_t& odd) {
    even = x & MASK;
    odd = (x >> 8) & MASK;
  }
  template <uint32_t MASK>
  static DEVICE void add(uint32_t x, uint32_t& even, uint32_t& odd) {
    even |= x & MASK;
    odd |= (x >> 8) & MASK;
  }
};

template <int WORDS>
DEVICE void load_words(const uint8_t* at, uint32_t (&out)[WORDS]) {
  if constexpr (WORDS == 4) {
    const uint4 x = *(const uint4*)at;
    out[0] = x.x, out[1] = x.y, out[2] = x.z, out[3] = x.w;
  } else {
    const uint2 x = *(const uint2*)at;
    out[0] = x.x, out[1] = x.y;
  }
}

// The strips of a lane in one block: ROWS of 64 or 32 rows, 16 * WORDS columns wide, at byte `block` of each plane.
// plane: bytes of a whole plane of one bit's width.
template <int BITS, bool EVEN, int ROWS, int WORDS>
DEVICE void load_strips(const uint8_t* codes, int block, int one_bit_plane, int g, int j,
                        Strip<BITS, EVEN> (&strips)[WORDS]) {
  constexpr int kWidth = BITS == 3 ? 2 : BITS == 5 ? 4 : BITS;  // of the first plane
  constexpr int kColumns = 16 * WORDS;
  constexpr int kByteRows = ROWS * kWidth / 64;  // of each g
  const uint8_t* first = codes + block * (ROWS * kColumns * kWidth / 8);
#pragma unroll
  for (int r = 0; r < kByteRows; r++) {
    uint32_t words[WORDS];
    load_words<WORDS>(first + (r * 8 + g) * kColumns + 4 * WORDS * j, words);
#pragma unroll
    for (int w = 0; w < WORDS; w++) strips[w].words[r] = words[w];
  }
  if constexpr (kWidth < BITS) {
    static_assert(ROWS == 64, "a plane of single bits needs blocks of 64 rows");
    uint32_t words[WORDS];
    load_words<WORDS>(codes + one_bit_plane * kWidth + block * (8 * kColumns) + g * kColumns + 4 * WORDS * j, words);
#pragma unroll
    for (int w = 0; w < WORDS; w++) strips[w].words[BITS - 1] = words[w];
  }
}

// Four neighbouring entries as two f16 pairs, (0, 2) and (1, 3): the columns of a fragment.
struct Quad {
  uint32_t even, odd;
};
DEVICE Quad quad_of_bytes(uint32_t word) {  // unsigned, as subnormals: worth 2^-24 each
  return {word & 0x00ff00ffu, (word >> 8) & 0x00ff00ffu};
}
DEVICE Quad quad_of_signed_bytes(uint32_t word) {
  const uint32_t lifted = word ^ 0x80808080u;
  return {sub_f16(permute(lifted, 0x64646464u, 0x4240), 0x64806480u), sub_f16(permute(lifted, 0x64646464u, 0x4341), 0x64806480u)};
}
DEVICE Quad quad_of_bf16(uint2 words, float times) {
  return {pack_f16(low_bf16(words.x) * times, low_bf16(words.y) * times),
          pack_f16(high_bf16(words.x) * times, high_bf16(words.y) * times)};
}
// Entries at [4 n, 4 n + 4) of a row of scales, or of zeros, as stored: bf16, or bytes that are counts of a unit.
template <int BITS>
DEVICE Quad load_scales(const uint8_t* row, int n) {
  if constexpr (BITS == 16) return quad_of_bf16(*(const uint2*)(row + 8 * n), 1.f);
  else return quad_of_bytes(*(const uint32_t*)(row + 4 * n));
}
template <int BITS>
DEVICE Quad load_zeros(const uint8_t* row, int n) {
  if constexpr (BITS == 16) return quad_of_bf16(*(const uint2*)(row + 8 * n), 1.f);
  else return quad_of_signed_bytes(*(const uint32_t*)(row + 4 * n));
}
