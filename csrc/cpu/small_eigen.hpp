// Products and symmetric eigenproblems of small matrices of float64, one in each lane: entries lie
// `W` values apart. For kernel files only, which are compiled once per instruction set.
#pragma once
#include <cmath>

#include "lanes.hpp"

namespace mergeprobe {
namespace {

constexpr double kEps = 2.220446049250313e-16;
constexpr double kTiny = 1e-290;
constexpr int kIterations = 60;     // of QL an eigenvalue; 1 to 4 are usual

MP_INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }

// A matrix of vectors: entry (i, j) at data[(i * row + j * col) * W].
struct View {
  const double* data;
  i64 row, col;
};

template <int R, int C>
MP_INLINE void product_block(i64 depth, const View& a, i64 i, const View& b, i64 j,
                             V (&sum)[R][C]) {
  MP_UNROLL(4)
  for (int r = 0; r < R; r++)
    MP_UNROLL(4)
    for (int c = 0; c < C; c++) sum[r][c] = constant(0);
  const double* pa = a.data + i * a.row * W;
  const double* pb = b.data + j * b.col * W;
  for (i64 k = 0; k < depth; k++, pa += a.col * W, pb += b.row * W) {
    V x[R], y[C];
    MP_UNROLL(4)
    for (int r = 0; r < R; r++) x[r] = get(pa, r * a.row);
    MP_UNROLL(4)
    for (int c = 0; c < C; c++) y[c] = get(pb, c * b.col);
    MP_UNROLL(4)
    for (int r = 0; r < R; r++)
      MP_UNROLL(4)
      for (int c = 0; c < C; c++) sum[r][c] = sum[r][c] + x[r] * y[c];
  }
}

// Hands every block of rows x columns of A B to `sink(i, j, sum)`; `lower`: those that reach the
// diagonal or lie below it.
template <bool lower, class Sink>
MP_INLINE void product(i64 rows, i64 columns, i64 depth, const View& a, const View& b,
                       const Sink& sink) {
  i64 i = 0;
  for (; i + 4 <= rows; i += 4) {
    i64 j = 0;
    for (; j + 4 <= columns && !(lower && j > i + 3); j += 4) {
      V sum[4][4];
      product_block<4, 4>(depth, a, i, b, j, sum);
      for (int r = 0; r < 4; r++)
        for (int c = 0; c < 4; c++) sink(i + r, j + c, sum[r][c]);
    }
    for (; j < columns && !(lower && j > i + 3); j++) {
      V sum[4][1];
      product_block<4, 1>(depth, a, i, b, j, sum);
      for (int r = 0; r < 4; r++) sink(i + r, j, sum[r][0]);
    }
  }
  for (; i < rows; i++)
    for (i64 j = 0; j < columns && !(lower && j > i); j++) {
      V sum[1][1];
      product_block<1, 1>(depth, a, i, b, j, sum);
      sink(i, j, sum[0][0]);
    }
}

// R rows of F H, H = 1 - tau v v^T on columns k + 1 and on.
template <int R>
MP_INLINE void reflect(i64 n, i64 k, double* f, i64 ld, const double* v, const V& tau) {
  V sum[R];
  MP_UNROLL(4)
  for (int r = 0; r < R; r++) sum[r] = constant(0);
  for (i64 j = k + 1; j < n; j++)
    MP_UNROLL(4)
    for (int r = 0; r < R; r++) sum[r] = sum[r] + get(f, j * ld + r) * get(v, j);
  MP_UNROLL(4)
  for (int r = 0; r < R; r++) sum[r] = tau * sum[r];
  for (i64 j = k + 1; j < n; j++)
    MP_UNROLL(4)
    for (int r = 0; r < R; r++) put(f, j * ld + r, get(f, j * ld + r) - sum[r] * get(v, j));
}

// Householder: the lower triangle of a (n x n, overwritten) becomes diagonal d and off-diagonal e.
// The reflections are applied to the n columns of f, `rows` long and `ld` apart, too.
template <bool vectors>
MP_NOINLINE void tridiagonal(i64 n, double* a, double* d, double* e, double* v, double* w,
                             double* f, i64 rows, i64 ld) {
  const V zero = constant(0), one = constant(1);
  for (i64 k = 0; k + 1 < n; k++) {
    const V alpha = get(a, (k + 1) * n + k);
    V tail = zero;
    for (i64 i = k + 2; i < n; i++) tail = tail + get(a, i * n + k) * get(a, i * n + k);
    const V none = constant(kTiny), length = root(alpha * alpha + tail);
    const V beta = above(tail, none, above(alpha, zero, zero - length, length), alpha);
    put(d, k, get(a, k * n + k));
    put(e, k, beta);
    if (!any_above(tail, none)) continue;
    const V scale = above(tail, none, one / above(tail, none, alpha - beta, one), zero);
    const V tau = above(tail, none, (beta - alpha) / above(tail, none, beta, one), zero);
    put(v, k + 1, one);
    for (i64 i = k + 2; i < n; i++) put(v, i, get(a, i * n + k) * scale);
    // w = tau A v, from the lower triangle; two rows at a time share what they add to w above.
    V dot = zero;
    i64 i = k + 1;
    for (; i + 1 < n; i += 2) {
      const double *first = a + i * n * W, *second = first + n * W;
      const V x = get(v, i), y = get(v, i + 1), corner = get(second, i);
      V p = get(first, i) * x + corner * y, q = corner * x + get(second, i + 1) * y;
      for (i64 j = k + 1; j < i; j++) {
        const V s = get(first, j), t = get(second, j), z = get(v, j);
        p = p + s * z;
        q = q + t * z;
        put(w, j, get(w, j) + s * x + t * y);
      }
      put(w, i, p);
      put(w, i + 1, q);
    }
    if (i < n) {
      const double* last = a + i * n * W;
      const V x = get(v, i);
      V p = get(last, i) * x;
      for (i64 j = k + 1; j < i; j++) {
        p = p + get(last, j) * get(v, j);
        put(w, j, get(w, j) + get(last, j) * x);
      }
      put(w, i, p);
    }
    for (i64 j = k + 1; j < n; j++) dot = dot + get(w, j) * get(v, j);
    const V half = constant(0.5) * tau * tau * dot;
    for (i64 j = k + 1; j < n; j++) put(w, j, tau * get(w, j) - half * get(v, j));
    for (i = k + 1; i + 1 < n; i += 2) {
      double *first = a + i * n * W, *second = first + n * W;
      const V x = get(v, i), y = get(v, i + 1), p = get(w, i), q = get(w, i + 1);
      for (i64 j = k + 1; j <= i; j++) {
        const V s = get(v, j), t = get(w, j);
        put(first, j, get(first, j) - x * t - p * s);
        put(second, j, get(second, j) - y * t - q * s);
      }
      put(second, i + 1, get(second, i + 1) - constant(2) * y * q);
    }
    if (i < n) {
      double* last = a + i * n * W;
      const V x = get(v, i), p = get(w, i);
      for (i64 j = k + 1; j <= i; j++) put(last, j, get(last, j) - x * get(w, j) - p * get(v, j));
    }
    if constexpr (vectors) {
      i64 r = 0;
      for (; r + 4 <= rows; r += 4) reflect<4>(n, k, f + r * W, ld, v, tau);
      for (; r < rows; r++) reflect<1>(n, k, f + r * W, ld, v, tau);
    }
  }
  put(d, n - 1, get(a, n * n - 1));
  put(e, n - 1, zero);
}

// One step of QL with explicit shifts, from row `i + 1` to row `i` of a tridiagonal matrix. A lane
// that has converged stays as it is, and a zero off the diagonal starts the sweep afresh there, so
// that all lanes can go together.
struct Sweep {
  V active, done, shift, c, s, pi;
};

MP_INLINE void measure(Sweep& q, const double* d, const double* e, i64 n) {
  V size = constant(1e-134);
  for (i64 i = 0; i < n; i++) size = larger(size, larger(absolute(get(d, i)), absolute(get(e, i))));
  q.done = constant(kEps) * size;
}
// Begins at row `end`; false when every lane has converged at row `l`.
MP_INLINE bool begin(Sweep& q, const double* d, const double* e, i64 l, i64 end) {
  const V zero = constant(0), one = constant(1), el = get(e, l);
  q.active = absolute(el);
  const V safe = above(q.active, q.done, el, one);
  const V ratio = (get(d, l + 1) - get(d, l)) / (constant(2) * safe);
  const V hypotenuse = root(ratio * ratio + one);
  q.shift = get(d, l) - safe / (ratio + above(zero, ratio, zero - hypotenuse, hypotenuse));
  q.c = one;
  q.s = zero;
  q.pi = get(d, end) - q.shift;
  return any_above(q.active, q.done);
}
MP_INLINE void step(Sweep& q, double* d, double* e, i64 i, i64 end) {
  const V tiny = constant(kTiny), ei = get(e, i), alpha = get(d, i) - q.shift;
  const V length = root(q.pi * q.pi + ei * ei), inverse = constant(1) / larger(length, tiny);
  const V c = above(length, tiny, q.pi * inverse, constant(1));
  const V s = above(length, tiny, ei * inverse, constant(0)), gamma = q.c * q.pi;
  if (i + 1 < end) put(e, i + 1, above(q.active, q.done, q.s * length, get(e, i + 1)));
  q.pi = c * alpha - s * q.c * ei;
  put(d, i + 1,
      above(q.active, q.done, q.shift + gamma + (alpha - c * q.pi), get(d, i + 1)));
  q.c = c;
  q.s = s;
}
MP_INLINE void finish(const Sweep& q, double* d, double* e, i64 l) {
  put(e, l, above(q.active, q.done, q.s * q.pi, get(e, l)));
  put(d, l, above(q.active, q.done, q.shift + q.c * q.pi, get(d, l)));
}

// The last row that some lane still couples to those above.
MP_INLINE i64 last_coupled(const double* e, const V& done, i64 l, i64 end) {
  while (end > l + 1 && !any_above(absolute(get(e, end - 1)), done)) end--;
  return end;
}

// Eigenvalues of G tridiagonal matrices (d[g], e[g]) in turn: a step waits for its own root and
// quotient, and the others fill the time.
template <int G>
MP_NOINLINE void eigenvalues(i64 n, double* const* d, double* const* e) {
  Sweep sweep[G];
  for (int g = 0; g < G; g++) measure(sweep[g], d[g], e[g], n);
  for (i64 l = 0; l + 1 < n; l++) {
    i64 end = n - 1;
    for (int iteration = 0; iteration < kIterations; iteration++) {
      bool any = false;
      i64 last = l + 1;
      // One for all: a sweep from further above may couple rows again that had come apart.
      for (int g = 0; g < G; g++) {
        const i64 own = last_coupled(e[g], sweep[g].done, l, end);
        last = own > last ? own : last;
      }
      end = last;
      MP_UNROLL(4)
      for (int g = 0; g < G; g++) any |= begin(sweep[g], d[g], e[g], l, last);
      if (!any) break;
      for (i64 i = last - 1; i >= l; i--)
        MP_UNROLL(4)
        for (int g = 0; g < G; g++) step(sweep[g], d[g], e[g], i, last);
      for (int g = 0; g < G; g++) finish(sweep[g], d[g], e[g], l);
    }
  }
}

// Into descending order, lane by lane.
MP_INLINE void sort(i64 n, double* values) {
  for (i64 round = 0; round < n; round++)
    for (i64 i = round % 2; i + 1 < n; i += 2) {
      const V x = get(values, i), y = get(values, i + 1);
      put(values, i, above(x, y, x, y));
      put(values, i + 1, above(x, y, y, x));
    }
}

// R rows through the rotations of a sweep, (c, s) of columns i and i + 1 for i from `end` - 1 to l.
template <int R>
MP_INLINE void rotate(i64 l, i64 end, const double* c, const double* s, double* f, i64 ld) {
  V high[R];
  MP_UNROLL(4)
  for (int r = 0; r < R; r++) high[r] = get(f, end * ld + r);
  for (i64 i = end - 1; i >= l; i--) {
    const V cosine = get(c, i), sine = get(s, i);
    MP_UNROLL(4)
    for (int r = 0; r < R; r++) {
      const V low = get(f, i * ld + r);
      put(f, (i + 1) * ld + r, sine * low + cosine * high[r]);
      high[r] = cosine * low - sine * high[r];
    }
  }
  MP_UNROLL(4)
  for (int r = 0; r < R; r++) put(f, l * ld + r, high[r]);
}

// The same of one matrix, with the rotations applied to the n columns of f. `turns`: 2n vectors.
MP_NOINLINE void eigenvectors(i64 n, double* d, double* e, double* turns, double* f, i64 rows,
                              i64 ld) {
  double *const c = turns, *const s = turns + n * W;
  Sweep sweep;
  measure(sweep, d, e, n);
  for (i64 l = 0; l + 1 < n; l++) {
    i64 end = n - 1;
    for (int iteration = 0; iteration < kIterations; iteration++) {
      end = last_coupled(e, sweep.done, l, end);
      if (!begin(sweep, d, e, l, end)) break;
      for (i64 i = end - 1; i >= l; i--) {
        step(sweep, d, e, i, end);
        put(c, i, above(sweep.active, sweep.done, sweep.c, constant(1)));
        put(s, i, above(sweep.active, sweep.done, sweep.s, constant(0)));
      }
      finish(sweep, d, e, l);
      i64 r = 0;
      for (; r + 4 <= rows; r += 4) rotate<4>(l, end, c, s, f + r * W, ld);
      for (; r < rows; r++) rotate<1>(l, end, c, s, f + r * W, ld);
    }
  }
}

}  // namespace
}  // namespace mergeprobe
