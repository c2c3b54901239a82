// The elementwise half of P2, compiled once per instruction set and without contraction, so that a
// rule is the same float32 operations everywhere. See kernels.cpp on linkage.
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "mergeprobe/counter_hash.hpp"
#include "mergeprobe/tile_kernels.hpp"
#include "simd.hpp"

namespace mergeprobe {
namespace {

using vec = vec_t<float>;
using wide = vec_t<double>;
constexpr int W = Lanes<float>::count;
constexpr int D = Lanes<double>::count;
constexpr float kNoDivisor = 1e-8f;  // mergekit's

#if defined(__GNUC__) || defined(__clang__)
// a > b ? x : y, lane by lane.
MP_INLINE vec above(vec a, vec b, vec x, vec y) { return a > b ? x : y; }
MP_INLINE wide above(wide a, wide b, wide x, wide y) { return a > b ? x : y; }
MP_INLINE vec divided(vec a, vec b) { return a / b; }
MP_INLINE vec less(vec a, vec b) { return a - b; }
MP_INLINE wide widened(const float* p) {
  typedef float half __attribute__((vector_size(MP_BYTES / 2)));
  half h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, wide);
}
#else
template <class V>
MP_INLINE V above(const V& a, const V& b, const V& x, const V& y) {
  V r;
  constexpr int n = static_cast<int>(sizeof(V) / sizeof(V{}[0]));
  for (int i = 0; i < n; i++) r[i] = a[i] > b[i] ? x[i] : y[i];
  return r;
}
MP_INLINE vec divided(vec a, const vec& b) {
  for (int i = 0; i < W; i++) a[i] /= b[i];
  return a;
}
MP_INLINE vec less(vec a, const vec& b) {
  for (int i = 0; i < W; i++) a[i] -= b[i];
  return a;
}
MP_INLINE wide widened(const float* p) {
  wide r;
  for (int i = 0; i < D; i++) r[i] = p[i];
  return r;
}
#endif

MP_INLINE vec magnitude(vec x) {
  const vec zero = broadcast(0.0f);
  return above(zero, x, less(zero, x), x);
}

void mark_magnitude(const float* x, i64 n, float low, float high, float* out) {
  const vec lo = broadcast(low), hi = broadcast(high);
  const vec zero = broadcast(0.0f), one = broadcast(1.0f);
  for (i64 j = 0; j < n; j += W) {
    const vec size = magnitude(load(x + j));
    store(out + j, above(lo, size, zero, above(size, hi, zero, one)));
  }
}

void keep_magnitude(float* x, i64 n, float low, float high, float rescale) {
  const vec lo = broadcast(low), hi = broadcast(high), s = broadcast(rescale);
  const vec zero = broadcast(0.0f);
  for (i64 j = 0; j < n; j += W) {
    const vec v = load(x + j), size = magnitude(v);
    store(x + j, above(lo, size, zero, above(size, hi, zero, v * s)));
  }
}

void keep_random(float* x, const HashRow& row, std::uint32_t limit, float rescale) {
  for (std::uint32_t j = 0; j < kTileColumns; j++) {
    const float v = x[j] * rescale;
    x[j] = hash32(row.lower + j, row.key, row.key2) < limit ? v : 0.0f;
  }
}

void rescale_all(float* x, i64 n, float rescale) {
  const vec s = broadcast(rescale);
  for (i64 j = 0; j < n; j += W) store(x + j, load(x + j) * s);
}

void sum(const float* x, i64 stride, const TileAdapter* a, i64 count, float divisor, i64 n,
         float* out) {
  for (i64 j = 0; j < n; j += W) {
    vec total = broadcast(0.0f);
    for (i64 i = 0; i < count; i++)
      total = total + broadcast(a[i].weight) * load(x + i * stride + j);
    store(out + j, divided(total, broadcast(divisor)));
  }
}

template <bool kFrequency, bool kWeighted, Divide kDivide>
void ties_as(const float* x, i64 stride, const TileAdapter* a, i64 count, float zero_sign, i64 n,
             float* out) {
  const vec zero = broadcast(0.0f), one = broadcast(1.0f), minus = broadcast(-1.0f);
  for (i64 j = 0; j < n; j += W) {
    vec balance = zero;
    for (i64 i = 0; i < count; i++) {
      vec e = load(x + i * stride + j);
      if (kWeighted) e = broadcast(a[i].weight) * e;
      if (kFrequency) e = above(e, zero, one, above(zero, e, minus, zero));
      balance = balance + e;
    }
    const vec sign = above(balance, zero, one, above(zero, balance, minus, broadcast(zero_sign)));
    vec total = zero, divisor = zero;
    for (i64 i = 0; i < count; i++) {
      const vec v = load(x + i * stride + j), w = broadcast(a[i].weight), wv = w * v;
      const vec agrees = (kWeighted ? wv : v) * sign;
      total = total + above(agrees, zero, wv, zero);
      if (kDivide != Divide::none)
        divisor = divisor + above(agrees, zero, kDivide == Divide::count ? one : w, zero);
    }
    if (kDivide == Divide::count) total = divided(total, above(divisor, one, divisor, one));
    if (kDivide == Divide::weights)
      total = divided(total, above(broadcast(kNoDivisor), magnitude(divisor), one, divisor));
    store(out + j, total);
  }
}

template <bool kFrequency, bool kWeighted>
void ties_divided(const float* x, i64 stride, const TileAdapter* a, i64 count, const TileRule& rule,
                  i64 n, float* out) {
  const float zero_sign = static_cast<float>(rule.zero_sign);
  switch (rule.divide) {
    case Divide::none:
      return ties_as<kFrequency, kWeighted, Divide::none>(x, stride, a, count, zero_sign, n, out);
    case Divide::count:
      return ties_as<kFrequency, kWeighted, Divide::count>(x, stride, a, count, zero_sign, n, out);
    case Divide::weights:
      return ties_as<kFrequency, kWeighted, Divide::weights>(x, stride, a, count, zero_sign, n, out);
  }
}

void ties(const float* x, i64 stride, const TileAdapter* a, i64 count, const TileRule& rule, i64 n,
          float* out) {
  const bool frequency = rule.elect == Elect::frequency;
  if (rule.elect_weighted) {
    if (frequency) return ties_divided<true, true>(x, stride, a, count, rule, n, out);
    return ties_divided<false, true>(x, stride, a, count, rule, n, out);
  }
  if (frequency) return ties_divided<true, false>(x, stride, a, count, rule, n, out);
  ties_divided<false, false>(x, stride, a, count, rule, n, out);
}

void fisher(const float* x, const float* f, i64 stride, const TileAdapter* a, i64 count, float floor,
            i64 n, float* out) {
  const vec zero = broadcast(0.0f), one = broadcast(1.0f), least = broadcast(floor);
  for (i64 j = 0; j < n; j += W) {
    vec total = zero, divisor = zero;
    for (i64 i = 0; i < count; i++) {
      const vec wf = broadcast(a[i].weight) * (load(f + i * stride + j) + least);
      total = total + wf * load(x + i * stride + j);
      divisor = divisor + wf;
    }
    const vec ratio = divided(total, above(magnitude(divisor), zero, divisor, one));
    store(out + j, above(magnitude(divisor), zero, ratio, zero));
  }
}

void subtract(float* x, const float* y, i64 n) {
  for (i64 j = 0; j < n; j += W) store(x + j, less(load(x + j), load(y + j)));
}

MP_INLINE double total(wide v) {
  double s = 0;
  for (int i = 0; i < D; i++) s += v[i];
  return s;
}

double squares(const float* x, i64 n) {
  wide s = broadcast(0.0), t = s;
  for (i64 j = 0; j < n; j += 2 * D) {
    const wide v = widened(x + j), w = widened(x + j + D);
    s = s + v * v;
    t = t + w * w;
  }
  return total(s + t);
}

void norms(const float* x, const float* kept, i64 n, TileNorms* out) {
  const wide zero = broadcast(0.0), one = broadcast(1.0);
  wide l1 = zero, l1_kept = zero, sq = zero, sq_kept = zero, count = zero;
  wide top = zero, top_kept = zero;
  for (i64 j = 0; j < n; j += D) {
    const wide v = widened(x + j), minus_v = zero + broadcast(-1.0) * v;
    const wide size = above(v, zero, v, minus_v);
    // The mark is 1 where the entry survived, 0 elsewhere; a surviving zero adds to the count only.
    const wide mark = widened(kept + j), rest = size * mark;
    l1 = l1 + size;
    l1_kept = l1_kept + rest;
    sq = sq + size * size;
    sq_kept = sq_kept + rest * rest;
    top = above(size, top, size, top);
    top_kept = above(rest, top_kept, rest, top_kept);
    count = count + above(mark, zero, one, zero);
  }
  out->l1 += total(l1);
  out->l1_kept += total(l1_kept);
  out->squares += total(sq);
  out->squares_kept += total(sq_kept);
  for (int i = 0; i < D; i++) {
    out->largest = top[i] > out->largest ? top[i] : out->largest;
    out->largest_kept = top_kept[i] > out->largest_kept ? top_kept[i] : out->largest_kept;
  }
  out->kept += static_cast<i64>(total(count));
}

#if defined(__AVX512F__)
i64 between(const float* x, i64 n, std::uint32_t low, std::uint32_t high, i64* above_high,
            float* out) {
  const __m512i sign = _mm512_set1_epi32(0x7fffffff);
  const __m512i from = _mm512_set1_epi32(static_cast<int>(low));
  const __m512i to = _mm512_set1_epi32(static_cast<int>(high));
  float* const start = out;
  int over = 0;
  for (i64 j = 0; j < n; j += 16) {
    const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(x + j), sign);
    const __mmask16 above = _mm512_cmpge_epu32_mask(bits, to);
    const __mmask16 inside =
        _mm512_mask_cmpge_epu32_mask(static_cast<__mmask16>(~above), bits, from);
    over += __builtin_popcount(above);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(inside, bits));
    out += __builtin_popcount(inside);
  }
  *above_high += over;
  return out - start;
}
#elif defined(__GNUC__) || defined(__clang__)
typedef std::uint32_t keys __attribute__((vector_size(MP_BYTES)));
MP_INLINE keys same(std::uint32_t x) { return x - keys{}; }

