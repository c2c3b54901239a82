#include "mergeprobe/canonical.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "mergeprobe/parallel.hpp"

namespace mergeprobe {
namespace {

// Residual of an equilibrated row below which it is taken as dependent: the square is what the
// float64 Gram resolves, the root (1e-7) is the rounding of float32 factors.
constexpr double kDependent = 1e-14;
// Above this condition number (of the equilibrated rows) a second Cholesky restores orthogonality,
// which the first loses as eps * condition^2.
constexpr double kRepairCondition = 1e3;
constexpr i64 kChunk = 256;  // dimensions per block when a small matrix is applied to a factor

// Rows of one matrix that are stacked with those of others.
struct Part {
  Matrix m;
  i64 rank;
};

struct Stacked {
  std::vector<Part> parts;
  i64 rows = 0;

  void add(const Matrix& m, i64 rank) {
    parts.push_back({m, rank});
    rows += rank;
  }
};

// Small dense row-major matrix.
struct Dense {
  i64 rows = 0, cols = 0;
  std::vector<double> data;
  Dense() = default;
  Dense(i64 r, i64 c) : rows(r), cols(c), data(static_cast<std::size_t>(r * c), 0.0) {}
  double* operator[](i64 r) { return data.data() + r * cols; }
  const double* operator[](i64 r) const { return data.data() + r * cols; }
};

Dense multiply(const Dense& a, const Dense& b) {
  Dense c(a.rows, b.cols);
  for (i64 i = 0; i < a.rows; i++)
    for (i64 k = 0; k < a.cols; k++) {
      const double x = a[i][k];
      for (i64 j = 0; j < b.cols; j++) c[i][j] += x * b[k][j];
    }
  return c;
}

struct Workspace {
  Buffer<double> panels, product, left;
};

Stacked stack(const CanonicalEntry& e, bool u) {
  Stacked s;
  for (i64 i = 0; i < e.n_segments; i++)
    s.add(u ? e.segments[i].u : e.segments[i].v, e.segments[i].rank);
  return s;
}

class Canonical {
 public:
  Canonical(const Kernels& kernels, const RankRule& rule) : k_(kernels), g_(kernels.f64), rule_(rule) {}

  void run(CanonicalEntry& e, Workspace& w) const {
    e.rank = e.numerical_rank = 0;
    e.bad_segment = -1;
    e.status = Status::ok;
    const Stacked u = stack(e, true), v = stack(e, false);
    std::fill_n(e.sigma, std::min({u.rows, e.d_out, e.d_in}), 0.0);
    if (u.rows == 0) return;
    const Dense gram_u = gram(u, e.d_out, w), gram_v = gram(v, e.d_in, w);
    if (!finite(gram_u, e, Status::not_finite_u) || !finite(gram_v, e, Status::not_finite_v)) return;
    const Basis bu = basis(u, e.d_out, gram_u, w), bv = basis(v, e.d_in, gram_v, w);
    if (bu.rank() == 0 || bv.rank() == 0) return;

    double top = 0;  // the largest scale is set aside, so that squares stay in range
    for (i64 s = 0; s < e.n_segments; s++) top = std::max(top, std::fabs(e.segments[s].scale));
    if (top == 0) return;
    double noise = 0;  // squared: what rounding every stored factor amounts to in the delta
    Dense core(bu.rank(), bv.rank());
    for (i64 s = 0, row = 0; s < e.n_segments; s++)
      for (i64 a = 0; a < e.segments[s].rank; a++, row++) {
        const double scale = e.segments[s].scale / top;
        noise += scale * gram_u[row][row] * scale * gram_v[row][row];
        for (i64 i = 0; i < core.rows; i++) {
          const double x = scale * bu.coordinates[row][i];
          for (i64 j = 0; j < core.cols; j++) core[i][j] += x * bv.coordinates[row][j];
        }
      }
    Dense left, right;  // rows: singular vectors in the coordinates of the bases
    std::vector<double> sigma;
    if (!svd(core, left, right, sigma)) {
      e.status = Status::no_convergence;
      return;
    }
    const double floor = std::max(rule_.relative * sigma[0], rule_.noise * std::sqrt(noise));
    while (e.numerical_rank < static_cast<i64>(sigma.size()) &&
           sigma[e.numerical_rank] > floor && sigma[e.numerical_rank] > 0)
      e.numerical_rank++;
    for (std::size_t a = 0; a < sigma.size(); a++) e.sigma[a] = sigma[a] *= top;
    e.rank = std::min(e.numerical_rank, e.max_rank);
    if (e.rank == 0 || (!e.u_out && !e.v_out)) return;
    left.rows = right.rows = e.rank;
    if (e.sigma_in_u)
      for (i64 a = 0; a < e.rank; a++)
        for (i64 i = 0; i < left.cols; i++) left[a][i] *= sigma[a];
    if (e.u_out) write(multiply(left, bu.transform), u, e.d_out, e.u_out, e.u_row, e.u_col, e, w);
    if (e.v_out) write(multiply(right, bv.transform), v, e.d_in, e.v_out, e.v_row, e.v_col, e, w);
  }

