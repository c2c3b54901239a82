// Plain types shared by every kernel: raw pointers and strides, no Python, no torch.
#pragma once
#include <cstdint>

namespace mergeprobe {

using i64 = std::int64_t;

enum class Dtype : std::int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

constexpr i64 itemsize(Dtype d) { return d == Dtype::f64 ? 8 : d == Dtype::f32 ? 4 : 2; }

// A matrix anywhere in memory; strides in elements. For a factor, rows are the rank index and
// columns the dimension: A (r, d_in) as it is, B (d_out, r) with its strides swapped.
struct Matrix {
  const void* data;
  i64 row_stride;
  i64 col_stride;
  Dtype dtype;
};

inline const void* at(const Matrix& m, i64 row, i64 col) {
  return static_cast<const char*>(m.data) +
         (row * m.row_stride + col * m.col_stride) * itemsize(m.dtype);
}

}  // namespace mergeprobe
