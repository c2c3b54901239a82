// The entries of a module's deltas, tile by tile, from factors that are packed once.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "mergeprobe/entries.hpp"
#include "tile_source.hpp"

namespace mergeprobe {

// Entries of every delta that are compared at once stay in L2: floats, or bits alone.
constexpr i64 kRegion = 1536, kBitRegion = 16 * kRegion;
// Groups of rows that go through the panels of A together: those are read from L1 then.
constexpr i64 kStrip = 4, kBitStrip = 16;
constexpr i64 kEntryStripes = 64;  // of a module, at most: what threads share out

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// The packed factors of a module, and the tiles in the order in which they are visited. Columns of
// a panel lie in a row, rows of a group too: [delta][panel][k][width], [delta][group][k][8].
class Entries {
 public:
  // Every entry in order: down a strip of that many groups of rows, then the next panel.
  Entries(const EntryModule& m, const Kernels& kernels, i64 strip, FirstBad& bad)
      : m_(m), k_(*kernels.entries), products_(*kernels.tiles->products), bad_(bad),
        sampled_(m.sample.tiles > 0), width_(sampled_ ? kSampleColumns : kTileColumns),
        strip_(strip),
        groups_(ceil_div(m.d_out, kTileRows)), panels_(ceil_div(m.d_in, width_)) {
    for (i64 i = 0; i < m.n; i++) {
      starts_.push_back(rank_);
      rank_ += m.deltas[i].rank;
    }
    period_ = std::lcm(groups_, panels_);
    tiles_ = sampled_ ? std::min(m.sample.tiles, groups_ * panels_) : groups_ * panels_;
  }

  i64 tiles() const { return tiles_; }
  i64 size() const { return kTileRows * width_; }  // entries of a tile

  void pack(int threads) {
    packed_groups_ = std::min(groups_, tiles_);
    packed_panels_ = sampled_ ? std::min(panels_, tiles_) : panels_;
    b_.reserve(packed_groups_ * rank_ * kTileRows + 1);
    a_.reserve(packed_panels_ * rank_ * width_ + 1);
    // Starting threads takes as long as packing this much.
    if (rank_ * (m_.d_in + m_.d_out) < (i64{1} << 18)) threads = 1;
    parallel_for(2 * m_.n, threads, [&](i64 task, int) {
      const i64 i = task / 2;
      const bool left = task % 2 == 0;
      const Segment& s = m_.deltas[i];
      const i64 width = left ? kTileRows : width_, size = left ? m_.d_out : m_.d_in;
      const i64 count = std::min(size, (left ? packed_groups_ : packed_panels_) * width);
      float* out = left ? b_.data() + starts_[i] * packed_groups_ * width
                        : a_.data() + starts_[i] * packed_panels_ * width;
      const Matrix& x = left ? s.u : s.v;
      bool finite = true;
      if (sampled_) {
        const std::int32_t* index = left ? m_.sample.rows : m_.sample.columns;
        finite = k_.gather(x, s.rank, index, count, width, out);
      } else {
        for (i64 first = 0; first < count; first += width, out += s.rank * width)
          finite = products_.pack(x, s.rank, first, std::min(width, count - first), width, out) &&
                   finite;
      }
      if (!finite) bad_.report(i, left);
    });
  }

  void place(i64 t, i64& group, i64& panel) const {
    if (sampled_) {
      group = t % groups_;
      panel = (t + t / period_) % panels_;
      return;
    }
    const i64 first = t / (strip_ * panels_) * strip_;
    const i64 height = std::min(strip_, groups_ - first), inside = t - first * panels_;
    group = first + inside % height;
    panel = inside / height;
  }

  // Entries of tile t that are in the matrix.
  i64 valid(i64 t) const {
    i64 group, panel;
    place(t, group, panel);
    return std::min(kTileRows, m_.d_out - group * kTileRows) *
           std::min(width_, m_.d_in - panel * width_);
  }

  void tile(i64 i, i64 t, float* out) const {
    i64 group, panel;
    place(t, group, panel);
    k_.tile(b(i, group), a(i, panel), m_.deltas[i].rank, scale(i), width_, out);
  }

  i64 tile_signs(i64 i, i64 t, std::uint64_t* negative, std::uint64_t* nonzero) const {
    i64 group, panel;
    place(t, group, panel);
    return k_.tile_signs(b(i, group), a(i, panel), m_.deltas[i].rank, scale(i), width_, negative,
                         nonzero);
  }

 private:
  const float* b(i64 i, i64 group) const {
    return b_.data() + (starts_[i] * packed_groups_ + group * m_.deltas[i].rank) * kTileRows;
  }
  const float* a(i64 i, i64 panel) const {
    return a_.data() + (starts_[i] * packed_panels_ + panel * m_.deltas[i].rank) * width_;
  }
  float scale(i64 i) const { return static_cast<float>(m_.deltas[i].scale); }

  const EntryModule& m_;
  const EntryKernels& k_;
  const TileProducts& products_;
  FirstBad& bad_;
  bool sampled_;
  i64 width_, strip_, groups_, panels_, period_ = 1, tiles_ = 0, rank_ = 0;
  i64 packed_groups_ = 0, packed_panels_ = 0;
  std::vector<i64> starts_;
  Buffer<float> a_, b_;
};

inline TileStatus checked(const FirstBad& bad, bool finite) {
  const TileStatus status = bad.status();
  if (status.status == Status::ok && !finite) return {Status::no_convergence, 0};
  return status;
}

}  // namespace mergeprobe