 private:
  // rows = coordinates * Q with Q = transform * rows orthonormal.
  struct Basis {
    Dense transform;    // rank x stacked rows
    Dense coordinates;  // stacked rows x rank
    i64 rank() const { return transform.rows; }
  };

  i64 panels(i64 n) const { return (n + g_.lanes - 1) / g_.lanes; }

  Dense gram(const Stacked& stacked, i64 d, Workspace& w) const {
    const i64 n = stacked.rows, W = g_.lanes, np = panels(n), ld = np * W;
    std::vector<RowRef> rows;
    for (const Part& p : stacked.parts)
      for (i64 a = 0; a < p.rank; a++) rows.push_back({at(p.m, a, 0), p.m.col_stride, p.m.dtype});
    w.panels.reserve(np * W * g_.kc);
    w.product.reserve(np * W * ld);
    if (d == 0) std::fill_n(w.product.data(), np * W * ld, 0.0);
    for (i64 k0 = 0; k0 < d; k0 += g_.kc) {
      const i64 kc = std::min(g_.kc, d - k0);
      for (i64 p = 0; p < np; p++)
        g_.pack_panel(rows.data() + p * W, std::min(W, n - p * W), k0, kc,
                      w.panels.data() + p * kc * W);
      g_.multiply(w.panels.data(), np, w.panels.data(), np, kc, w.product.data(), ld, true, k0 > 0);
    }
    Dense out(n, n);
    for (i64 a = 0; a < n; a++)
      for (i64 b = a; b < n; b++) out[a][b] = out[b][a] = w.product[a * ld + b];
    return out;
  }

  // out[d, a] = sum_r t[a, r] rows[r, d], in chunks of dimensions that stay in cache. It is the
  // same packed product as everywhere: dimensions are the rows, the stacked rank is the depth.
  template <class Store>
  void apply(const Dense& t, const Stacked& stacked, i64 d, Workspace& w, const Store& store) const {
    const i64 n = stacked.rows, W = g_.lanes, np = panels(t.rows), ld = np * W;
    const i64 chunk_panels = panels(kChunk);
    w.panels.reserve((np + chunk_panels) * W * n);
    double* const packed_t = w.panels.data();
    double* const packed_rows = packed_t + np * W * n;
    w.product.reserve(chunk_panels * W * ld);
    double* dst = packed_t;
    for (i64 k0 = 0; k0 < n; k0 += g_.kc) {
      const i64 kc = std::min(g_.kc, n - k0);
      for (i64 p = 0; p < np; p++)
        for (i64 k = 0; k < kc; k++)
          for (i64 lane = 0; lane < W; lane++)
            *dst++ = p * W + lane < t.rows ? t[p * W + lane][k0 + k] : 0.0;
    }
    std::vector<RowRef> dims(W);
    for (i64 d0 = 0; d0 < d; d0 += kChunk) {
      const i64 dc = std::min(kChunk, d - d0), cp = panels(dc);
      i64 row = 0;
      for (const Part& part : stacked.parts) {
        for (i64 a = 0; a < part.rank;) {
          const i64 k0 = row / g_.kc * g_.kc, kc = std::min(g_.kc, n - k0);
          const i64 depth = std::min(part.rank - a, k0 + kc - row);
          for (i64 p = 0; p < cp; p++) {
            const i64 lanes = std::min(W, dc - p * W);
            for (i64 i = 0; i < lanes; i++)
              dims[i] = {at(part.m, a, d0 + p * W + i), part.m.row_stride, part.m.dtype};
            g_.pack_panel(dims.data(), lanes, 0, depth,
                          packed_rows + k0 * cp * W + (p * kc + row - k0) * W);
          }
          a += depth;
          row += depth;
        }
      }
      g_.multiply(packed_rows, cp, packed_t, np, n, w.product.data(), ld, false, false);
      store(d0, dc, w.product.data(), ld);
    }
  }