i64 between(const float* x, i64 n, std::uint32_t low, std::uint32_t high, i64* above_high,
            float* out) {
  const keys sign = same(0x7fffffffu), from = same(low), span = same(high - low), to = same(high);
  keys over = same(0);
  i64 found = 0;
  for (i64 j = 0; j < n; j += W) {
    keys bits;
    std::memcpy(&bits, x + j, sizeof bits);
    bits = bits & sign;
    const keys inside = bits - from < span;
    over = over - (bits >= to);
    std::uint64_t words[MP_BYTES / 8], any = 0;
    std::memcpy(words, &inside, sizeof words);
    for (std::uint64_t w : words) any |= w;
    if (any == 0) continue;
    std::uint32_t entry[W], hit[W];
    std::memcpy(entry, &bits, sizeof entry);
    std::memcpy(hit, &inside, sizeof hit);
    for (int i = 0; i < W; i++) {
      std::memcpy(out + found, entry + i, 4);
      found += hit[i] & 1;
    }
  }
  std::uint32_t lanes[W];
  std::memcpy(lanes, &over, sizeof lanes);
  for (std::uint32_t l : lanes) *above_high += l;
  return found;
}
#else
i64 between(const float* x, i64 n, std::uint32_t low, std::uint32_t high, i64* above_high,
            float* out) {
  i64 found = 0;
  for (i64 j = 0; j < n; j++) {
    std::uint32_t bits;
    std::memcpy(&bits, x + j, 4);
    bits &= 0x7fffffffu;
    *above_high += bits >= high;
    std::memcpy(out + found, &bits, 4);
    found += bits - low < high - low;
  }
  return found;
}
#endif

}  // namespace

#define MP_JOIN_(a, b) a##b
#define MP_JOIN(a, b) MP_JOIN_(a, b)

extern const TileProducts MP_JOIN(tile_products_, MP_ISA);
extern const TileKernels MP_JOIN(tile_kernels_, MP_ISA);
const TileKernels MP_JOIN(tile_kernels_, MP_ISA) = {
    &MP_JOIN(tile_products_, MP_ISA), mark_magnitude, keep_magnitude, keep_random, rescale_all,
    sum, ties, fisher, subtract, squares, norms, between};

}  // namespace mergeprobe
