// Spectra of small matrices, one in each lane. Compiled once per instruction set like kernels.cpp;
// nothing here may have external linkage except the table.
//
// Singular values come from the symmetric eigenvalues of X^T X in float64: tridiagonal by
// Householder reflections, then QL with explicit shifts. That costs a fifth of Jacobi's method and
// gives squares to 1e-15 of the largest: cosines, and sines of the same angles, to 3e-8.
#include "mergeprobe/angles.hpp"

#include "small_eigen.hpp"

namespace mergeprobe {
namespace {

// Squared sine below which a direction of U2 is one of U1.
constexpr double kDependent = 1e-14;

// X^T X of x (m x n), made tridiagonal; its off-diagonal goes to the first n vectors of scratch.
MP_INLINE void square(i64 m, i64 n, const View& x, double* scratch, double* values) {
  double *const v = scratch + n * W, *const w = v + n * W, *const a = w + n * W;
  const View turned{x.data, x.col, x.row};
  product<true>(n, n, m, turned, x, [&](i64 i, i64 j, const V& sum) { put(a, i * n + j, sum); });
  tridiagonal<false>(n, a, values, scratch, v, w, nullptr, 0, 0);
}

void squares(i64 rows, i64 columns, i64 groups, const double* x, double* scratch, double* values) {
  const bool tall = columns <= rows;
  const i64 n = tall ? columns : rows, m = rows + columns - n;
  double *d[kAngleGroups], *e[kAngleGroups];
  for (i64 g = 0; g < groups; g++) {
    d[g] = values + g * n * W;
    e[g] = scratch + g * n * W;
    const double* const own = x + g * m * n * W;
    square(m, n, tall ? View{own, columns, 1} : View{own, 1, columns}, e[g], d[g]);
  }
  i64 g = 0;
  for (; g + 4 <= groups; g += 4) eigenvalues<4>(n, d + g, e + g);
  for (; g < groups; g++) eigenvalues<1>(n, d + g, e + g);
  for (g = 0; g < groups; g++) sort(n, d[g]);
}

template <class T>
void pack(const T* const* from, i64 count, double* to, double* top) {
  V largest = constant(0);
  i64 i = 0;
  for (; i + W <= count; i += W) {
    V x[W];
    for (i64 l = 0; l < W; l++) {
      double wide[W];
      for (i64 j = 0; j < W; j++) wide[j] = static_cast<double>(from[l][i + j]);
      x[l] = load(wide);
    }
    transpose<double>(x);
    for (i64 j = 0; j < W; j++) {
      largest = larger(largest, absolute(x[j]));
      put(to, i + j, x[j]);
    }
  }
  for (; i < count; i++) {
    V x;
    for (i64 l = 0; l < W; l++) x[l] = static_cast<double>(from[l][i]);
    largest = larger(largest, absolute(x));
    put(to, i, x);
  }
  put(top, 0, largest);
  const V scale = above(largest, constant(kTiny), constant(1) / largest, constant(0));
  for (i = 0; i < count; i++) put(to, i, get(to, i) * scale);
}

// Columns this far apart do not share cache sets.
MP_INLINE i64 odd(i64 k) { return k | 1; }

i64 scratch(i64 k1, i64 k2) {
  const i64 k = k1 + k2;
  return (k * k + k * odd(k) + k1 * k + k2 * k2 + k1 * k2 + 4 * k) * W;
}

// x -= (e1 x + x e2) / 2: cosines of exactly orthonormal vectors, to first order.
void correct(i64 k1, i64 k2, const double* e1, const double* e2, double* x, double* copy) {
  for (i64 i = 0; i < k1 * k2; i++) put(copy, i, get(x, i));
  const V half = constant(0.5);
  auto take = [&](i64 i, i64 j, const V& sum) {
    put(x, i * k2 + j, get(x, i * k2 + j) - half * sum);
  };
  product<false>(k1, k2, k1, {e1, k1, 1}, {copy, k2, 1}, take);
  product<false>(k1, k2, k2, {copy, k2, 1}, {e2, k2, 1}, take);
}

// Squares of the singular values of both matrices of cosines, and sums of those of the same with
// singular values as weights, diag(s1) X diag(s2).
void spectra(const AngleLanes& g, double* scratch, const AngleResults& out) {
  const i64 k1 = g.k1, k2 = g.k2, n = least(k1, k2), m = k1 + k2 - n;
  auto tall = [&](const double* x) { return k2 <= k1 ? View{x, k2, 1} : View{x, 1, k2}; };
  double* const y = scratch;
  double* const values[2] = {y + k1 * k2 * W, y + (k1 * k2 + n) * W};
  double* const rest = values[1] + n * W;
  double* const d[4] = {out.row, out.col, values[0], values[1]};
  // In the order of their making: `square` uses what lies behind.
  double* const e[4] = {rest, rest + 2 * n * W, rest + n * W, rest + 3 * n * W};
  for (int i = 0; i < 2; i++) {
    const double* const x = i == 0 ? g.n : g.m;
    square(m, n, tall(x), e[i], d[i]);
    for (i64 a = 0; a < k1; a++)
      for (i64 b = 0; b < k2; b++)
        put(y, a * k2 + b, get(x, a * k2 + b) * get(g.s1, a) * get(g.s2, b));
    square(m, n, tall(y), e[2 + i], d[2 + i]);
  }
  eigenvalues<4>(n, d, e);
  sort(n, out.row);
  sort(n, out.col);
  for (int side = 0; side < 2; side++) {
    V sum = constant(0);
    for (i64 i = 0; i < n; i++) sum = sum + root(larger(get(values[side], i), constant(0)));
    put(out.sums, side * kPerSide + kAligned, sum);
  }
}

// Sums over the entries of the cosines, and over those of U2^T W1 V2 and U1^T W2 V1.
void sums(const AngleLanes& g, double* scratch, double* out) {
  const i64 k1 = g.k1, k2 = g.k2;
  const V zero = constant(0);
  V dot = zero, row1 = zero, row2 = zero, col1 = zero, col2 = zero;
  for (i64 a = 0; a < k1; a++) {
    const V s = get(g.s1, a);
    V plain_row = zero, plain_col = zero;
    for (i64 b = 0; b < k2; b++) {
      const V m = get(g.m, a * k2 + b), n = get(g.n, a * k2 + b), t = get(g.s2, b);
      const V mm = m * m, nn = n * n, tt = t * t;
      dot = dot + s * t * m * n;
      plain_row = plain_row + nn;
      plain_col = plain_col + mm;
      row2 = row2 + tt * nn;
      col2 = col2 + tt * mm;
    }
    row1 = row1 + s * s * plain_row;
    col1 = col1 + s * s * plain_col;
  }
  put(out, kDot, dot);
  put(out, kRow1, row1);
  put(out, kRow2, row2);
  put(out, kCol1, col1);
  put(out, kCol2, col2);
  V square, entries;
  auto take = [&](i64, i64, const V& x) {
    square = square + x * x;
    entries = entries + absolute(x);
  };
  square = entries = zero;
  for (i64 a = 0; a < k1; a++)
    for (i64 b = 0; b < k2; b++) put(scratch, a * k2 + b, get(g.n, a * k2 + b) * get(g.s1, a));
  product<false>(k2, k2, k1, {g.m, 1, k2}, {scratch, k2, 1}, take);
  put(out, kBoth1, square);
  put(out, kEntries1, entries);
  square = entries = zero;
  for (i64 a = 0; a < k1; a++)
    for (i64 b = 0; b < k2; b++) put(scratch, a * k2 + b, get(g.n, a * k2 + b) * get(g.s2, b));
  product<false>(k1, k1, k2, {g.m, k2, 1}, {scratch, 1, k2}, take);
  put(out, kBoth2, square);
  put(out, kEntries2, entries);
}

// With Q orthonormal and spanning U1 and U2, U1 = Q [1 0]^T and U2 = Q [M^T L]^T, where
// L L^T = 1 - M^T M: F = [S1 0; S2 M^T, S2 L] has F^T [1 N; N^T 1] F = (W1 + W2) (W1 + W2)^T in
// that basis. Its eigenvectors, applied to F, leave ||u^T W1||^2 and ||u^T W2||^2 in the columns.
void merged(const AngleLanes& g, double* scratch, const AngleResults& out) {
  const i64 k1 = g.k1, k2 = g.k2, k = k1 + k2, ld = odd(k);
  const V zero = constant(0), one = constant(1), dependent = constant(kDependent);
  double* const t = scratch;            // k x k
  double* const f = t + k * k * W;      // k columns of length k, `ld` apart
  double* const cross = f + k * ld * W;  // S1 N F2, k1 x k
  double* const l = cross + k1 * k * W;  // k2 x k2
  double* const rest = l + k2 * k2 * W;
  product<true>(k2, k2, k1, {g.m, 1, k2}, {g.m, k2, 1}, [&](i64 i, i64 j, const V& sum) {
    put(l, i * k2 + j, (i == j ? one : zero) - sum);
  });
  for (i64 j = 0; j < k2; j++) {
    V pivot = get(l, j * k2 + j);
    for (i64 q = 0; q < j; q++) pivot = pivot - get(l, j * k2 + q) * get(l, j * k2 + q);
    const V length = root(larger(pivot, dependent));
    const V inverse = above(pivot, dependent, one / length, zero);
    put(l, j * k2 + j, above(pivot, dependent, length, zero));
    for (i64 i = j + 1; i < k2; i++) {
      V x = get(l, i * k2 + j);
      for (i64 q = 0; q < j; q++) x = x - get(l, i * k2 + q) * get(l, j * k2 + q);
      put(l, i * k2 + j, x * inverse);
    }
  }
  for (i64 c = 0; c < k; c++) {
    double* const column = f + c * ld * W;
    for (i64 a = 0; a < k1; a++) put(column, a, a == c ? get(g.s1, a) : zero);
    for (i64 b = 0; b < k2; b++) {
      const V x = c < k1 ? get(g.m, c * k2 + b) : b >= c - k1 ? get(l, b * k2 + c - k1) : zero;
      put(column, k1 + b, x * get(g.s2, b));
    }
  }
  const View lower_rows{f + k1 * W, 1, ld}, turned{f + k1 * W, ld, 1};
  product<true>(k, k, k2, turned, lower_rows,
                [&](i64 i, i64 j, const V& sum) { put(t, i * k + j, sum); });
  product<false>(k1, k, k2, {g.n, k2, 1}, lower_rows, [&](i64 a, i64 c, const V& sum) {
    put(cross, a * k + c, sum * get(g.s1, a));
  });
  for (i64 a = 0; a < k1; a++) {
    put(t, a * k + a, get(t, a * k + a) + get(g.s1, a) * get(g.s1, a));
    for (i64 c = 0; c <= a; c++)  // rows a of the lower triangle, from above ...
      put(t, a * k + c, get(t, a * k + c) + get(cross, a * k + c));
    for (i64 c = a; c < k; c++)  // ... and columns a from its transpose
      put(t, c * k + a, get(t, c * k + a) + get(cross, a * k + c));
  }
  tridiagonal<true>(k, t, out.merged, rest, rest + k * W, rest + 2 * k * W, f, k, ld);
  eigenvectors(k, out.merged, rest, rest + k * W, f, k, ld);
  for (i64 c = 0; c < k; c++) {
    V first = zero, second = zero;
    for (i64 a = 0; a < k; a++) {
      const V x = get(f, c * ld + a);
      (a < k1 ? first : second) = (a < k1 ? first : second) + x * x;
    }
    put(out.energy1, c, first);
    put(out.energy2, c, second);
  }
}

void pairs(const AngleLanes& g, const AngleResults& out) {
  if (g.u1) correct(g.k1, g.k2, g.u1, g.u2, g.m, g.scratch);
  if (g.v1) correct(g.k1, g.k2, g.v1, g.v2, g.n, g.scratch);
  spectra(g, g.scratch, out);
  sums(g, g.scratch, out.sums);
  merged(g, g.scratch, out);
}

}  // namespace

#define MP_JOIN_(a, b) a##b
#define MP_JOIN(a, b) MP_JOIN_(a, b)

extern const AngleKernels MP_JOIN(angle_kernels_, MP_ISA);
const AngleKernels MP_JOIN(angle_kernels_, MP_ISA) = {W, scratch, pairs, pack<float>,
                                                          pack<double>, squares};

}  // namespace mergeprobe