  void write(const Dense& t, const Stacked& rows, i64 d, void* out, i64 row, i64 col,
             const CanonicalEntry& e, Workspace& w) const {
    auto typed = [&](auto* p) {
      using S = std::remove_reference_t<decltype(*p)>;
      apply(t, rows, d, w, [&](i64 d0, i64 dc, const double* c, i64 ld) {
        for (i64 i = 0; i < dc; i++) {
          S* const to = p + (d0 + i) * col;
          if (row == 1) {
            for (i64 a = 0; a < t.rows; a++) to[a] = static_cast<S>(c[i * ld + a]);
          } else {
            for (i64 a = 0; a < t.rows; a++) to[a * row] = static_cast<S>(c[i * ld + a]);
          }
        }
      });
    };
    if (e.out_dtype == Dtype::f64) {
      typed(static_cast<double*>(out));
    } else {
      typed(static_cast<float*>(out));
    }
  }

  static bool finite(const Dense& gram, CanonicalEntry& e, Status status) {
    for (i64 s = 0, row = 0; s < e.n_segments; s++)
      for (i64 a = 0; a < e.segments[s].rank; a++, row++)
        if (!std::isfinite(gram[row][row])) {
          e.status = status;
          e.bad_segment = s;
          return false;
        }
    return true;
  }

  Basis basis(const Stacked& rows, i64 d, const Dense& gram, Workspace& w) const {
    double condition = 1;
    Basis first = cholesky(gram, condition);
    if (first.rank() == 0 || condition < kRepairCondition) return first;
    // Q as computed, then its own Gram: "twice is enough".
    w.left.reserve(first.rank() * d);
    const i64 k = first.rank();
    apply(first.transform, rows, d, w, [&](i64 d0, i64 dc, const double* c, i64 ld) {
      for (i64 i = 0; i < dc; i++) std::copy_n(c + i * ld, k, w.left.data() + (d0 + i) * k);
    });
    Stacked q;
    q.add({w.left.data(), 1, k, Dtype::f64}, k);
    Basis second = cholesky(this->gram(q, d, w), condition);
    return {multiply(second.transform, first.transform),
            multiply(first.coordinates, second.coordinates)};
  }

  // Column-equilibrated, diagonally pivoted Cholesky; dependent rows end it.
  static Basis cholesky(const Dense& gram, double& condition) {
    const i64 n = gram.rows;
    std::vector<double> length(n);
    for (i64 i = 0; i < n; i++) length[i] = std::sqrt(gram[i][i]);
    std::vector<i64> order;
    for (i64 i = 0; i < n; i++)
      if (length[i] > 0) order.push_back(i);
    const i64 m = static_cast<i64>(order.size());
    Dense l(m, m);
    std::vector<double> residual(m, 1.0);
    i64 k = 0;
    double least = 1;
    for (; k < m; k++) {
      const i64 pivot = std::max_element(residual.begin() + k, residual.end()) - residual.begin();
      if (residual[pivot] <= kDependent * static_cast<double>(m)) break;
      std::swap(order[k], order[pivot]);
      std::swap(residual[k], residual[pivot]);
      std::swap_ranges(l[k], l[k] + k, l[pivot]);
      const double diagonal = std::sqrt(residual[k]);
      least = std::min(least, diagonal);
      l[k][k] = diagonal;
      for (i64 i = k + 1; i < m; i++) {
        double x = gram[order[i]][order[k]] / (length[order[i]] * length[order[k]]);
        for (i64 j = 0; j < k; j++) x -= l[i][j] * l[k][j];
        l[i][k] = x / diagonal;
        residual[i] -= l[i][k] * l[i][k];
      }
      residual[k] = -1;  // done
    }
    condition = 1 / least;
    Basis b{Dense(k, n), Dense(n, k)};
    for (i64 i = 0; i < m; i++)
      for (i64 j = 0; j < std::min(i + 1, k); j++)
        b.coordinates[order[i]][j] = l[i][j] * length[order[i]];
    // transform = L11^-1, on the pivot rows, unit length first.
    for (i64 column = 0; column < k; column++)
      for (i64 i = column; i < k; i++) {
        double x = i == column ? 1.0 : 0.0;
        for (i64 j = column; j < i; j++) x -= l[i][j] * b.transform[j][order[column]];
        b.transform[i][order[column]] = x / l[i][i];
      }
    for (i64 i = 0; i < k; i++)
      for (i64 column = 0; column < k; column++)
        b.transform[i][order[column]] /= length[order[column]];
    return b;
  }

