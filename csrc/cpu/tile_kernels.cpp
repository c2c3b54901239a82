// The multiply-adds of P2, compiled once per instruction set like kernels.cpp, which says why
// nothing but the tables may have external linkage.
#include "mergeprobe/tile_kernels.hpp"

#include <type_traits>

#include "simd.hpp"

namespace mergeprobe {
namespace {

constexpr int W = Lanes<float>::count;
// 24 accumulators, 3 rows of x and a broadcast fill AVX-512's registers, 12 + 3 + 1 the others'.
constexpr int kRows = MP_BYTES == 64 ? 8 : 4;
constexpr int kPanels = 3;

template <class S>
MP_INLINE std::uint32_t pack_strided(const S* s, i64 stride, i64 columns, float* MP_RESTRICT out) {
  std::uint32_t bad = 0;
  for (i64 j = 0; j < columns; j++) {
    out[j] = static_cast<float>(widen(s[j * stride]));
    std::uint32_t bits;
    std::memcpy(&bits, out + j, 4);
    bad |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return bad;
}

template <class S>
bool pack_row(const S* s, i64 stride, i64 columns, float* out) {
  // Neighbours apart: only that loop becomes vector instructions.
  return !(stride == 1 ? pack_strided(s, 1, columns, out) : pack_strided(s, stride, columns, out));
}

bool pack(const Matrix& m, i64 rank, i64 first, i64 columns, i64 width, float* out) {
  bool finite = true;
  for (i64 k = 0; k < rank; k++, out += width) {
    const char* start = static_cast<const char*>(m.data) +
                        (k * m.row_stride + first * m.col_stride) * itemsize(m.dtype);
    auto row = [&](auto* s) { finite = pack_row(s, m.col_stride, columns, out) && finite; };
    switch (m.dtype) {
      case Dtype::f32: row(reinterpret_cast<const float*>(start)); break;
      case Dtype::bf16: row(reinterpret_cast<const bf16*>(start)); break;
      case Dtype::f16: row(reinterpret_cast<const f16*>(start)); break;
      case Dtype::f64: row(reinterpret_cast<const double*>(start)); break;
    }
    for (i64 j = columns; j < width; j++) out[j] = 0;
  }
  return finite;
}

// c[i][p] = sum over t of a[i * row + t * step] * x[t][p]: one chain per entry, t in order.
template <int P>
MP_INLINE void chains(const float* a, i64 row, i64 step, i64 depth, const float* x, i64 ldx,
                      vec_t<float> (&acc)[kRows][kPanels]) {
  MP_UNROLL(8)
  for (int i = 0; i < kRows; i++)
    MP_UNROLL(3)
    for (int p = 0; p < P; p++) acc[i][p] = broadcast<float>(0);
  for (i64 t = 0; t < depth; t++, a += step, x += ldx) {
    vec_t<float> line[P];
    MP_UNROLL(3)
    for (int p = 0; p < P; p++) line[p] = load(x + p * W);
    MP_UNROLL(8)
    for (int i = 0; i < kRows; i++) {
      const vec_t<float> y = broadcast(a[i * row]);
      MP_UNROLL(3)
      for (int p = 0; p < P; p++) acc[i][p] = acc[i][p] + y * line[p];
    }
  }
}

void delta(const float* b, const float* a, i64 rank, float scale, float* tile) {
  const vec_t<float> s = broadcast(scale);
  for (i64 i0 = 0; i0 < kTileRows; i0 += kRows)
    for (i64 j0 = 0; j0 < kTileColumns; j0 += kPanels * W) {
      vec_t<float> acc[kRows][kPanels];
      chains<kPanels>(b + i0, 1, kTileRows, rank, a + j0, kTileColumns, acc);
      MP_UNROLL(8)
      for (int i = 0; i < kRows; i++)
        MP_UNROLL(3)
        for (int p = 0; p < kPanels; p++)
          store(tile + (i0 + i) * kTileColumns + j0 + p * W, acc[i][p] * s);
    }
}

template <int P>
MP_NOINLINE void block(const float* a, i64 row, i64 step, i64 depth, const float* x, i64 ldx,
                       float* c, i64 ldc, bool accumulate) {
  vec_t<float> acc[kRows][kPanels];
  chains<P>(a, row, step, depth, x, ldx, acc);
  MP_UNROLL(8)
  for (int i = 0; i < kRows; i++)
    MP_UNROLL(3)
    for (int p = 0; p < P; p++) {
      float* q = c + i * ldc + p * W;
      store(q, accumulate ? load(q) + acc[i][p] : acc[i][p]);
    }
}

void multiply(const float* a, i64 row, i64 step, i64 depth, const float* x, i64 ldx, i64 width,
              float* c, i64 ldc, bool accumulate) {
  for (i64 j = 0; j < width;) {
    // Threes, but two pairs rather than a three and a one, which would wait for its own results.
    const i64 left = (width - j) / W;
    const int panels = left == 3 || left >= 5 ? 3 : left >= 2 ? 2 : 1;
    for (i64 i = 0; i < kTileRows; i += kRows) {
      const float* from = a + i * row;
      float* to = c + i * ldc + j;
      if (panels == 3) {
        block<3>(from, row, step, depth, x + j, ldx, to, ldc, accumulate);
      } else if (panels == 2) {
        block<2>(from, row, step, depth, x + j, ldx, to, ldc, accumulate);
      } else {
        block<1>(from, row, step, depth, x + j, ldx, to, ldc, accumulate);
      }
    }
    j += panels * W;
  }
}

}  // namespace

#define MP_JOIN_(a, b) a##b
#define MP_JOIN(a, b) MP_JOIN_(a, b)

extern const TileProducts MP_JOIN(tile_products_, MP_ISA);
const TileProducts MP_JOIN(tile_products_, MP_ISA) = {pack, delta, multiply};

}  // namespace mergeprobe
