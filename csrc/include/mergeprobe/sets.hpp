// Statistics of sets of adapters from N x N Gram matrices of their deltas, float64. The algebra is
// k x k and done for as many sets of one size at once as a register has lanes.
#pragma once
#include "mergeprobe/kernels.hpp"

namespace mergeprobe {

// `count` sets: row s of `members` holds the adapters of set s, then -1 up to `widest`; `weights`
// are those of the merge, in the same places. Padding of the outputs is left as it is.
struct Sets {
  i64 count, widest;
  const std::int32_t* members;
  const double* weights;
};

// Of M = sum_j w_j W_j, from gram[i * n + j] = <W_i, W_j>. NaN where undefined.
struct SetGeometry {
  double* merged_norm;    // (count,) ||M||
  double* superposition;  // ||M||^2 / sum_j w_j^2 ||W_j||^2
  double* gram_rank;      // exp of the entropy of the Gram's eigenvalues
  double* cosine_rank;    // the same of the matrix of cosines
  double* leverage;       // (count, widest) 1 - min_x ||W_i - sum_{j != i} x_j W_j||^2 / ||W_i||^2
};

// From grams[t * n * n + i * n + j] = <W_i, W_j> on the inputs of domain t. Member i is judged on
// its own: e_i(w) = (w - 1_i)^T G (w - 1_i) / G_ii, G = that of domain_of[i]. NaN where G_ii = 0,
// and for the whole set in what is optimised. nullptr: not wanted.
struct SetRetention {
  double* error;       // (count, widest) e_i(weights)
  double* direction;   // cosine of M and W_i on the inputs of i
  double* mean_weights;   // argmin of sum_i lambda_i e_i + ridge
  double* mean_error;
  double* worst_weights;  // argmin of max_i e_i + ridge
  double* worst_error;
  double* gap;         // (count,) duality gap of the last one, at least
};

struct RetentionOptions {
  double ridge;      // adds ridge * sum_j w_j^2 G_jj to every G_ii e_i
  double tolerance;  // of max_i e_i, relative: when the gap is below, the iteration ends
};

// Inner kernels; an array of k x k has its entries `lanes` apart, one set in each lane.
struct SetKernels {
  i64 lanes;
  // a: symmetric with trace 1, overwritten; its diagonal ends as the eigenvalues.
  void (*eigenvalues)(i64 k, double* a);
  // a: symmetric with unit diagonal, overwritten. out[i] = (a^-1)_ii, pivots at least `floor`.
  void (*inverse_diagonal)(i64 k, double* a, double floor, double* out);
  // g: k matrices, g[i] that of member i divided by its own (i, i).
  void (*errors)(i64 k, const double* g, const double* w, double* error, double* direction);
  // scratch of the next two: scratch(k) values.
  void (*least_mean)(i64 k, const double* g, const double* lambda, double ridge, double* scratch,
                     double* w);
  void (*least_worst)(i64 k, const double* g, double ridge, double tolerance, double* scratch,
                      double* w, double* gap);
  i64 (*scratch)(i64 k);
};

// Results do not depend on the number of threads, nor on which sets are computed together. Indices
// must be valid. Throws std::bad_alloc.
void set_geometry(const Sets& sets, const double* gram, i64 n, const SetGeometry& out,
                  const Kernels& kernels, int threads);
void set_retention(const Sets& sets, const double* grams, i64 n, const i64* domain_of,
                   const double* lambda, const SetRetention& out, const RetentionOptions& options,
                   const Kernels& kernels, int threads);

}  // namespace mergeprobe