  // core = left^T diag(sigma) right, sigma descending; rows of left and right are the vectors.
  bool svd(const Dense& core, Dense& left, Dense& right, std::vector<double>& sigma) const {
    const bool tall = core.rows >= core.cols;
    const i64 m = std::max(core.rows, core.cols), n = std::min(core.rows, core.cols);
    Dense work(n, m), v(n, n);  // row j = column j
    for (i64 j = 0; j < n; j++)
      for (i64 i = 0; i < m; i++) work[j][i] = tall ? core[i][j] : core[j][i];
    // Columns by decreasing length converge in fewer sweeps.
    std::vector<i64> by_length(n);
    std::vector<double> length(n);
    for (i64 j = 0; j < n; j++) {
      by_length[j] = j;
      for (i64 i = 0; i < m; i++) length[j] += work[j][i] * work[j][i];
    }
    std::stable_sort(by_length.begin(), by_length.end(),
                     [&](i64 a, i64 b) { return length[a] > length[b]; });
    Dense sorted(n, m);
    for (i64 j = 0; j < n; j++) std::copy_n(work[by_length[j]], m, sorted[j]);
    if (k_.jacobi_svd(sorted.data.data(), m, n, v.data.data()) < 0) return false;
    std::vector<double> norm(n);
    for (i64 j = 0; j < n; j++) {
      double largest = 0, sum = 0;  // scaled, so that tiny columns do not underflow
      for (i64 i = 0; i < m; i++) largest = std::max(largest, std::fabs(sorted[j][i]));
      for (i64 i = 0; i < m && largest > 0; i++) {
        const double x = sorted[j][i] / largest;
        sum += x * x;
      }
      norm[j] = largest * std::sqrt(sum);
    }
    std::vector<i64> order(n);
    std::iota(order.begin(), order.end(), i64{0});
    std::stable_sort(order.begin(), order.end(), [&](i64 a, i64 b) { return norm[a] > norm[b]; });
    Dense outer(n, m), inner(n, n);
    sigma.resize(n);
    for (i64 a = 0; a < n; a++) {
      const i64 j = order[a];
      sigma[a] = norm[j];
      for (i64 i = 0; i < m; i++) outer[a][i] = norm[j] > 0 ? sorted[j][i] / norm[j] : 0.0;
      for (i64 i = 0; i < n; i++) inner[a][by_length[i]] = v[j][i];
    }
    left = tall ? std::move(outer) : std::move(inner);
    right = tall ? std::move(inner) : std::move(outer);
    return true;
  }

  const Kernels& k_;
  const GemmKernels<double>& g_;
  const RankRule& rule_;
};

}  // namespace

void canonicalise(CanonicalEntry* entries, i64 n, const RankRule& rule, const Kernels& kernels,
                  int threads) {
  const Canonical canonical(kernels, rule);
  std::vector<Workspace> work(static_cast<std::size_t>(std::max(1, threads)));
  parallel_for(n, threads, [&](i64 i, int w) { canonical.run(entries[i], work[w]); });
}

}  // namespace mergeprobe
