#include "mergeprobe/forest.hpp"

#include <algorithm>

namespace mergeprobe {

namespace {

constexpr i64 kRows = 128;  // at once: their values stay in the cache
constexpr i64 kAbreast = 8;  // rows going down together: one's loads do not wait for another's

// Eight rows, or fewer that are repeated, down one tree. No branch depends on a value.
inline void down(const ForestNode* nodes, std::int32_t root, i64 depth,
                 const float* const (&x)[kAbreast], std::int32_t (&at)[kAbreast]) {
  for (i64 k = 0; k < kAbreast; k++) at[k] = root;
  for (i64 d = 0; d < depth; d++) {
    std::int32_t moved = 0;
    for (i64 k = 0; k < kAbreast; k++) {
      const ForestNode& n = nodes[at[k]];
      const float value = x[k][n.column];
      // NaN is not below anything.
      const int left = (value < n.at) | ((value != value) & n.missing_left);
      const std::int32_t next = n.child[1 - left];
      moved |= next ^ at[k];
      at[k] = next;
    }
    if (!moved) break;
  }
}

}  // namespace

void forest_sums(const ForestNode* nodes, const i64* roots, const i64* depths, i64 trees,
                 const float* x, i64 rows, i64 columns, double* out) {
  std::fill(out, out + rows, 0.0);
  for (i64 first = 0; first < rows; first += kRows) {
    const i64 last = std::min(rows, first + kRows);
    for (i64 t = 0; t < trees; t++) {
      for (i64 row = first; row < last; row += kAbreast) {
        const float* values[kAbreast];
        std::int32_t at[kAbreast];
        for (i64 k = 0; k < kAbreast; k++) values[k] = x + std::min(row + k, last - 1) * columns;
        down(nodes, static_cast<std::int32_t>(roots[t]), depths[t], values, at);
        for (i64 k = 0; k < std::min(kAbreast, last - row); k++) out[row + k] += nodes[at[k]].at;
      }
    }
  }
}

}  // namespace mergeprobe
