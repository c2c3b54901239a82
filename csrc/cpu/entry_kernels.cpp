// Inner kernels of entry statistics, compiled once per instruction set like kernels.cpp, which says
// why nothing but the table may have external linkage.
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "entry_bits.hpp"
#include "mergeprobe/entries.hpp"
#include "mergeprobe/tile_kernels.hpp"
#include "simd.hpp"

namespace mergeprobe {
namespace {

using vec = vec_t<float>;
constexpr int W = Lanes<float>::count;
constexpr int kRows = MP_BYTES == 64 ? 8 : 4;
// Entries whose float32 sums are added up in float64: 96 registers of AVX-512.
constexpr i64 kRun = 1536;

template <class S, i64 width>
bool gather_as(const Matrix& m, i64 rank, const std::int32_t* index, i64 count, float* out) {
  const S* s = static_cast<const S*>(m.data);
  std::uint32_t bad = 0;
  auto move = [&](i64 k, i64 j) {
    float& x = out[(j / width * rank + k) * width + j % width];
    x = static_cast<float>(widen(s[k * m.row_stride + index[j] * m.col_stride]));
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bad |= (bits & 0x7f800000u) == 0x7f800000u;
  };
  if (m.row_stride == 1) {  // along memory, whichever that is
    for (i64 j = 0; j < count; j++)
      for (i64 k = 0; k < rank; k++) move(k, j);
  } else {
    for (i64 k = 0; k < rank; k++)
      for (i64 j = 0; j < count; j++) move(k, j);
  }
  for (i64 j = count; j % width; j++)
    for (i64 k = 0; k < rank; k++) out[(j / width * rank + k) * width + j % width] = 0;
  return !bad;
}

template <i64 width>
bool gather_wide(const Matrix& m, i64 rank, const std::int32_t* index, i64 count, float* out) {
  switch (m.dtype) {
    case Dtype::f32: return gather_as<float, width>(m, rank, index, count, out);
    case Dtype::bf16: return gather_as<bf16, width>(m, rank, index, count, out);
    case Dtype::f16: return gather_as<f16, width>(m, rank, index, count, out);
    case Dtype::f64: return gather_as<double, width>(m, rank, index, count, out);
  }
  return false;
}

bool gather(const Matrix& m, i64 rank, const std::int32_t* index, i64 count, i64 width,
            float* out) {
  if (width == kTileRows) return gather_wide<kTileRows>(m, rank, index, count, out);
  return gather_wide<kSampleColumns>(m, rank, index, count, out);
}

// kRows x P registers of a tile before the scale: chains over k in order, as TileProducts::delta.
template <int P>
MP_INLINE void chains(const float* b, const float* a, i64 rank, i64 columns,
                      vec (&acc)[kRows][3]) {
  MP_UNROLL(8)
  for (int i = 0; i < kRows; i++)
    MP_UNROLL(3)
    for (int p = 0; p < P; p++) acc[i][p] = broadcast<float>(0);
  for (i64 k = 0; k < rank; k++, b += kTileRows, a += columns) {
    vec line[P];
    MP_UNROLL(3)
    for (int p = 0; p < P; p++) line[p] = load(a + p * W);
    MP_UNROLL(8)
    for (int i = 0; i < kRows; i++) {
      const vec y = broadcast(b[i]);
      MP_UNROLL(3)
      for (int p = 0; p < P; p++) acc[i][p] = acc[i][p] + y * line[p];
    }
  }
}

template <int P>
MP_NOINLINE void store_block(const float* b, const float* a, i64 rank, i64 columns, float scale,
                             float* out) {
  vec acc[kRows][3];
  chains<P>(b, a, rank, columns, acc);
  const vec s = broadcast(scale);
  MP_UNROLL(8)
  for (int i = 0; i < kRows; i++)
    MP_UNROLL(3)
    for (int p = 0; p < P; p++) store(out + i * columns + p * W, acc[i][p] * s);
}

// 48 columns are 1, 2 or 4 threes of registers, 16 are one register or pairs of them.
void tile(const float* b, const float* a, i64 rank, float scale, i64 columns, float* out) {
  constexpr int kNarrow = kSampleColumns / W < 2 ? 1 : 2;
  const i64 step = (columns == kTileColumns ? 3 : kNarrow) * W;
  for (i64 i = 0; i < kTileRows; i += kRows)
    for (i64 j = 0; j < columns; j += step) {
      if (columns == kTileColumns) {
        store_block<3>(b + i, a + j, rank, columns, scale, out + i * columns + j);
      } else {
        store_block<kNarrow>(b + i, a + j, rank, columns, scale, out + i * columns + j);
      }
    }
}

#if defined(__AVX512F__)
// Lanes below zero, and lanes that are not zero, of one register.
MP_INLINE __mmask16 below(vec x) {
  return _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_LT_OQ);
}
MP_INLINE __mmask16 alive(vec x) {
  return _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NEQ_OQ);
}

