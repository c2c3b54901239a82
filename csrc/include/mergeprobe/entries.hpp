// P2, statistics of the entries of deltas: signs, magnitudes and the largest ones, of each delta
// and of each pair, from tiles that exist for a moment. Entries are those of mergeprobe/tiles.hpp.
// All are looked at, or a sample that uses every row as often as any other, and every column.
#pragma once
#include "mergeprobe/tiles.hpp"

namespace mergeprobe {

// A sample: tiles of kTileRows x kSampleColumns along the diagonals of the matrix with its rows and
// columns in these orders. Tile t lies at group t % groups of rows and panel (t + t / lcm) % panels
// of columns, lcm that of the two numbers: each pair is met once in groups * panels tiles.
struct EntrySample {
  const std::int32_t* rows;     // a permutation of d_out
  const std::int32_t* columns;  // a permutation of d_in
  i64 tiles;                    // 0: every entry, in order
};

struct EntryModule {
  const Segment* deltas;
  i64 n;
  i64 d_out, d_in;
  EntrySample sample;
};

// sum over units k of |s b_k|^2 |a_k|^2, per delta: the size of what its entries are sums of.
TileStatus entry_sizes(const EntryModule& module, double* out, const TileOptions& options);

struct EntryMoments {
  double l1, squares, fourths;
  double top_squares;  // of the entries that count as top
  double threshold;    // the int(density * entries)-th largest |x|
  i64 entries;         // looked at
  i64 zeros;           // exactly 0
  i64 top;             // |x| >= threshold and not 0
};

// Of each delta. Entries must be about 1 in size (see entry_sizes): fourth powers are float32.
TileStatus entry_moments(const EntryModule& module, double density, EntryMoments* out,
                         const TileOptions& options);

// Pairs i < j; with split > 0 only i < split <= j.
struct EntryPairs {
  i64 split;
  const float* thresholds;  // of |x| of each delta, or nullptr: no `top`
  const std::int32_t* units;  // exponents of 2: x_i 2^units[i] compares with x_j 2^units[j]
  bool magnitudes;          // else no sums
  bool vpopcnt;             // use that instruction where there is one
  // counts[(i * n + j) * kEntryCounts + c], sums[(i * n + j) * kEntrySums + c]; other pairs are 0,
  // but for the sums of each delta with itself: those of a copy are the same to the bit.
  i64* counts;
  double* sums;
};
// Entries with x_i x_j < 0; with both not 0; with both top.
constexpr i64 kEntryCounts = 3;
// |x_i x_j|; over conflicts: |x_i x_j|, |x_i|, |x_j|, the smaller in units of j; (x_i x_j)^2.
constexpr i64 kEntrySums = 6;

// Results do not depend on the number of threads. Entries as for entry_moments.
TileStatus entry_pairs(const EntryModule& module, const EntryPairs& pairs,
                       const TileOptions& options);

constexpr i64 kSampleColumns = 16;

// Inner kernels. Bits of entry e: word e / 64, bit e % 64. `x` holds whole tiles; n entries are a
// multiple of 128.
struct EntryKernels {
  // out[j / width][k][j % width]: column index[j] of m, j < count, zeros up to a multiple of width,
  // which is kTileRows or kSampleColumns. False: not finite in float32.
  bool (*gather)(const Matrix& m, i64 rank, const std::int32_t* index, i64 count, i64 width,
                 float* out);
  // tile[i][j] = scale * sum over k of b[k][i] a[k][j], kTileRows x columns (48 or 16).
  void (*tile)(const float* b, const float* a, i64 rank, float scale, i64 columns, float* tile);
  // The same, no more than its bits: x < 0, and x != 0; returns how many are not 0.
  i64 (*tile_signs)(const float* b, const float* a, i64 rank, float scale, i64 columns,
                    std::uint64_t* negative, std::uint64_t* nonzero);
  // Bits x < 0, x != 0 and, where top is not nullptr, |x| >= threshold and x != 0.
  i64 (*signs)(const float* x, i64 n, float threshold, std::uint64_t* negative,
               std::uint64_t* nonzero, std::uint64_t* top);
  // Adds to out, but for threshold and entries; zeros is lowered by those that are not 0.
  void (*moments)(const float* x, i64 n, float threshold, EntryMoments* out);
  // Adds the sums of x with each of y, y + stride, ... (count <= 4) to out[c * kEntrySums].
  // ratios[c]: the unit of x over that of y.
  void (*sums)(const float* x, const float* y, i64 stride, i64 count, i64 n, const float* ratios,
               double* out);
  // out[a * 4 + b] = bits set in x[a] ^ y[b] (or in x[a] & y[b]); words is a multiple of 8.
  void (*count_xor)(const std::uint64_t* const* x, const std::uint64_t* const* y, i64 words,
                    bool vpopcnt, i64* out);
  void (*count_and)(const std::uint64_t* const* x, const std::uint64_t* const* y, i64 words,
                    bool vpopcnt, i64* out);
};

}  // namespace mergeprobe
