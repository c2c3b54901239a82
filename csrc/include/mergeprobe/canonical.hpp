// P3, canonical form: delta = s B A = sum_a sigma_a u_a v_a^T with orthonormal u and v, from the
// factors alone. An entry may be a weighted sum of several adapters' deltas (segments).
#pragma once
#include "mergeprobe/kernels.hpp"

namespace mergeprobe {

struct Segment {
  Matrix u;  // rank x d_out (B transposed)
  Matrix v;  // rank x d_in (A)
  i64 rank;
  double scale;
};

enum class Status : std::int32_t { ok = 0, not_finite_u = 1, not_finite_v = 2, no_convergence = 3 };

struct CanonicalEntry {
  const Segment* segments;
  i64 n_segments;
  i64 d_out, d_in;
  i64 max_rank;  // components written; the spectrum is always complete
  // Rows of u_out are max_rank long strided vectors: component a, dimension d at
  // a * u_row + d * u_col. Components past the rank are not written.
  void* u_out;
  i64 u_row, u_col;
  void* v_out;
  i64 v_row, v_col;
  Dtype out_dtype;        // f32 or f64
  bool sigma_in_u;        // u_out holds sigma_a u_a: then (u_out, v_out) is a factorisation
  double* sigma;          // min(sum of ranks, d_out, d_in) values, descending, zero padded
  i64 rank;               // out: components above the tolerance, at most max_rank
  i64 numerical_rank;     // out: components above the tolerance
  std::int64_t bad_segment;  // out: which segment is not finite
  Status status;          // out
};

// The rank is decided on the spectrum of the delta: sigma > max(relative * sigma_1, noise * size)
// with size^2 = sum_a |s b_a|^2 |a_a|^2 over the rank-one units: their rounding, unit by unit.
struct RankRule {
  double relative;
  double noise;
};

// Factors are read exactly and everything up to the output is float64: column-equilibrated pivoted
// Cholesky of the Gram, one repair when it is ill-conditioned, Jacobi SVD of the core.
void canonicalise(CanonicalEntry* entries, i64 n, const RankRule& rule, const Kernels& kernels,
                  int threads);

}  // namespace mergeprobe
