// Float64 arithmetic on many problems at once, one in each lane: entries lie `W` values apart. For
// kernel files only, which are compiled once per instruction set.
#pragma once
#include <cmath>

#include "mergeprobe/types.hpp"
#include "simd.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mergeprobe {
namespace {

using V = vec_t<double>;
constexpr i64 W = Lanes<double>::count;

MP_INLINE V constant(double x) { return broadcast<double>(x); }
MP_INLINE V root(V x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_pd(0xff, x);
#elif defined(__AVX2__)
  return _mm256_sqrt_pd(x);
#else
  for (i64 l = 0; l < W; l++) x[l] = std::sqrt(x[l]);
  return x;
#endif
}
// a where x > y, else b.
MP_INLINE V above(const V& x, const V& y, const V& a, const V& b) {
#if defined(__GNUC__) || defined(__clang__)
  return x > y ? a : b;
#else
  V r = b;
  for (i64 l = 0; l < W; l++)
    if (x[l] > y[l]) r[l] = a[l];
  return r;
#endif
}
MP_INLINE V larger(const V& x, const V& y) { return above(x, y, x, y); }
MP_INLINE V absolute(const V& x) { return larger(x, constant(0) - x); }
MP_INLINE bool any_above(const V& x, const V& y) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask(x, y, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_pd(_mm256_cmp_pd(x, y, _CMP_GT_OQ)) != 0;
#else
  bool any = false;
  for (i64 l = 0; l < W; l++) any |= x[l] > y[l];
  return any;
#endif
}
MP_INLINE V get(const double* p, i64 i) { return load(p + i * W); }
MP_INLINE void put(double* p, i64 i, const V& x) { store(p + i * W, x); }

}  // namespace
}  // namespace mergeprobe