template <int P, bool kScaled>
MP_NOINLINE void sign_block(const float* b, const float* a, i64 rank, i64 columns, float scale,
                            std::uint16_t* negative, std::uint16_t* nonzero) {
  vec acc[kRows][3];
  chains<P>(b, a, rank, columns, acc);
  const vec s = broadcast(scale);
  MP_UNROLL(8)
  for (int i = 0; i < kRows; i++)
    MP_UNROLL(3)
    for (int p = 0; p < P; p++) {
      const vec x = kScaled ? acc[i][p] * s : acc[i][p];
      negative[i * P + p] = below(x);
      nonzero[i * P + p] = alive(x);
    }
}

i64 ones(const u64* words, i64 n) {
  i64 total = 0;
  for (i64 w = 0; w < n; w++) total += __builtin_popcountll(words[w]);
  return total;
}

i64 tile_signs(const float* b, const float* a, i64 rank, float scale, i64 columns, u64* negative,
               u64* nonzero) {
  std::uint16_t bits[2][24];
  const i64 words = kTileRows * columns / 64;
  const bool wide = columns == kTileColumns;
  if (scale >= 1) {  // moves no entry to the other side, nor to zero
    (wide ? sign_block<3, false> : sign_block<1, false>)(b, a, rank, columns, scale, bits[0],
                                                         bits[1]);
  } else {
    (wide ? sign_block<3, true> : sign_block<1, true>)(b, a, rank, columns, scale, bits[0],
                                                       bits[1]);
  }
  std::memcpy(negative, bits[0], static_cast<std::size_t>(8 * words));
  std::memcpy(nonzero, bits[1], static_cast<std::size_t>(8 * words));
  return ones(nonzero, words);
}

i64 signs(const float* x, i64 n, float threshold, u64* negative, u64* nonzero, u64* top) {
  const __m512 least = _mm512_set1_ps(threshold);
  for (i64 j = 0; j < n; j += 64) {
    u64 minus = 0, some = 0, high = 0;
    for (int q = 0; q < 4; q++) {
      const vec v = load(x + j + 16 * q);
      const __mmask16 not_zero = alive(v);
      minus |= static_cast<u64>(below(v)) << 16 * q;
      some |= static_cast<u64>(not_zero) << 16 * q;
      high |= static_cast<u64>(_mm512_mask_cmp_ps_mask(not_zero, _mm512_abs_ps((__m512)v), least,
                                                       _CMP_GE_OQ)) << 16 * q;
    }
    negative[j / 64] = minus;
    nonzero[j / 64] = some;
    if (top) top[j / 64] = high;
  }
  return ones(nonzero, n / 64);
}

