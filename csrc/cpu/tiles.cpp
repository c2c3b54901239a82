#include "mergeprobe/tiles.hpp"

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "tile_keep.hpp"
#include "tile_source.hpp"

namespace mergeprobe {
namespace {

constexpr i64 kDepth = 256;      // columns of M per product with x
constexpr i64 kChunkRows = 256;  // rows whose part of M^T Y is summed apart

// Lets tasks through in order.
class Turns {
 public:
  template <class Body>
  void in_turn(i64 task, const Body& body) {
    std::unique_lock<std::mutex> lock(mutex_);
    ready_.wait(lock, [&] { return next_ == task; });
    body();
    next_++;
    ready_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable ready_;
  i64 next_ = 0;
};

// A thread's own memory, taken before the work starts: what runs in turn must not throw.
struct Worker {
  Buffer<float> b, fisher_b, minus_b, tiles, fisher_tiles, rows, fisher_rows, merged, y, z;
  std::vector<std::uint64_t> sort;
};

class Merge {
 public:
  Merge(const TileModule& m, TileTarget& t, const TileOptions& o)
      : m_(m), t_(t), options_(o), k_(*o.kernels->tiles), keeper_(m, k_),
        deltas_(m.deltas, m.n, m.d_in, 0, k_, bad_),
        fisher_(m.fisher, m.fisher ? m.n : 0, m.d_in, m.n, k_, bad_),
        minus_(t.minus, t.minus ? 1 : 0, m.d_in, 2 * m.n, k_, bad_) {
    // An odd number of lines per row: the rows of a column then lie in different sets of the cache.
    ld_ = (deltas_.blocks() | 1) * kTileColumns;
    strip_ = ld_ <= 6144 ? 32 : 16;  // rows of M that stay in L2
    double weights = 0;
    for (i64 i = 0; i < m.n; i++) weights += static_cast<double>(m.adapters[i].weight);
    if (m.rule->divide == Divide::weights && std::fabs(weights) >= 1e-8)
      divisor_ = static_cast<float>(weights);
  }

  TileStatus run() {
    const i64 rows = t_.last - t_.first, per_task = t_.z ? kChunkRows : strip_;
    const i64 tasks = (rows + per_task - 1) / per_task;
    const int threads = static_cast<int>(std::min<i64>(options_.threads, std::max<i64>(tasks, 1)));
    for (TileSource* s : {&deltas_, &fisher_, &minus_}) s->pack_a(options_.threads);
    std::vector<std::unique_ptr<Worker>> workers;
    for (int w = 0; w < threads; w++) workers.push_back(worker());
    std::vector<double> squares(static_cast<std::size_t>((rows + strip_ - 1) / strip_), 0.0);
    Turns turns;
    parallel_for(tasks, threads, [&](i64 task, int w) {
      const i64 first = t_.first + task * per_task, last = std::min(t_.last, first + per_task);
      for (i64 row = first; row < last; row += strip_)
        squares[(row - t_.first) / strip_] =
            strip(row, std::min(last, row + strip_), row == first, *workers[w]);
      if (t_.z) turns.in_turn(task, [&] { add_z(*workers[w], task == 0); });
    });
    t_.squares = 0;
    for (double s : squares) t_.squares += s;
    if (t_.z && tasks == 0) std::fill_n(t_.z, m_.d_in * t_.width, 0.0f);
    const TileStatus status = bad_.status();
    if (status.status == Status::ok && !std::isfinite(t_.squares))
      return {Status::no_convergence, 0};
    return status;
  }

 private:
  std::unique_ptr<Worker> worker() const {
    auto w = std::make_unique<Worker>();
    w->b.reserve(deltas_.rank() * strip_ + 1);
    w->fisher_b.reserve(fisher_.rank() * strip_ + 1);
    w->minus_b.reserve(minus_.rank() * strip_ + 1);
    w->tiles.reserve((m_.n + 1) * kTile);
    if (m_.fisher) w->fisher_tiles.reserve(m_.n * kTile);
    if (keeper_.by_row()) w->rows.reserve(m_.n * kTileRows * ld_);
    if (keeper_.by_row() && m_.fisher) w->fisher_rows.reserve(m_.n * kTileRows * ld_);
    w->merged.reserve(strip_ * ld_);
    if (t_.x) w->y.reserve(strip_ * t_.width + 1);
    if (t_.z) w->z.reserve(ld_ * t_.width + 1);
    if (keeper_.by_row()) w->sort.resize(static_cast<std::size_t>(2 * m_.d_in));
    return w;
  }

  // Merged rows [first, last) and everything that is made of them; returns their squares.
  double strip(i64 first, i64 last, bool first_of_chunk, Worker& w) const {
    const i64 groups = (last - first + kTileRows - 1) / kTileRows;
    for (i64 g = 0; g < groups; g++) {
      const i64 row = first + g * kTileRows, count = std::min(kTileRows, last - row);
      deltas_.pack_b(row, count, w.b.data() + g * deltas_.rank() * kTileRows);
      fisher_.pack_b(row, count, w.fisher_b.data() + g * fisher_.rank() * kTileRows);
      minus_.pack_b(row, count, w.minus_b.data() + g * minus_.rank() * kTileRows);
    }
    if (keeper_.by_row()) {
      for (i64 g = 0; g < groups; g++) whole_rows(first, g, last, w);
    } else {
      // Columns outside, so that the panels of A are read from L1 for all but the first rows.
      for (i64 block = 0; block < deltas_.blocks(); block++)
        for (i64 g = 0; g < groups; g++) one_tile(first, g, block, w);
    }
    const i64 filled = deltas_.blocks() * kTileColumns;
    for (i64 r = 0; filled < ld_ && r < groups * kTileRows; r++)
      std::fill_n(w.merged.data() + r * ld_ + filled, ld_ - filled, 0.0f);

    if (t_.dense)
      for (i64 row = first; row < last; row++)
        std::copy_n(w.merged.data() + (row - first) * ld_, m_.d_in,
                    t_.dense + (row - t_.first) * t_.dense_stride);
    if (t_.x && t_.width) products(first, last, groups, first_of_chunk, w);
    return k_.squares(w.merged.data(), groups * kTileRows * ld_);
  }

