// The table of inner kernels that each instruction set provides. csrc/cpu/kernels.cpp,
// tile_*.cpp and set_kernels.cpp are compiled once per set; nothing else in the library depends on
// compiler flags.
#pragma once
#include "mergeprobe/types.hpp"

namespace mergeprobe {

// One row of a packed operand: where it starts and how its elements are spaced.
struct RowRef {
  const void* data;
  i64 col_stride;  // elements
  Dtype dtype;
};

// The product of two Gram tiles that an epilogue sums: M from the U side, N from the V side.
enum class Product : std::int32_t { uv = 0, uu = 1, vv = 2 };

template <class T>
struct GemmKernels {
  i64 lanes;  // rows per panel
  // Depth of a k-block: kc rows of a panel and of three others stay in L1 and L2.
  i64 kc;
  // Packs up to `lanes` rows, columns [k0, k0 + kc), as dst[k][lane]; missing rows become zeros.
  void (*pack_panel)(const RowRef* rows, i64 n_rows, i64 k0, i64 kc, T* dst);
  // C (+)= A B^T over packed operands ([k-block][panel][k][lane]); `upper`: A is B, and only panels
  // on or above the diagonal are written. C has ldc elements per row, ldc a multiple of `lanes`.
  void (*multiply)(const T* a, i64 a_panels, const T* b, i64 b_panels, i64 depth, T* c, i64 ldc,
                   bool upper, bool accumulate);
  // out[c] = sum_a weight[a] * X[a][c], X = M*N, M*M or N*N, over `rows` rows and `columns` columns.
  void (*reduce_rows)(Product product, const T* m, const T* n, i64 ld, i64 rows, i64 columns,
                      const T* weight, T* out);
};

struct TileKernels;
struct SetKernels;
struct AngleKernels;
struct EntryKernels;

struct Kernels {
  const char* isa;
  GemmKernels<float> f32;
  GemmKernels<double> f64;
  // One-sided Jacobi SVD of `work` (n columns of length m, m >= n, column j at work + j*m).
  // On return the columns are U*sigma and `v` (n columns of length n) holds V; returns the sweeps
  // used, or -1 when it did not converge.
  int (*jacobi_svd)(double* work, i64 m, i64 n, double* v);
  const TileKernels* tiles;  // mergeprobe/tile_kernels.hpp
  const SetKernels* sets;    // mergeprobe/sets.hpp
  const AngleKernels* angles;  // mergeprobe/angles.hpp
  const EntryKernels* entries;  // mergeprobe/entries.hpp
};

// Instruction sets in order of preference, only those compiled in and present on this CPU.
int available_kernels(const Kernels** out, int capacity);
// The set called `isa`, the best one for nullptr or "", or nullptr when it is not available.
const Kernels* find_kernels(const char* isa);

}  // namespace mergeprobe
