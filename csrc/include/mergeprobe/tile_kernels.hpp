// Inner kernels of P2, per instruction set. csrc/cpu/tile_kernels.cpp holds those that are chains
// of multiply-adds, csrc/cpu/tile_rules.cpp the elementwise ones, compiled without contraction so
// that they are what they are written as.
#pragma once
#include "mergeprobe/tiles.hpp"

namespace mergeprobe {

// A tile of entries: kTileRows rows of kTileColumns, contiguous.
constexpr i64 kTileRows = 8, kTileColumns = 48, kTile = kTileRows * kTileColumns;

// Where the random bits of the entries of a row start.
struct HashRow {
  std::uint32_t lower;  // of the position of its first entry
  std::uint32_t key, key2;
};

struct TileProducts {
  // Widens `rank` rows, columns [first, first + columns), to out[k][width], zeros after `columns`.
  // False when something is not finite in float32.
  bool (*pack)(const Matrix& m, i64 rank, i64 first, i64 columns, i64 width, float* out);
  // tile[i][j] = scale * sum over k of b[k][i] a[k][j], k in order.
  void (*delta)(const float* b, const float* a, i64 rank, float scale, float* tile);
  // c[i][:] (+)= sum over t of a[i * row + t * step] * x[t][:], i < kTileRows, `width` columns.
  void (*multiply)(const float* a, i64 row, i64 step, i64 depth, const float* x, i64 ldx, i64 width,
                   float* c, i64 ldc, bool accumulate);
};

struct TileKernels {
  const TileProducts* products;

  // out[j] = 1 where low <= |x[j]| <= high, else 0.
  void (*mark_magnitude)(const float* x, i64 n, float low, float high, float* out);
  // What survives, times rescale; the others become 0. n is a multiple of 16.
  void (*keep_magnitude)(float* x, i64 n, float low, float high, float rescale);
  // One row of kTileColumns, entries whose bits are below `limit`.
  void (*keep_random)(float* x, const HashRow& row, std::uint32_t limit, float rescale);
  void (*rescale)(float* x, i64 n, float rescale);

  // out[j] from x[i * stride + j], i < count.
  void (*sum)(const float* x, i64 stride, const TileAdapter* a, i64 count, float divisor, i64 n,
              float* out);
  void (*ties)(const float* x, i64 stride, const TileAdapter* a, i64 count, const TileRule& rule,
               i64 n, float* out);
  void (*fisher)(const float* x, const float* f, i64 stride, const TileAdapter* a, i64 count,
                 float floor, i64 n, float* out);
  void (*subtract)(float* x, const float* y, i64 n);

  double (*squares)(const float* x, i64 n);
  // Adds to out; kept[j] is 1 where x[j] survived, else 0.
  void (*norms)(const float* x, const float* kept, i64 n, TileNorms* out);
  // Entries as integers, |x| by its bits: adds how many are >= high to `above`, writes those in
  // [low, high) to `out`, which has room for n + 16, and returns how many.
  i64 (*between)(const float* x, i64 n, std::uint32_t low, std::uint32_t high, i64* above,
                 float* out);
};

}  // namespace mergeprobe
