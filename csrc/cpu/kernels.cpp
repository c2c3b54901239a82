// The inner kernels, one source for every instruction set. CMake compiles this file once per set
// with MP_ISA naming it. Nothing here may have external linkage except the table: an inline
// function of the standard library instantiated here could be merged with, and replace, the copy
// of a translation unit that must run on older CPUs.
#include "mergeprobe/kernels.hpp"

#include <cmath>
#include <type_traits>

#include "simd.hpp"

namespace mergeprobe {
namespace {

template <class T>
MP_INLINE T least(T a, T b) {
  return a < b ? a : b;
}

// Half a panel against three panels keeps 24 accumulators, 3 loads and a broadcast in AVX-512's 32
// registers, and 12 + 3 + 1 in AVX2's 16.
template <class T>
constexpr int kRows = Lanes<T>::count >= 8 ? 8 / (MP_BYTES == 64 ? 1 : 2) : Lanes<T>::count;
constexpr int kPanels = 3;

// Measured on Zen 5 and Sapphire Rapids: 96 to 192 are within 2%; below, writing C back costs.
template <class T>
constexpr i64 kDepth = 128 * 4 / static_cast<i64>(sizeof(T));

template <class T, int P>
MP_NOINLINE void micro(i64 kc, const T* MP_RESTRICT a, const T* MP_RESTRICT b, i64 panel_stride,
                       T* MP_RESTRICT c, i64 ldc, bool first) {
  constexpr int W = Lanes<T>::count;
  constexpr int R = kRows<T>;
  vec_t<T> acc[R][P];
  MP_UNROLL(8)
  for (int i = 0; i < R; i++)
    MP_UNROLL(3)
    for (int p = 0; p < P; p++) acc[i][p] = broadcast<T>(0);
  for (i64 k = 0; k < kc; k++) {
    vec_t<T> column[P];
    MP_UNROLL(3)
    for (int p = 0; p < P; p++) column[p] = load(b + p * panel_stride);
    MP_UNROLL(8)
    for (int i = 0; i < R; i++) {
      const vec_t<T> x = broadcast(a[i]);
      MP_UNROLL(3)
      for (int p = 0; p < P; p++) acc[i][p] = acc[i][p] + x * column[p];
    }
    a += W;
    b += W;
  }
  MP_UNROLL(8)
  for (int i = 0; i < R; i++)
    MP_UNROLL(3)
    for (int p = 0; p < P; p++) {
      T* q = c + i * ldc + p * W;
      store(q, first ? acc[i][p] : load(q) + acc[i][p]);
    }
}

template <class T>
void multiply(const T* a, i64 a_panels, const T* b, i64 b_panels, i64 depth, T* c, i64 ldc,
              bool upper, bool accumulate) {
  constexpr int W = Lanes<T>::count;
  constexpr i64 line = 64 / static_cast<i64>(sizeof(T));
  if (a_panels == 0 || b_panels == 0) return;
  const i64 calls = a_panels * ((b_panels + kPanels - 1) / kPanels);
  for (i64 k0 = 0; k0 < depth; k0 += kDepth<T>) {
    const i64 kc = least(kDepth<T>, depth - k0);
    const T* ak = a + k0 * a_panels * W;
    const T* bk = b + k0 * b_panels * W;
    const i64 stride = kc * W;
    // The next k-block is fetched a few lines per micro-kernel call, so that it is in L2 in time.
    const i64 next = least(kDepth<T>, depth - k0 - kc);
    const T* fetch_a = ak + kc * a_panels * W;
    const T* fetch_b = bk + kc * b_panels * W;
    const i64 lines_a = (next * a_panels * W / line + calls - 1) / calls;
    const i64 lines_b = upper ? 0 : (next * b_panels * W / line + calls - 1) / calls;
    const bool first = k0 == 0 && !accumulate;
    for (i64 j0 = 0; j0 < b_panels; j0 += kPanels) {
      const i64 j1 = least(b_panels, j0 + kPanels);
      for (i64 i = 0; i < a_panels; i++) {
        const i64 js = upper && i > j0 ? i : j0;
        if (js >= j1) break;
        for (i64 q = 0; q < lines_a; q++, fetch_a += line) MP_PREFETCH(fetch_a);
        for (i64 q = 0; q < lines_b; q++, fetch_b += line) MP_PREFETCH(fetch_b);
        for (int h = 0; h < W; h += kRows<T>) {
          const T* ap = ak + i * stride + h;
          const T* bp = bk + js * stride;
          T* cp = c + (i * W + h) * ldc + js * W;
          if (j1 - js == 3) {
            micro<T, 3>(kc, ap, bp, stride, cp, ldc, first);
          } else if (j1 - js == 2) {
            micro<T, 2>(kc, ap, bp, stride, cp, ldc, first);
          } else {
            micro<T, 1>(kc, ap, bp, stride, cp, ldc, first);
          }
        }
      }
    }
  }
}

template <class T, class S>
MP_INLINE const S* element(const RowRef& row, i64 k) {
  return static_cast<const S*>(row.data) + k * row.col_stride;
}

// W neighbours, widened. Spelled out for the common types: from the plain loop GCC 12 makes W scalar
// loads and inserts, a third of the time of a pass over few adapters.
template <class T, class S>
MP_INLINE vec_t<T> load_wide(const S* s) {
  if constexpr (std::is_same<S, T>::value) {
    return load(s);
#if defined(__GNUC__) || defined(__clang__)
  } else if constexpr (std::is_same<S, bf16>::value && std::is_same<T, float>::value) {
    typedef std::uint16_t half __attribute__((vector_size(MP_BYTES / 2)));
    typedef std::uint32_t full __attribute__((vector_size(MP_BYTES)));
    half bits;
    std::memcpy(&bits, s, sizeof bits);
    const full shifted = __builtin_convertvector(bits, full) << 16;
    vec_t<T> v;
    std::memcpy(&v, &shifted, sizeof v);
    return v;
  } else if constexpr (std::is_same<S, float>::value && std::is_same<T, double>::value) {
    typedef float narrow __attribute__((vector_size(MP_BYTES / 2)));
    narrow v;
    std::memcpy(&v, s, sizeof v);
    return __builtin_convertvector(v, vec_t<T>);
#endif
  } else {
    constexpr int W = Lanes<T>::count;
    T wide[W];
    for (int q = 0; q < W; q++) wide[q] = static_cast<T>(widen(s[q]));
    return load(wide);
  }
}

// Rows that run along memory (A): squares of W x W are transposed in registers.
template <class T, class S>
void pack_rows(const RowRef* rows, i64 n, i64 k0, i64 kc, T* MP_RESTRICT dst) {
  constexpr int W = Lanes<T>::count;
  const S* source[W];
  for (i64 i = 0; i < n; i++) source[i] = element<T, S>(rows[i], k0);
  i64 k = 0;
  for (; k + W <= kc; k += W) {
    vec_t<T> square[W];
    for (int i = 0; i < W; i++) {
      if (i < n) {
        square[i] = load_wide<T>(source[i] + k);
      } else {
        square[i] = broadcast<T>(0);
      }
    }
    transpose<T>(square);
    for (int q = 0; q < W; q++) store(dst + (k + q) * W, square[q]);
  }
  for (; k < kc; k++)
    for (int i = 0; i < W; i++)
      dst[k * W + i] = i < n ? static_cast<T>(widen(source[i][k])) : T(0);
}

template <int N, class T, class S>
MP_INLINE void copy_columns(const S* s, i64 stride, i64 kc, T* MP_RESTRICT dst) {
  constexpr int W = Lanes<T>::count;
  for (i64 k = 0; k < kc; k++)
    for (int i = 0; i < N; i++) dst[k * W + i] = static_cast<T>(widen(s[k * stride + i]));
}

// Rows that lie side by side (B transposed): each k is one short copy.
template <class T, class S>
void pack_columns(const RowRef* rows, i64 n, i64 lane, i64 k0, i64 kc, T* MP_RESTRICT dst) {
  constexpr int W = Lanes<T>::count;
  const S* s = element<T, S>(rows[0], k0);
  const i64 stride = rows[0].col_stride;
  dst += lane;
  if (n == W) return copy_columns<W>(s, stride, kc, dst);
  if (n == W / 2) return copy_columns<W / 2>(s, stride, kc, dst);
  for (i64 k = 0; k < kc; k++)
    for (i64 i = 0; i < n; i++) dst[k * W + i] = static_cast<T>(widen(s[k * stride + i]));
}

template <class T, class S>
void pack_as(const RowRef* rows, i64 n, i64 lane, i64 k0, i64 kc, T* dst, bool whole) {
  if (whole && rows[0].col_stride == 1) return pack_rows<T, S>(rows, n, k0, kc, dst);
  pack_columns<T, S>(rows, n, lane, k0, kc, dst);
}

template <class T>
void pack_panel(const RowRef* rows, i64 n_rows, i64 k0, i64 kc, T* dst) {
  constexpr int W = Lanes<T>::count;
  bool along = n_rows > 0;
  for (i64 i = 0; i < n_rows; i++)
    along = along && rows[i].col_stride == 1 && rows[i].dtype == rows[0].dtype;
  auto dispatch = [&](const RowRef* r, i64 n, i64 lane, bool whole) {
    switch (r->dtype) {
      case Dtype::f32: return pack_as<T, float>(r, n, lane, k0, kc, dst, whole);
      case Dtype::bf16: return pack_as<T, bf16>(r, n, lane, k0, kc, dst, whole);
      case Dtype::f16: return pack_as<T, f16>(r, n, lane, k0, kc, dst, whole);
      case Dtype::f64: return pack_as<T, double>(r, n, lane, k0, kc, dst, whole);
    }
  };
  if (along) return dispatch(rows, n_rows, 0, true);
  for (i64 i = 0; i < n_rows;) {  // runs of rows that are neighbours in memory
    i64 end = i + 1;
    while (end < n_rows && rows[end].dtype == rows[i].dtype &&
           rows[end].col_stride == rows[i].col_stride &&
           static_cast<const char*>(rows[end].data) ==
               static_cast<const char*>(rows[i].data) + (end - i) * itemsize(rows[i].dtype))
      end++;
    dispatch(rows + i, end - i, i, false);
    i = end;
  }
  if (n_rows < W)
    for (i64 k = 0; k < kc; k++)
      for (i64 i = n_rows; i < W; i++) dst[k * W + i] = T(0);
}

template <class T, Product X>
void reduce_as(const T* m, const T* n, i64 ld, i64 rows, i64 columns, const T* weight, T* out) {
  constexpr int W = Lanes<T>::count;
  for (i64 c = 0; c < columns; c += W) {
    vec_t<T> sum = broadcast<T>(0);
    for (i64 a = 0; a < rows; a++) {
      const vec_t<T> x = X == Product::vv ? load(n + a * ld + c) : load(m + a * ld + c);
      const vec_t<T> y = X == Product::uu ? x : load(n + a * ld + c);
      sum = sum + broadcast(weight[a]) * (x * y);
    }
    store(out + c, sum);
  }
}

template <class T>
void reduce_rows(Product product, const T* m, const T* n, i64 ld, i64 rows, i64 columns,
                 const T* weight, T* out) {
  switch (product) {
    case Product::uv: return reduce_as<T, Product::uv>(m, n, ld, rows, columns, weight, out);
    case Product::uu: return reduce_as<T, Product::uu>(m, n, ld, rows, columns, weight, out);
    case Product::vv: return reduce_as<T, Product::vv>(m, n, ld, rows, columns, weight, out);
  }
}

// Eight partial sums: enough to hide latency, and the same order on every run.
MP_INLINE double dot(const double* a, const double* b, i64 n) {
  double s[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  i64 i = 0;
  for (; i + 8 <= n; i += 8)
    for (int q = 0; q < 8; q++) s[q] += a[i + q] * b[i + q];
  for (; i < n; i++) s[0] += a[i] * b[i];
  return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

MP_INLINE void rotate(double* MP_RESTRICT a, double* MP_RESTRICT b, i64 n, double c, double s) {
  for (i64 i = 0; i < n; i++) {
    const double x = a[i], y = b[i];
    a[i] = c * x - s * y;
    b[i] = s * x + c * y;
  }
}

// Cyclic one-sided Jacobi (Hestenes): high relative accuracy, also for graded columns.
int jacobi_svd(double* work, i64 m, i64 n, double* v) {
  constexpr double eps = 2.220446049250313e-16;
  constexpr int max_sweeps = 60;
  for (i64 j = 0; j < n; j++)
    for (i64 i = 0; i < n; i++) v[j * n + i] = i == j ? 1.0 : 0.0;
  const double tolerance = eps * std::sqrt(static_cast<double>(m));
  double total = 0;
  for (i64 j = 0; j < n; j++) total += dot(work + j * m, work + j * m, m);
  // Columns of pure rounding never become orthogonal to their own rounding.
  const double rounding = eps * eps * total;
  for (int sweep = 1; sweep <= max_sweeps; sweep++) {
    bool rotated = false;
    for (i64 p = 0; p + 1 < n; p++) {
      for (i64 q = p + 1; q < n; q++) {
        double* x = work + p * m;
        double* y = work + q * m;
        const double alpha = dot(x, x, m), beta = dot(y, y, m), gamma = dot(x, y, m);
        if (!(least(alpha, beta) > rounding)) continue;
        if (!(std::fabs(gamma) > tolerance * std::sqrt(alpha) * std::sqrt(beta))) continue;
        rotated = true;
        const double zeta = (beta - alpha) / (2.0 * gamma);
        const double t =
            (zeta >= 0 ? 1.0 : -1.0) / (std::fabs(zeta) + std::sqrt(1.0 + zeta * zeta));
        const double c = 1.0 / std::sqrt(1.0 + t * t), s = c * t;
        rotate(x, y, m, c, s);
        rotate(v + p * n, v + q * n, n, c, s);
      }
    }
    if (!rotated) return sweep;
  }
  return -1;
}

template <class T>
constexpr GemmKernels<T> gemm_kernels() {
  return {Lanes<T>::count, kDepth<T>, pack_panel<T>, multiply<T>, reduce_rows<T>};
}

}  // namespace

#define MP_JOIN_(a, b) a##b
#define MP_JOIN(a, b) MP_JOIN_(a, b)
#define MP_TEXT_(x) #x
#define MP_TEXT(x) MP_TEXT_(x)

extern const TileKernels MP_JOIN(tile_kernels_, MP_ISA);
extern const SetKernels MP_JOIN(set_kernels_, MP_ISA);
extern const AngleKernels MP_JOIN(angle_kernels_, MP_ISA);
extern const EntryKernels MP_JOIN(entry_kernels_, MP_ISA);
extern const Kernels MP_JOIN(kernels_, MP_ISA);
const Kernels MP_JOIN(kernels_, MP_ISA) = {MP_TEXT(MP_ISA), gemm_kernels<float>(),
                                           gemm_kernels<double>(), jacobi_svd,
                                           &MP_JOIN(tile_kernels_, MP_ISA),
                                           &MP_JOIN(set_kernels_, MP_ISA),
                                           &MP_JOIN(angle_kernels_, MP_ISA),
                                           &MP_JOIN(entry_kernels_, MP_ISA)};

}  // namespace mergeprobe
