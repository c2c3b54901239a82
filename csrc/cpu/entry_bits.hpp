// Counting the bits of many pairs of words, for each instruction set. Included by entry_kernels.cpp
// alone, which is compiled once per set.
#pragma once
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "mergeprobe/entries.hpp"
#include "simd.hpp"

namespace mergeprobe {
namespace {

using u64 = std::uint64_t;

MP_INLINE i64 ones(u64 x) {
  x = x - ((x >> 1) & 0x5555555555555555u);
  x = (x & 0x3333333333333333u) + ((x >> 2) & 0x3333333333333333u);
  x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return static_cast<i64>((x * 0x0101010101010101u) >> 56);
}

// Counting bits of x ^ y or x & y, four against four.
#if defined(__AVX512F__)
MP_INLINE i64 total(__m512i v) {
  i64 s[8];
  std::memcpy(s, &v, sizeof s);
  return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

template <bool kXor>
MP_INLINE __m512i joined(__m512i x, __m512i y) {
  return kXor ? _mm512_xor_si512(x, y) : _mm512_and_si512(x, y);
}

#define MP_VPOPCNT __attribute__((target("avx512vpopcntdq")))
template <bool kXor>
MP_VPOPCNT void count_vpopcnt(const u64* const* x, const u64* const* y, i64 words, i64* out) {
  __m512i s[4][4];
  MP_UNROLL(4)
  for (int a = 0; a < 4; a++)
    MP_UNROLL(4)
    for (int b = 0; b < 4; b++) s[a][b] = _mm512_setzero_si512();
  for (i64 w = 0; w < words; w += 8) {
    __m512i left[4];
    MP_UNROLL(4)
    for (int a = 0; a < 4; a++) left[a] = _mm512_loadu_si512(x[a] + w);
    MP_UNROLL(4)
    for (int b = 0; b < 4; b++) {
      const __m512i right = _mm512_loadu_si512(y[b] + w);
      MP_UNROLL(4)
      for (int a = 0; a < 4; a++) {
        const __m512i both =
            kXor ? _mm512_xor_si512(left[a], right) : _mm512_and_si512(left[a], right);
        s[a][b] = _mm512_add_epi64(s[a][b], _mm512_popcnt_epi64(both));
      }
    }
  }
  for (int a = 0; a < 4; a++)
    for (int b = 0; b < 4; b++) out[a * 4 + b] = total(s[a][b]);
}

// Nibbles looked up in a register (Mula, Kurz and Lemire 2018).
MP_INLINE __m512i bytes_set(__m512i x) {
  const __m512i table = _mm512_maskz_broadcast_i32x4(
      0xffff, _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i upper = _mm512_and_si512(_mm512_maskz_srli_epi16(~0u, x, 4), low);
  return _mm512_add_epi8(_mm512_shuffle_epi8(table, _mm512_and_si512(x, low)),
                         _mm512_shuffle_epi8(table, upper));
}
template <bool kXor>
void count_table(const u64* const* x, const u64* const* y, i64 words, i64* out) {
  for (int a = 0; a < 4; a++) {
    __m512i s[4];
    for (int b = 0; b < 4; b++) s[b] = _mm512_setzero_si512();
    for (i64 w = 0; w < words; w += 8) {
      const __m512i left = _mm512_loadu_si512(x[a] + w);
      MP_UNROLL(4)
      for (int b = 0; b < 4; b++) {
        const __m512i set = bytes_set(joined<kXor>(left, _mm512_loadu_si512(y[b] + w)));
        s[b] = _mm512_add_epi64(s[b], _mm512_sad_epu8(set, _mm512_setzero_si512()));
      }
    }
    for (int b = 0; b < 4; b++) out[a * 4 + b] = total(s[b]);
  }
}

template <bool kXor>
void count_bits(const u64* const* x, const u64* const* y, i64 words, bool vpopcnt, i64* out) {
  if (vpopcnt && __builtin_cpu_supports("avx512vpopcntdq")) {
    count_vpopcnt<kXor>(x, y, words, out);
  } else {
    count_table<kXor>(x, y, words, out);
  }
}
#elif defined(__AVX2__)
template <bool kXor>
void count_bits(const u64* const* x, const u64* const* y, i64 words, bool, i64* out) {
  const __m256i table = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m256i low = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
  for (int a = 0; a < 4; a++) {
    __m256i s[4];
    for (int b = 0; b < 4; b++) s[b] = zero;
    for (i64 w = 0; w < words; w += 4) {
      const __m256i left = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[a] + w));
      MP_UNROLL(4)
      for (int b = 0; b < 4; b++) {
        const __m256i right = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(y[b] + w));
        const __m256i v = kXor ? _mm256_xor_si256(left, right) : _mm256_and_si256(left, right);
        const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
        const __m256i set = _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(v, low)),
                                            _mm256_shuffle_epi8(table, upper));
        s[b] = _mm256_add_epi64(s[b], _mm256_sad_epu8(set, zero));
      }
    }
    for (int b = 0; b < 4; b++) {
      i64 lanes[4];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), s[b]);
      out[a * 4 + b] = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    }
  }
}
#else
template <bool kXor>
void count_bits(const u64* const* x, const u64* const* y, i64 words, bool, i64* out) {
  for (int a = 0; a < 4; a++)
    for (int b = 0; b < 4; b++) {
      i64 set = 0;
      for (i64 w = 0; w < words; w++) set += ones(kXor ? x[a][w] ^ y[b][w] : x[a][w] & y[b][w]);
      out[a * 4 + b] = set;
    }
}
#endif

}  // namespace
}  // namespace mergeprobe
