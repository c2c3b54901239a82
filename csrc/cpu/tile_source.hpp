// The factors of a module as the tile kernels read them: A packed once in panels of kTileColumns,
// B for a few rows at a time.
#pragma once
#include <atomic>

#include "mergeprobe/parallel.hpp"
#include "mergeprobe/tile_kernels.hpp"

namespace mergeprobe {

// The first factor that is not finite, whatever thread meets it.
class FirstBad {
 public:
  void report(i64 which, bool left) {
    const i64 code = 2 * which + (left ? 0 : 1);
    i64 seen = code_.load(std::memory_order_relaxed);
    while (code < seen && !code_.compare_exchange_weak(seen, code)) {
    }
  }
  TileStatus status() const {
    const i64 code = code_.load();
    if (code == kNone) return {Status::ok, -1};
    return {code % 2 ? Status::not_finite_v : Status::not_finite_u, code / 2};
  }

 private:
  static constexpr i64 kNone = INT64_MAX;
  std::atomic<i64> code_{kNone};
};

class TileSource {
 public:
  TileSource(const Segment* segments, i64 n, i64 d_in, i64 first_number, const TileKernels& kernels,
             FirstBad& bad)
      : segments_(segments), n_(n), d_in_(d_in), number_(first_number), k_(*kernels.products),
        bad_(bad) {}

  i64 blocks() const { return (d_in_ + kTileColumns - 1) / kTileColumns; }
  i64 rank() const {
    i64 total = 0;
    for (i64 i = 0; i < n_; i++) total += segments_[i].rank;
    return total;
  }

  void pack_a(int threads) {
    const i64 rows = rank();
    a_.reserve(rows * blocks() * kTileColumns + 1);
    // Starting threads takes as long as packing this much.
    if (rows * d_in_ < (i64{1} << 18)) threads = 1;
    parallel_for(blocks(), threads, [&](i64 block, int) {
      float* out = a_.data() + block * rows * kTileColumns;
      const i64 first = block * kTileColumns;
      const i64 columns = d_in_ - first < kTileColumns ? d_in_ - first : kTileColumns;
      for (i64 i = 0; i < n_; i++) {
        const Segment& s = segments_[i];
        if (!k_.pack(s.v, s.rank, first, columns, kTileColumns, out))
          bad_.report(number_ + i, false);
        out += s.rank * kTileColumns;
      }
    });
    rank_ = rows;
  }

  // Rows [row, row + count) of every B as [delta][k][kTileRows], zeros after `count`.
  void pack_b(i64 row, i64 count, float* out) const {
    for (i64 i = 0; i < n_; i++) {
      const Segment& s = segments_[i];
      if (!k_.pack(s.u, s.rank, row, count, kTileRows, out)) bad_.report(number_ + i, true);
      out += s.rank * kTileRows;
    }
  }

  // The tiles of all deltas at one block of columns, from what pack_b wrote, `stride` apart.
  void tiles(const float* b, i64 block, float* out, i64 stride) const {
    const float* a = a_.data() + block * rank_ * kTileColumns;
    for (i64 i = 0; i < n_; i++) {
      const i64 r = segments_[i].rank;
      k_.delta(b, a, r, static_cast<float>(segments_[i].scale), out + i * stride);
      a += r * kTileColumns;
      b += r * kTileRows;
    }
  }

 private:
  const Segment* segments_;
  i64 n_, d_in_, number_, rank_ = 0;
  const TileProducts& k_;
  FirstBad& bad_;
  Buffer<float> a_;
};

// Sets the entries of a tile that lie outside the matrix; returns how many there are.
inline i64 set_outside(float* tile, i64 rows, i64 columns, float value) {
  if (rows >= kTileRows && columns >= kTileColumns) return 0;
  for (i64 r = 0; r < kTileRows; r++)
    for (i64 c = r < rows ? columns : 0; c < kTileColumns; c++) tile[r * kTileColumns + c] = value;
  const i64 down = rows < kTileRows ? rows : kTileRows;
  return kTile - down * (columns < kTileColumns ? columns : kTileColumns);
}

// Calls visit(delta, row, column, rows left, columns left, tile) for every tile of rows
// [first, last), columns inside rows.
template <class Visit>
void each_tile(const TileSource& source, i64 n, i64 d_in, i64 first, i64 last, float* b,
               float* tiles, const Visit& visit) {
  for (i64 row = first; row < last; row += kTileRows) {
    source.pack_b(row, last - row < kTileRows ? last - row : kTileRows, b);
    for (i64 block = 0; block < source.blocks(); block++) {
      source.tiles(b, block, tiles, kTile);
      const i64 column = block * kTileColumns;
      for (i64 i = 0; i < n; i++)
        visit(i, row, column, last - row, d_in - column, tiles + i * kTile);
    }
  }
}

}  // namespace mergeprobe
