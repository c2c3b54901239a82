// P2 that ends in numbers: norms before and after pruning.
#include <algorithm>
#include <cmath>
#include <vector>

#include "tile_keep.hpp"
#include "tile_source.hpp"

namespace mergeprobe {
namespace {

constexpr i64 kTaskRows = 64;  // rows whose sums are taken apart, and added in order

void add(const TileNorms& x, TileNorms& sum) {
  sum.l1 += x.l1;
  sum.l1_kept += x.l1_kept;
  sum.squares += x.squares;
  sum.squares_kept += x.squares_kept;
  sum.largest = std::max(sum.largest, x.largest);
  sum.largest_kept = std::max(sum.largest_kept, x.largest_kept);
  sum.kept += x.kept;
}

}  // namespace

TileStatus tile_norms(const TileModule& m, TileNorms* out, const TileOptions& options) {
  const TileKernels& k = *options.kernels->tiles;
  FirstBad bad;
  TileSource source(m.deltas, m.n, m.d_in, 0, k, bad);
  source.pack_a(options.threads);
  const Keeper keeper(m, k);
  const i64 tasks = (m.d_out + kTaskRows - 1) / kTaskRows;
  std::vector<TileNorms> parts(static_cast<std::size_t>(tasks * m.n), TileNorms{});
  parallel_for(tasks, options.threads, [&](i64 task, int) {
    const i64 first = task * kTaskRows, last = std::min(m.d_out, first + kTaskRows);
    const i64 width = source.blocks() * kTileColumns, span = kTileRows * width;
    Buffer<float> b(source.rank() * kTileRows + 1), tiles((m.n + 1) * kTile);
    TileNorms* part = parts.data() + task * m.n;
    float* marks = tiles.data() + m.n * kTile;
    if (!keeper.by_row()) {
      each_tile(source, m.n, m.d_in, first, last, b.data(), tiles.data(),
                [&](i64 i, i64 row, i64 column, i64 rows, i64 columns, const float* x) {
                  keeper.marks(i, row, column, x, marks);
                  set_outside(marks, rows, columns, 0.0f);
                  k.norms(x, marks, kTile, part + i);
                });
      return;
    }
    Buffer<float> rows(m.n * span), row_marks(width);
    std::vector<std::uint64_t> scratch;
    for (i64 row = first; row < last; row += kTileRows) {
      each_tile(source, m.n, m.d_in, row, std::min(last, row + kTileRows), b.data(), tiles.data(),
                [&](i64 i, i64, i64 column, i64, i64, const float* x) {
                  for (i64 r = 0; r < kTileRows; r++)
                    std::copy_n(x + r * kTileColumns, kTileColumns,
                                rows.data() + i * span + r * width + column);
                });
      for (i64 i = 0; i < m.n; i++)
        for (i64 r = 0; r < kTileRows && row + r < last; r++) {
          const float* x = rows.data() + i * span + r * width;
          std::fill_n(row_marks.data(), width, 0.0f);
          keeper.della(i, row + r, x, row_marks.data(), true, scratch);
          k.norms(x, row_marks.data(), width, part + i);
        }
    }
  });
  std::fill_n(out, m.n, TileNorms{});
  double all = 0;
  for (i64 task = 0; task < tasks; task++)
    for (i64 i = 0; i < m.n; i++) add(parts[task * m.n + i], out[i]);
  for (i64 i = 0; i < m.n; i++) all += out[i].squares;
  const TileStatus status = bad.status();
  if (status.status == Status::ok && !std::isfinite(all)) return {Status::no_convergence, 0};
  return status;
}

}  // namespace mergeprobe
