// P1, block Hadamard-Gram: P[i,j] = sum over a in block i, b in block j of a product of the two
// Grams' entries M[a,b] = U[a].U2[b] and N[a,b] = V[a].V2[b]. The R x R Grams exist tile by tile.
#pragma once
#include "mergeprobe/kernels.hpp"

namespace mergeprobe {

// Rows that belong together: one adapter's factors in one module.
struct Block {
  Matrix u;  // rank x p
  Matrix v;  // rank x q
  i64 rank;
};

// Another v for every block of a module: the Gram of the u is computed once for all of them.
struct View {
  const Matrix* v1;  // rank x q, one per block of the first stack
  const Matrix* v2;  // the same for the second; ignored when symmetric
  i64 q;
};

enum class Reduce : std::int32_t { both = 0, columns = 1, none = 2 };

// out[i,j] = sum of row_weight[a] * product(M, N)[a,b] * column_weight[b].
struct Epilogue {
  Product product;
  int row_weight;     // index into GramModule::weights1, or -1 for ones
  int column_weight;  // index into GramModule::weights2, or -1 for ones
  int view = 0;       // N is of the blocks' own v (0) or of GramModule::views[view - 1]
};

// One module: two stacks of blocks, or one against itself.
struct GramModule {
  const Block* blocks1;
  i64 n1;
  const Block* blocks2;  // nullptr: symmetric
  i64 n2;
  i64 p, q;                        // columns of every u and of every v
  const double* const* weights1;   // one value per stacked row of the first stack
  const double* const* weights2;   // the same for the second; ignored when symmetric
  double* const* out;              // one array per epilogue, rows of `out_stride`, fully written
  i64 out_stride;
  const View* views = nullptr;  // as many as the epilogues name
};

// Whether sums of Reduce::both in float32 may be taken over dense matrices, which is cheaper where
// ranks are large: where it pays, or, to test and to measure, wherever it can be done.
enum class Streaming : std::int32_t { never = 0, where_it_pays = 1, always = 2 };

struct GramOptions {
  const Kernels* kernels;
  int threads;
  bool fp64;       // accumulate (and multiply) in float64; products of float32 are exact there
  i64 tile_rows;   // rows of a tile; 0 = default
  Reduce reduce;   // `both`: n1 x n2; `columns`: R1 x n2; `none`: R1 x R2
  Streaming streaming = Streaming::never;
};

// Every entry of the output is written by one task from one fixed tiling, so the result does not
// depend on the number of threads. Throws std::bad_alloc.
void block_gram(const GramModule* modules, i64 n_modules, const Epilogue* epilogues,
                int n_epilogues, const GramOptions& options);

}  // namespace mergeprobe
