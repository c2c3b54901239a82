// Small dense algebra on many sets of adapters at once, one set in each lane. Compiled once per
// instruction set like kernels.cpp; nothing here may have external linkage except the table.
#include "mergeprobe/sets.hpp"

#include <cmath>

#include "lanes.hpp"

namespace mergeprobe {
namespace {

constexpr int kSweeps = 30;  // of Jacobi's method; 6 to 8 are usual
constexpr int kSteps = 60;   // of the interior point method; 4 to 16 are usual

MP_INLINE bool any_positive(const V& x) { return any_above(x, constant(0)); }

// Cyclic Jacobi on the upper triangle. A lane that has converged is rotated by nothing.
void eigenvalues(i64 k, double* a) {
  const V one = constant(1), zero = constant(0), done = constant(1e-30);
  for (int sweep = 0; sweep < kSweeps; sweep++) {
    V off = zero;
    for (i64 p = 0; p < k; p++)
      for (i64 q = p + 1; q < k; q++) off = off + get(a, p * k + q) * get(a, p * k + q);
    const V active = above(off, done, one, zero);
    if (!any_positive(active)) return;
    for (i64 p = 0; p < k; p++)
      for (i64 q = p + 1; q < k; q++) {
        const V apq = get(a, p * k + q) * active, app = get(a, p * k + p), aqq = get(a, q * k + q);
        const V d = aqq - app, h = root(d * d + constant(4) * apq * apq);
        const V under = above(zero, d, d - h, d + h);
        const V t = constant(2) * apq / above(h, zero, under, one);
        const V c = one / root(one + t * t), s = t * c;
        for (i64 r = 0; r < k; r++) {
          if (r == p || r == q) continue;
          const i64 rp = r < p ? r * k + p : p * k + r, rq = r < q ? r * k + q : q * k + r;
          const V x = get(a, rp), y = get(a, rq);
          put(a, rp, c * x - s * y);
          put(a, rq, s * x + c * y);
        }
        put(a, p * k + p, app - t * apq);
        put(a, q * k + q, aqq + t * apq);
        put(a, p * k + q, get(a, p * k + q) * (one - active));
      }
  }
}

// Lower Cholesky factor in place; its diagonal holds reciprocals. Pivots are at least `floor` of
// the diagonal, so that rounding below it cannot make them negative.
void cholesky(i64 k, double* a, double floor) {
  for (i64 j = 0; j < k; j++) {
    const V diagonal = get(a, j * k + j);
    V pivot = diagonal;
    for (i64 m = 0; m < j; m++) pivot = pivot - get(a, j * k + m) * get(a, j * k + m);
    const V inverse = constant(1) / root(larger(pivot, constant(floor) * diagonal));
    put(a, j * k + j, inverse);
    for (i64 i = j + 1; i < k; i++) {
      V x = get(a, i * k + j);
      for (i64 m = 0; m < j; m++) x = x - get(a, i * k + m) * get(a, j * k + m);
      put(a, i * k + j, x * inverse);
    }
  }
}

void forward(i64 k, const double* l, double* x) {
  for (i64 i = 0; i < k; i++) {
    V s = get(x, i);
    for (i64 m = 0; m < i; m++) s = s - get(l, i * k + m) * get(x, m);
    put(x, i, s * get(l, i * k + i));
  }
}

void backward(i64 k, const double* l, double* x) {
  for (i64 i = k; i-- > 0;) {
    V s = get(x, i);
    for (i64 m = i + 1; m < k; m++) s = s - get(l, m * k + i) * get(x, m);
    put(x, i, s * get(l, i * k + i));
  }
}

void inverse_diagonal(i64 k, double* a, double floor, double* out) {
  cholesky(k, a, floor);
  // Columns of L^-1 replace those of L from the left: column j needs only later ones of L.
  for (i64 j = 0; j < k; j++) {
    V sum = get(a, j * k + j) * get(a, j * k + j);
    for (i64 i = j + 1; i < k; i++) {
      V s = constant(0);
      for (i64 m = j; m < i; m++) s = s - get(a, i * k + m) * get(a, m * k + j);
      put(a, i * k + j, s * get(a, i * k + i));
    }
    for (i64 i = j + 1; i < k; i++) sum = sum + get(a, i * k + j) * get(a, i * k + j);
    put(out, j, sum);
  }
}

// q = G_i (w - 1_i) + ridge diag(G_i) w, half the gradient of the e_i that is returned.
MP_INLINE V residual(i64 k, const double* g, const double* w, double ridge, i64 i, double* q) {
  const V one = constant(1);
  V e = constant(0);
  for (i64 a = 0; a < k; a++) {
    V s = constant(0) - get(g, (i * k + a) * k + i);
    for (i64 b = 0; b < k; b++) s = s + get(g, (i * k + a) * k + b) * get(w, b);
    const V more = constant(ridge) * get(g, (i * k + a) * k + a) * get(w, a);
    put(q, a, s + more);
    e = e + s * (a == i ? get(w, a) - one : get(w, a)) + more * get(w, a);
  }
  return e;
}

void errors(i64 k, const double* g, const double* w, double* error, double* direction) {
  const V zero = constant(0), nothing = zero / zero;
  for (i64 i = 0; i < k; i++) {
    // Formed from w - 1_i: the difference of the three terms would lose what is small.
    V e = zero, square = zero, dot = zero;
    for (i64 a = 0; a < k; a++) {
      V row = zero;
      for (i64 b = 0; b < k; b++) row = row + get(g, (i * k + a) * k + b) * get(w, b);
      square = square + row * get(w, a);
      if (a == i) dot = row;
      const V rest = row - get(g, (i * k + a) * k + i);
      e = e + rest * (a == i ? get(w, a) - constant(1) : get(w, a));
    }
    put(error, i, above(zero, e, zero, e));  // NaN stays
    put(direction, i, above(square, zero, dot / root(larger(square, zero)), nothing));
  }
}

// H = sum_i mu_i G_i, lower triangle with the ridge, and sum_i mu_i G_i 1_i.
void weighted_sums(i64 k, const double* g, const double* mu, double ridge, double* h,
                   double* right) {
  for (i64 a = 0; a < k; a++) {
    V sum = constant(0);
    for (i64 i = 0; i < k; i++) sum = sum + get(mu, i) * get(g, (i * k + a) * k + i);
    put(right, a, sum);
    for (i64 b = 0; b <= a; b++) {
      V s = constant(0);
      for (i64 i = 0; i < k; i++) s = s + get(mu, i) * get(g, (i * k + a) * k + b);
      put(h, a * k + b, a == b ? s * constant(1 + ridge) : s);
    }
  }
}

void solve(i64 k, const double* l, double* x) {
  forward(k, l, x);
  backward(k, l, x);
}

void least_mean(i64 k, const double* g, const double* lambda, double ridge, double* scratch,
                double* w) {
  weighted_sums(k, g, lambda, ridge, scratch, w);
  cholesky(k, scratch, 1e-14);
  solve(k, scratch, w);
}

// The step at which the first of x would reach zero, at most 1.
MP_INLINE V reach(i64 k, const double* x, const double* dx, V length) {
  for (i64 i = 0; i < k; i++) {
    const V ratio = constant(0) - get(x, i) / get(dx, i);
    length = above(constant(0), get(dx, i), above(length, ratio, ratio, length), length);
  }
  return length;
}

// min t with e_i(w) + s_i = t, s >= 0, and its multipliers mu: a primal-dual interior point method
// with predictor and corrector on (w, t, s, mu). The certificate is apart from it: whatever mu,
// min_w sum_i mu_i e_i(w) with sum mu = 1 is one solve, and bounds the optimum from below.
// (The ridge is part of every e_i here.)
void least_worst(i64 k, const double* g, double ridge, double tolerance, double* scratch,
                 double* best_w, double* gap_out) {
  double *h = scratch, *m = h + k * k * W, *q = m + k * k * W, *w = q + k * k * W;
  double *dw = w + k * W, *v = dw + k * W, *mu = v + k * W, *dmu = mu + k * W, *s = dmu + k * W;
  double *ds = s + k * W, *e = ds + k * W, *aim = e + k * W, *at_mu = aim + k * W;
  const V zero = constant(0), one = constant(1);
  const V many = constant(static_cast<double>(k));
  V best = constant(HUGE_VAL), bound = constant(-HUGE_VAL), running = one, t = zero;
  for (i64 i = 0; i < k; i++) {
    put(mu, i, one / many);
    put(best_w, i, zero / zero);
  }
  // Takes w when it is the best so far.
  const auto offer = [&](const double* candidate, const V& worst) {
    const V better = above(best, worst, running, zero);
    for (i64 a = 0; a < k; a++)
      put(best_w, a, above(better, zero, get(candidate, a), get(best_w, a)));
    best = above(better, zero, worst, best);
  };
  for (int step = 0; step < kSteps; step++) {
    weighted_sums(k, g, mu, ridge, h, at_mu);
    for (i64 i = 0; i < k * k; i++) put(m, i, constant(2) * get(h, i));
    cholesky(k, h, 1e-14);
    solve(k, h, at_mu);
    V worst = constant(-HUGE_VAL), dual = zero, total = zero;
    for (i64 i = 0; i < k; i++) {
      const V x = residual(k, g, at_mu, ridge, i, dw);
      worst = larger(worst, x);
      dual = dual + get(mu, i) * x;
      total = total + get(mu, i);
    }
    offer(at_mu, worst);
    if (step == 0)
      for (i64 a = 0; a < k; a++) put(w, a, get(at_mu, a));
    V primal = constant(-HUGE_VAL);
    for (i64 i = 0; i < k; i++) {
      put(e, i, residual(k, g, w, ridge, i, q + i * k * W));
      primal = larger(primal, get(e, i));
    }
    offer(w, primal);
    // NaN, of an iteration that broke down, bounds nothing.
    const V found = dual / total;
    bound = above(running, zero, above(found, bound, found, bound), bound);
    running = above(best - bound, constant(tolerance) * best + constant(1e-12), running, zero);
    if (!any_positive(running)) break;
    if (step == 0) {
      t = primal + constant(0.1) * larger(primal - dual, constant(1e-3));
      for (i64 i = 0; i < k; i++) put(s, i, t - get(e, i));
    }

    // With d = mu / s, r = e - t + s and J = 2 q: K dw - J^T d dt = -J^T x, x = aim / s + d r and
    // K = 2 H + J^T diag(d) J; what is left of 1^T mu = 1 gives dt. It is eliminated first, which
    // takes the mean of J, weighted by d, out of J: where two members are nearly equal, the
    // difference that is left otherwise is rounding.
    V sum_d = zero, centre = zero;
    for (i64 a = 0; a < k; a++) put(v, a, zero);
    for (i64 i = 0; i < k; i++) {
      const V d = get(mu, i) / get(s, i);
      sum_d = sum_d + d;
      centre = centre + get(mu, i) * get(s, i) / many;
      for (i64 a = 0; a < k; a++)
        put(v, a, get(v, a) + constant(2) * d * get(q, i * k + a));
    }
    for (i64 a = 0; a < k; a++) put(v, a, get(v, a) / sum_d);  // the mean of J
    for (i64 i = 0; i < k; i++) {
      const V d = get(mu, i) / get(s, i);
      for (i64 a = 0; a < k; a++) put(q, i * k + a, constant(2) * get(q, i * k + a) - get(v, a));
      for (i64 a = 0; a < k; a++)
        for (i64 b = 0; b <= a; b++)
          put(m, a * k + b, get(m, a * k + b) + d * get(q, i * k + a) * get(q, i * k + b));
    }
    cholesky(k, m, 1e-15);
    for (i64 i = 0; i < k; i++) put(aim, i, zero);
    V length = zero, dt = zero;
    for (int round = 0; round < 2; round++) {
      V excess = zero - one;  // of the sum of x over 1
      for (i64 i = 0; i < k; i++) {
        const V r = get(e, i) - t + get(s, i);
        excess = excess + (get(aim, i) + get(mu, i) * r) / get(s, i);
      }
      dt = excess / sum_d;
      for (i64 a = 0; a < k; a++) put(dw, a, zero - get(v, a));
      for (i64 i = 0; i < k; i++) {
        const V r = get(e, i) - t + get(s, i);
        const V x = (get(aim, i) + get(mu, i) * (r - dt)) / get(s, i);
        for (i64 a = 0; a < k; a++) put(dw, a, get(dw, a) - x * get(q, i * k + a));
      }
      solve(k, m, dw);
      for (i64 i = 0; i < k; i++) {
        V change = get(e, i) - t + get(s, i);
        for (i64 a = 0; a < k; a++) change = change + get(q, i * k + a) * get(dw, a);
        put(ds, i, dt - change);
        put(dmu, i, (get(aim, i) - get(mu, i) * get(ds, i)) / get(s, i) - get(mu, i));
      }
      for (i64 a = 0; a < k; a++) dt = dt + get(v, a) * get(dw, a);
      length = reach(k, s, ds, reach(k, mu, dmu, one));
      if (round == 1) break;
      // How far the step without a barrier can go says how much of one to keep.
      V after = zero;
      for (i64 i = 0; i < k; i++) {
        const V one_mu = get(mu, i) + length * get(dmu, i), one_s = get(s, i) + length * get(ds, i);
        after = after + one_mu * one_s / many;
      }
      const V shrink = after / centre, keep = larger(shrink * shrink * shrink, constant(1e-6));
      // The correction of second order counts as far as the step went: in full it leads astray.
      const V far = length * length;
      for (i64 i = 0; i < k; i++) put(aim, i, keep * centre - far * get(dmu, i) * get(ds, i));
    }
    length = length * constant(0.99);
    const auto move = [&](double* x, const double* dx) {
      for (i64 i = 0; i < k; i++)
        put(x, i, above(running, zero, get(x, i) + length * get(dx, i), get(x, i)));
    };
    move(w, dw);
    move(mu, dmu);
    move(s, ds);
    t = above(running, zero, t + length * dt, t);
  }
  store(gap_out, larger(best - bound, zero));
}

i64 scratch(i64 k) { return (3 * k * k + 10 * k) * W; }

}  // namespace

#define MP_JOIN_(a, b) a##b
#define MP_JOIN(a, b) MP_JOIN_(a, b)

extern const SetKernels MP_JOIN(set_kernels_, MP_ISA);
const SetKernels MP_JOIN(set_kernels_, MP_ISA) = {W,      eigenvalues, inverse_diagonal, errors,
                                                  least_mean, least_worst, scratch};

}  // namespace mergeprobe
