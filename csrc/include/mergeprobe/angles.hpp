// P3 on pairs: principal angles, alignment and merged spectra of two deltas in canonical form,
// W = U diag(sigma) V^T, from the cosines M = U1^T U2 and N = V1^T V2, float64.
#pragma once
#include "mergeprobe/gram.hpp"

namespace mergeprobe {

// The widest rank that the kernels take; pairs with a wider one are left to LAPACK.
constexpr i64 kWidestAngles = 32;

// What is written of every pair (1, 2). Squares and energies add up over modules. `row` is about
// the right singular vectors (inputs), `col` about the left ones.
enum AngleStatistic : int {
  kCosineSum,     // of the min(k1, k2) principal angles t: sum of cos t
  kCosineLargest,
  kCosineSmallest,
  kAngles,        // sum of t^2
  kSines,         // sum of sin^2 t
  kHalves,        // sum of 4 sin^2(t / 2)
  kGap,           // largest sin^2 t
  kLogs,          // sum of -log max(cos^2 t, kLeastSquare)
  kAligned,       // sum of the singular values of diag(s1) N diag(s2), with M for `col`
  kTop,           // squares of cosines of the `top` strongest directions of each
  kBottom,        // the same of the weakest
  kPerSide,       // the next `kPerSide` are of `col`
  kDot = 2 * kPerSide,  // <W1, W2>
  kRow1,          // ||W1 V2||^2
  kRow2,          // ||W2 V1||^2
  kCol1,          // ||U2^T W1||^2
  kCol2,
  kBoth1,         // ||U2^T W1 V2||^2
  kBoth2,
  kEntries1,      // sum of the absolute entries of U2^T W1 V2
  kEntries2,
  kMergedLargest,  // largest singular value of W1 + W2
  kMergedSum,      // sum of its singular values
  kAgreeing,       // sum over its left vectors u of max(0, <u^T W1, u^T W2>)
  kAngleStatistics
};

// Cosines below are not told from 0: what float32 factors resolve.
constexpr double kLeastSquare = 1e-12;

// One module: two stacks of entries in canonical form (orthonormal rows), or one against itself.
struct AngleModule {
  const Block* blocks1;
  const double* sigma1;  // entry i's at sigma1 + i * sigma_stride, descending
  i64 n1;
  const Block* blocks2;  // nullptr: symmetric, pairs i < j only
  const double* sigma2;
  i64 n2;
  i64 sigma_stride;
  i64 p, q;     // columns of every u and of every v
  double* out;  // statistic s of pair (i, j) at out[s * out_stride + place]; see `angle_place`
  i64 out_stride;
};

// Where a pair's results lie: n1 x n2 in row-major order, or the upper triangle, packed.
inline i64 angle_place(bool symmetric, i64 n2, i64 i, i64 j) {
  return symmetric ? i * n2 - i * (i + 1) / 2 + (j - i - 1) : i * n2 + j;
}

// Writes every pair whose ranks are 1 to kWidestAngles and leaves the others as they are. The
// result does not depend on the number of threads. Throws std::bad_alloc.
void pair_angles(const AngleModule* modules, i64 n_modules, i64 top, const Kernels& kernels,
                 int threads);

// Singular values of `count` matrices m x n (n <= m or not), one after the other, descending, into
// out (count x min(m, n)). Off by at most 1e-7 of the largest of each.
template <class T>
void small_singular_values(const T* x, i64 count, i64 m, i64 n, double* out,
                           const Kernels& kernels, int threads);

constexpr i64 kAngleGroups = 4;

// A group of pairs, one in each lane: arrays of matrices have their entries `lanes` apart, zero
// beyond the ranks of a lane.
struct AngleLanes {
  i64 k1, k2;       // widest ranks in the group
  double* m;        // k1 x k2, overwritten
  double* n;
  const double* s1;  // k1, all of them at most 1
  const double* s2;
  // V^T V - 1 of the stored vectors (k1 x k1, k2 x k2), or nullptr where that is negligible.
  const double *u1, *u2, *v1, *v2;
  double* scratch;
};

// One value per lane, or per eigenvalue and lane.
struct AngleResults {
  double* row;       // min(k1, k2) squares of cosines, descending
  double* col;
  double* merged;    // k1 + k2 squares of singular values of W1 + W2
  double* energy1;   // k1 + k2: ||u^T W1||^2 of each one's left vector u
  double* energy2;
  double* sums;      // kAngleStatistics: those that are sums over entries, and kAligned
};

struct AngleKernels {
  i64 lanes;
  i64 (*scratch)(i64 k1, i64 k2);
  void (*pairs)(const AngleLanes& group, const AngleResults& out);
  // `count` values of as many arrays as there are lanes, over the largest of each, which is `top`.
  void (*pack32)(const float* const* from, i64 count, double* to, double* top);
  void (*pack64)(const double* const* from, i64 count, double* to, double* top);
  // x: m x n, `groups` of them, at most kAngleGroups; squares: min(m, n) each, descending.
  // scratch: k (k + kAngleGroups + 2) values a lane, k the smaller of m and n.
  void (*squares)(i64 m, i64 n, i64 groups, const double* x, double* scratch, double* squares);
};

}  // namespace mergeprobe
