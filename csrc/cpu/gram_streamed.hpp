// P1 of large ranks: sum_ab w_a w'_b M[a,b] N[a,b] is <U_i^T W V_i, U_j^T W' V_j>, an inner product
// of dense matrices, and with M*M or N*N one of symmetric ones, U^T W U or V^T W V. Their entries
// are formed in tiles, of all blocks at a time, and Grams of the flattened tiles add up in float64.
// Weights are at most 1 and not next to 0: products of them are float32.
// With n blocks of rank r: n r pq + n^2 pq / 2 multiply-adds instead of n^2 r^2 (p + q) / 2.
#pragma once
#include <algorithm>
#include <vector>

#include "gram_plan.hpp"

namespace mergeprobe::gram {

using Products = unsigned;  // a set of Product, one bit each

constexpr bool has(Products set, Product x) { return set >> static_cast<int>(x) & 1u; }

// An epilogue of a set of products is streamed if it reads no view.
inline bool streams(Products set, const Epilogue& x) { return x.view == 0 && has(set, x.product); }

// The products that a module had best stream; none unless that is cheaper. In gram_choice.cpp.
Products streamed_products(const GramModule& g, const Plan& plan, const GramOptions& options);

// Writes the results that modules have of the epilogues that `products` streams, in float32 with
// float64 between tiles. A result depends on its two blocks alone. Throws std::bad_alloc.
void stream(const std::vector<const GramModule*>& modules, Products products, const Plan& plan,
            const GramOptions& options);

// Rows and columns of a tile of a dense matrix: at r = 128 its factors stay in L1 and L2, and the
// tiles of a panel of blocks (400 KB) in L2. Measured: 64 x 96 to 32 x 192 are within 5%, 128 rows
// lose up to 15%, 16 rows 25%.
constexpr i64 kTileRows = 32, kTileColumns = 192;
// The factors of a product's dense matrices, left and right: 0 is u, 1 is v.
constexpr int left_of(Product x) { return x == Product::vv ? 1 : 0; }
constexpr int right_of(Product x) { return x == Product::uu ? 0 : 1; }

// Panels of rows and of columns of a dense matrix, and how often what is there counts.
struct DenseTile {
  i64 row, rows, column, columns;
  double times;
};

// Of a symmetric matrix what is on and right of the diagonal, the latter twice.
inline std::vector<DenseTile> cut(i64 rows, i64 columns, bool symmetric, i64 lanes) {
  const i64 high = kTileRows / lanes, wide = kTileColumns / lanes;
  std::vector<DenseTile> out;
  for (i64 a = 0; a < rows; a += high) {
    const i64 n = std::min(high, rows - a);
    if (symmetric) out.push_back({a, n, a, n, 1.0});
    for (i64 b = symmetric ? a + n : 0; b < columns; b += wide)
      out.push_back({a, n, b, std::min(wide, columns - b), symmetric ? 2.0 : 1.0});
  }
  return out;
}

// Weights of a side's dense matrices, each once.
struct Kinds {
  std::vector<int> weights;

  std::size_t add(int weight) {
    const auto found = std::find(weights.begin(), weights.end(), weight);
    const std::size_t index = static_cast<std::size_t>(found - weights.begin());
    if (found == weights.end()) weights.push_back(weight);
    return index;
  }
  i64 count() const { return static_cast<i64>(weights.size()); }
};

// An epilogue: the kinds of dense matrices it multiplies.
struct Sum {
  std::size_t row, column;
  double* out;
};

// What is done with one product of a module.
struct Work {
  Product product;
  Kinds kinds[2];  // of the second side only if there is one
  std::vector<Sum> sums;

  Work(Product x, const GramModule& g, const std::vector<Epilogue>& epilogues) : product(x) {
    for (std::size_t e = 0; e < epilogues.size(); e++) {
      if (epilogues[e].product != x || epilogues[e].view != 0) continue;
      const std::size_t row = kinds[0].add(epilogues[e].row_weight);
      sums.push_back({row, kinds[g.blocks2 ? 1 : 0].add(epilogues[e].column_weight),
                      g.out ? g.out[e] : nullptr});
    }
  }
};

}  // namespace mergeprobe::gram