  void one_tile(i64 first, i64 g, i64 block, Worker& w) const {
    float *x = w.tiles.data(), *f = w.fisher_tiles.data(), *out = x + m_.n * kTile;
    deltas_.tiles(w.b.data() + g * deltas_.rank() * kTileRows, block, x, kTile);
    for (i64 i = 0; i < m_.n; i++)
      keeper_.tile(i, first + g * kTileRows, block * kTileColumns, x + i * kTile);
    if (m_.fisher)
      fisher_.tiles(w.fisher_b.data() + g * fisher_.rank() * kTileRows, block, f, kTile);
    combine(x, f, kTile, kTile, out);
    place(out, block, w.merged.data() + g * kTileRows * ld_);
    if (t_.minus) subtract_minus(g, block, w);
  }

  // Rules that look at a row at a time: the rows of every delta, then the same combination.
  void whole_rows(i64 first, i64 g, i64 last, Worker& w) const {
    const i64 span = kTileRows * ld_, row = first + g * kTileRows;
    gather(deltas_, w.b.data() + g * deltas_.rank() * kTileRows, w.tiles.data(), w.rows.data());
    for (i64 i = 0; i < m_.n; i++)
      for (i64 r = 0; r < kTileRows && row + r < last; r++) {
        float* x = w.rows.data() + i * span + r * ld_;
        keeper_.della(i, row + r, x, x, false, w.sort);
      }
    if (m_.fisher)
      gather(fisher_, w.fisher_b.data() + g * fisher_.rank() * kTileRows, w.fisher_tiles.data(),
             w.fisher_rows.data());
    combine(w.rows.data(), w.fisher_rows.data(), span, span, w.merged.data() + g * span);
    for (i64 block = 0; t_.minus && block < deltas_.blocks(); block++) subtract_minus(g, block, w);
  }

  void gather(const TileSource& source, const float* b, float* tiles, float* rows) const {
    std::fill_n(rows, m_.n * kTileRows * ld_, 0.0f);
    for (i64 block = 0; block < source.blocks(); block++) {
      source.tiles(b, block, tiles, kTile);
      for (i64 i = 0; i < m_.n; i++) place(tiles + i * kTile, block, rows + i * kTileRows * ld_);
    }
  }

  void combine(const float* x, const float* f, i64 stride, i64 n, float* out) const {
    switch (m_.rule->combine) {
      case Combine::sum: return k_.sum(x, stride, m_.adapters, m_.n, divisor_, n, out);
      case Combine::ties: return k_.ties(x, stride, m_.adapters, m_.n, *m_.rule, n, out);
      case Combine::fisher:
        return k_.fisher(x, f, stride, m_.adapters, m_.n, m_.rule->floor, n, out);
    }
  }

  void place(const float* tile, i64 block, float* rows) const {
    for (i64 r = 0; r < kTileRows; r++)
      std::copy_n(tile + r * kTileColumns, kTileColumns, rows + r * ld_ + block * kTileColumns);
  }

  void subtract_minus(i64 g, i64 block, Worker& w) const {
    float* tile = w.tiles.data();
    float* to = w.merged.data() + g * kTileRows * ld_ + block * kTileColumns;
    minus_.tiles(w.minus_b.data() + g * minus_.rank() * kTileRows, block, tile, kTile);
    for (i64 r = 0; r < kTileRows; r++)
      k_.subtract(to + r * ld_, tile + r * kTileColumns, kTileColumns);
  }

  void products(i64 first, i64 last, i64 groups, bool first_of_chunk, Worker& w) const {
    const TileProducts& p = *k_.products;
    for (i64 k0 = 0; k0 < m_.d_in; k0 += kDepth)
      for (i64 g = 0; g < groups; g++)
        p.multiply(w.merged.data() + g * kTileRows * ld_ + k0, ld_, 1,
                   std::min(kDepth, m_.d_in - k0), t_.x + k0 * t_.width, t_.width, t_.width,
                   w.y.data() + g * kTileRows * t_.width, t_.width, k0 > 0);
    if (t_.y)
      std::copy_n(w.y.data(), (last - first) * t_.width, t_.y + (first - t_.first) * t_.width);
    if (t_.z)
      for (i64 j = 0; j < m_.d_in; j += kTileRows)
        p.multiply(w.merged.data() + j, 1, ld_, groups * kTileRows, w.y.data(), t_.width, t_.width,
                   w.z.data() + j * t_.width, t_.width, !first_of_chunk);
  }

  void add_z(const Worker& w, bool first) const {
    const i64 n = m_.d_in * t_.width;
    if (first) {
      std::copy_n(w.z.data(), n, t_.z);
    } else {
      for (i64 j = 0; j < n; j++) t_.z[j] += w.z[j];
    }
  }

  const TileModule& m_;
  TileTarget& t_;
  const TileOptions& options_;
  const TileKernels& k_;
  FirstBad bad_;
  Keeper keeper_;
  TileSource deltas_, fisher_, minus_;
  i64 ld_ = 0, strip_ = 0;
  float divisor_ = 1.0f;
};

}  // namespace

TileStatus merge_tiles(const TileModule& module, TileTarget& target, const TileOptions& options) {
  return Merge(module, target, options).run();
}

}  // namespace mergeprobe
