// P2, delta tiles: the entries of every delta s B A of a module, rebuilt a tile at a time in
// float32, an elementwise rule on them, and the result written, multiplied or counted. No delta
// exists as a whole. An entry is one chain of multiply-adds over the rank in order, then the scale:
// the same bits in whatever tile it lies.
#pragma once
#include "mergeprobe/canonical.hpp"
#include "mergeprobe/kernels.hpp"

namespace mergeprobe {

enum class Keep : std::int32_t { all = 0, magnitude = 1, random = 2, della = 3 };
enum class Combine : std::int32_t { sum = 0, ties = 1, fisher = 2 };
enum class Elect : std::int32_t { total = 0, frequency = 1 };
enum class Divide : std::int32_t { none = 0, count = 1, weights = 2 };

// One adapter of a module; the layout is TILE_ADAPTER of mergeprobe_fast/ops/_tables.py.
struct TileAdapter {
  double density;        // chance of surviving, for Keep::random and Keep::della
  std::uint64_t stream;  // which random numbers are this adapter's
  float weight;
  float low, high;  // Keep::magnitude keeps low <= |x| <= high
  float rescale;    // multiplied into what survives
};

// mergeprobe_fast/ops/tiles_rule.py says what each field means; the layout is TILE_RULE.
struct TileRule {
  Keep keep;
  Combine combine;
  Elect elect;
  Divide divide;
  std::int32_t elect_weighted;
  std::int32_t zero_sign;
  float floor;
  std::int32_t pad;
  double epsilon;
  std::uint64_t seed;
};

struct TileModule {
  const Segment* deltas;
  const Segment* fisher;  // as many, or nullptr
  const TileAdapter* adapters;
  i64 n;
  i64 d_out, d_in;
  const TileRule* rule;
};

// The products of one pass; null pointers are left out. Rows are those of [first, last).
struct TileTarget {
  i64 first, last;
  float* dense;  // rows of `dense_stride`
  i64 dense_stride;
  const Segment* minus;  // subtracted from the merged delta before anything else
  const float* x;        // d_in x width
  i64 width;             // a multiple of 16
  float* y;              // M X, (last - first) x width
  float* z;              // M^T Y, d_in x width
  double squares;        // out: ||M||_F^2
};

// Before and after `keep`, without `rescale`.
struct TileNorms {
  double l1, l1_kept, squares, squares_kept, largest, largest_kept;
  i64 kept;
};

struct TileOptions {
  const Kernels* kernels;
  int threads;
};

// `which` is the first delta (then n + the first Fisher factor) that is not finite. Statuses:
// not_finite_u is B, not_finite_v is A; no_convergence: products overflow float32.
struct TileStatus {
  Status status;
  i64 which;
};

// Sums over d_in run in blocks of 256 columns; those over d_out in blocks of 256 rows, which are
// added in order: nothing depends on the number of threads. Throw std::bad_alloc.
TileStatus merge_tiles(const TileModule& module, TileTarget& target, const TileOptions& options);
TileStatus tile_norms(const TileModule& module, TileNorms* out, const TileOptions& options);

struct OrderBlock {
  Segment delta;
  i64 d_out, d_in;
};

// out[j]: the counts[j]-th largest |x| over all entries of the blocks; infinity for 0, 0 from the
// number of entries on.
TileStatus order_statistics(const OrderBlock* blocks, i64 n, const i64* counts, i64 n_counts,
                            float* out, const TileOptions& options);

}  // namespace mergeprobe