// Stored and read back, and elsewhere "maskz" with all lanes: GCC 12 warns about its own headers.
MP_INLINE double total(__m512 v) {
  typedef float half __attribute__((vector_size(32)));
  half low, high;
  std::memcpy(&low, &v, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
  const vec_t<double> s =
      __builtin_convertvector(low, vec_t<double>) + __builtin_convertvector(high, vec_t<double>);
  return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

void moments(const float* x, i64 n, float threshold, EntryMoments* out) {
  const __m512 least = _mm512_set1_ps(threshold), zero = _mm512_setzero_ps();
  for (i64 first = 0; first < n; first += kRun) {
    const i64 last = n - first < kRun ? n : first + kRun;
    __m512 l1 = zero, squares = zero, fourths = zero, top_squares = zero;
    i64 some = 0, top = 0;
    for (i64 j = first; j < last; j += 16) {
      const __m512 v = _mm512_loadu_ps(x + j), size = _mm512_abs_ps(v);
      const __m512 square = _mm512_mul_ps(v, v);
      const __mmask16 not_zero = _mm512_cmp_ps_mask(v, zero, _CMP_NEQ_OQ);
      const __mmask16 high = _mm512_mask_cmp_ps_mask(not_zero, size, least, _CMP_GE_OQ);
      l1 = _mm512_add_ps(l1, size);
      squares = _mm512_add_ps(squares, square);
      fourths = _mm512_fmadd_ps(square, square, fourths);
      top_squares = _mm512_mask_add_ps(top_squares, high, top_squares, square);
      some += __builtin_popcount(not_zero);
      top += __builtin_popcount(high);
    }
    out->l1 += total(l1);
    out->squares += total(squares);
    out->fourths += total(fourths);
    out->top_squares += total(top_squares);
    out->zeros -= some;
    out->top += top;
  }
}

template <int C>
void sums_of(const float* x, const float* y, i64 stride, i64 n, const float* ratios, double* out) {
  const __m512 zero = _mm512_setzero_ps();
  for (i64 first = 0; first < n; first += kRun) {
    const i64 last = n - first < kRun ? n : first + kRun;
    __m512 s[C][kEntrySums];
    MP_UNROLL(4)
    for (int c = 0; c < C; c++)
      MP_UNROLL(6)
      for (int f = 0; f < kEntrySums; f++) s[c][f] = zero;
    for (i64 j = first; j < last; j += 16) {
      const __m512 v = _mm512_loadu_ps(x + j), size = _mm512_abs_ps(v);
      MP_UNROLL(4)
      for (int c = 0; c < C; c++) {
        const __m512 w = _mm512_loadu_ps(y + c * stride + j), other = _mm512_abs_ps(w);
        const __m512 product = _mm512_mul_ps(v, w), mass = _mm512_abs_ps(product);
        const __mmask16 conflict = _mm512_cmp_ps_mask(product, zero, _CMP_LT_OQ);
        s[c][0] = _mm512_add_ps(s[c][0], mass);
        s[c][1] = _mm512_mask_add_ps(s[c][1], conflict, s[c][1], mass);
        s[c][2] = _mm512_mask_add_ps(s[c][2], conflict, s[c][2], size);
        s[c][3] = _mm512_mask_add_ps(s[c][3], conflict, s[c][3], other);
        const __m512 same = _mm512_mul_ps(size, _mm512_set1_ps(ratios[c]));
        s[c][4] = _mm512_add_ps(s[c][4], _mm512_maskz_min_ps(conflict, same, other));
        s[c][5] = _mm512_fmadd_ps(mass, mass, s[c][5]);
      }
    }
    for (int c = 0; c < C; c++)
      for (int f = 0; f < kEntrySums; f++) out[c * kEntrySums + f] += total(s[c][f]);
  }
}
#else  // not AVX-512

// Bits of 64 entries, from a condition on one.
template <class Condition>
MP_INLINE u64 word_of(const float* x, const Condition& condition) {
  u64 word = 0;
  for (int e = 0; e < 64; e++) word |= static_cast<u64>(condition(x[e])) << e;
  return word;
}

#if defined(__AVX2__)
template <int kCompare>
MP_INLINE u64 word_where(const float* x, __m256 y, bool magnitudes) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  u64 word = 0;
  for (int q = 0; q < 8; q++) {
    __m256 v = _mm256_loadu_ps(x + 8 * q);
    if (magnitudes) v = _mm256_andnot_ps(sign, v);
    word |= static_cast<u64>(static_cast<unsigned>(_mm256_movemask_ps(
                _mm256_cmp_ps(v, y, kCompare)))) << 8 * q;
  }
  return word;
}
#endif

i64 signs(const float* x, i64 n, float threshold, u64* negative, u64* nonzero, u64* top) {
  i64 some = 0;
  for (i64 j = 0; j < n; j += 64, x += 64) {
#if defined(__AVX2__)
    negative[j / 64] = word_where<_CMP_LT_OQ>(x, _mm256_setzero_ps(), false);
    const u64 alive = word_where<_CMP_NEQ_OQ>(x, _mm256_setzero_ps(), false);
    if (top) top[j / 64] = alive & word_where<_CMP_GE_OQ>(x, _mm256_set1_ps(threshold), true);
#else
    negative[j / 64] = word_of(x, [](float v) { return v < 0; });
    const u64 alive = word_of(x, [](float v) { return v != 0; });
    if (top)
      top[j / 64] =
          alive & word_of(x, [=](float v) { return v >= threshold || -v >= threshold; });
#endif
    nonzero[j / 64] = alive;
    some += ones(alive);
  }
  return some;
}

i64 tile_signs(const float* b, const float* a, i64 rank, float scale, i64 columns, u64* negative,
               u64* nonzero) {
  float x[kTile];
  tile(b, a, rank, scale, columns, x);
  return signs(x, kTileRows * columns, 0.0f, negative, nonzero, nullptr);
}

#if defined(__GNUC__) || defined(__clang__)
MP_INLINE vec where(vec a, vec b, vec x, vec y) { return a > b ? x : y; }
MP_INLINE vec at_least(vec a, vec b, vec x, vec y) { return a >= b ? x : y; }
#else
MP_INLINE vec where(const vec& a, const vec& b, const vec& x, const vec& y) {
  vec r;
  for (int i = 0; i < W; i++) r[i] = a[i] > b[i] ? x[i] : y[i];
  return r;
}
MP_INLINE vec at_least(const vec& a, const vec& b, const vec& x, const vec& y) {
  vec r;
  for (int i = 0; i < W; i++) r[i] = a[i] >= b[i] ? x[i] : y[i];
  return r;
}
#endif
MP_INLINE vec magnitude(vec x) {
  const vec zero = broadcast(0.0f), minus = broadcast(-1.0f);
  return where(zero, x, minus * x, x);
}
MP_INLINE double total(vec v) {
  double sum = 0;
  for (int i = 0; i < W; i++) sum += static_cast<double>(v[i]);
  return sum;
}

void moments(const float* x, i64 n, float threshold, EntryMoments* out) {
  const vec zero = broadcast(0.0f), one = broadcast(1.0f), least = broadcast(threshold);
  for (i64 first = 0; first < n; first += kRun) {
    const i64 last = n - first < kRun ? n : first + kRun;
    vec l1 = zero, squares = zero, fourths = zero, top_squares = zero, some = zero, top = zero;
    for (i64 j = first; j < last; j += W) {
      const vec size = magnitude(load(x + j)), square = size * size;
      const vec alive = where(size, zero, one, zero), high = at_least(size, least, alive, zero);
      l1 = l1 + size;
      squares = squares + square;
      fourths = fourths + square * square;
      top_squares = top_squares + square * high;
      some = some + alive;  // at most kRun: exact
      top = top + high;
    }
    out->l1 += total(l1);
    out->squares += total(squares);
    out->fourths += total(fourths);
    out->top_squares += total(top_squares);
    out->zeros -= static_cast<i64>(total(some));
    out->top += static_cast<i64>(total(top));
  }
}

template <int C>
void sums_of(const float* x, const float* y, i64 stride, i64 n, const float* ratios, double* out) {
  const vec zero = broadcast(0.0f);
  for (int c = 0; c < C; c++, y += stride, out += kEntrySums)
    for (i64 first = 0; first < n; first += kRun) {
      const i64 last = n - first < kRun ? n : first + kRun;
      vec s[kEntrySums];
      for (vec& f : s) f = zero;
      for (i64 j = first; j < last; j += W) {
        const vec v = load(x + j), w = load(y + j), product = v * w, mass = magnitude(product);
        const vec size = magnitude(v), other = magnitude(w);
        s[0] = s[0] + mass;
        s[1] = s[1] + where(zero, product, mass, zero);
        s[2] = s[2] + where(zero, product, size, zero);
        s[3] = s[3] + where(zero, product, other, zero);
        const vec same = size * broadcast(ratios[c]);
        s[4] = s[4] + where(zero, product, where(same, other, other, same), zero);
        s[5] = s[5] + mass * mass;
      }
      for (int f = 0; f < kEntrySums; f++) out[f] += total(s[f]);
    }
}
#endif

void sums(const float* x, const float* y, i64 stride, i64 count, i64 n, const float* ratios,
          double* out) {
  switch (count) {
    case 1: return sums_of<1>(x, y, stride, n, ratios, out);
    case 2: return sums_of<2>(x, y, stride, n, ratios, out);
    case 3: return sums_of<3>(x, y, stride, n, ratios, out);
    case 4: return sums_of<4>(x, y, stride, n, ratios, out);
  }
}

}  // namespace

#define MP_JOIN_(a, b) a##b
#define MP_JOIN(a, b) MP_JOIN_(a, b)

extern const EntryKernels MP_JOIN(entry_kernels_, MP_ISA);
const EntryKernels MP_JOIN(entry_kernels_, MP_ISA) = {
    gather, tile, tile_signs, signs, moments, sums, count_bits<true>, count_bits<false>};

}  // namespace mergeprobe
