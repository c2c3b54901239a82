// Decision trees, all rows down every tree.
#pragma once
#include <cstdint>

#include "mergeprobe/kernels.hpp"

namespace mergeprobe {

// One node, as mergeprobe_fast/predict/forest.py lays it out. A leaf leads to itself, and `at` is
// its value.
struct ForestNode {
  float at;
  std::int16_t column, missing_left;
  std::int32_t child[2];  // where rows go that are below `at`, and the others; among all nodes
};

// out[row] = the sum over trees, in their order, of the leaf that the row comes to. Rows without a
// value (NaN) go where the node says. x is (rows, columns); no way is longer than the tree's depth.
void forest_sums(const ForestNode* nodes, const i64* roots, const i64* depths, i64 trees,
                 const float* x, i64 rows, i64 columns, double* out);

}  // namespace mergeprobe
