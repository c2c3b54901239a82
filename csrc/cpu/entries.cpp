// P2 that ends in numbers: statistics of the entries of pairs of deltas.
#include <cmath>

#include "entry_source.hpp"

namespace mergeprobe {
namespace {

using u64 = std::uint64_t;

constexpr i64 kSlotBytes = i64{128} << 20;  // partial sums of all stripes together
constexpr i64 kFewestStripes = 8;

// What a thread holds of the entries of all deltas at a time.
struct Region {
  Buffer<float> x;                      // [delta][kRegion]
  Buffer<u64> negative, nonzero, top;   // [delta][words]
  std::vector<i64> zeros;               // of each delta, in this region
};

class Pairs {
 public:
  Pairs(const EntryModule& m, const EntryPairs& p, const TileOptions& o)
      : m_(m), p_(p), options_(o), k_(*o.kernels->entries),
        floats_(p.magnitudes || p.thresholds),
        entries_(m, *o.kernels, floats_ ? kStrip : kBitStrip, bad_) {}

  TileStatus run() {
    entries_.pack(options_.threads);
    if (bad_.status().status != Status::ok) return bad_.status();
    per_region_ = (floats_ ? kRegion : kBitRegion) / entries_.size();
    words_ = per_region_ * entries_.size() / 64;
    const i64 regions = ceil_div(entries_.tiles(), per_region_), pairs = m_.n * m_.n;
    const i64 slot = pairs * 8 * (kEntryCounts + (p_.magnitudes ? kEntrySums : 0));
    const i64 stripes =
        std::min(regions, std::clamp<i64>(kSlotBytes / std::max<i64>(slot, 1), kFewestStripes,
                                          kEntryStripes));
    std::vector<i64> counts(static_cast<std::size_t>(stripes * pairs * kEntryCounts), 0);
    std::vector<double> sums(
        static_cast<std::size_t>(p_.magnitudes ? stripes * pairs * kEntrySums : 0), 0.0);
    parallel_for(stripes, options_.threads, [&](i64 stripe, int) {
      Region r;
      if (floats_) r.x.reserve(m_.n * kRegion);
      r.negative.reserve(m_.n * words_);
      r.nonzero.reserve(m_.n * words_);
      if (p_.thresholds) r.top.reserve(m_.n * words_);
      r.zeros.resize(static_cast<std::size_t>(m_.n));
      for (i64 q = stripe * regions / stripes; q < (stripe + 1) * regions / stripes; q++)
        region(q, r, counts.data() + stripe * pairs * kEntryCounts,
               p_.magnitudes ? sums.data() + stripe * pairs * kEntrySums : nullptr);
    });
    std::fill_n(p_.counts, pairs * kEntryCounts, 0);
    for (i64 s = 0; s < stripes; s++)
      for (i64 j = 0; j < pairs * kEntryCounts; j++)
        p_.counts[j] += counts[s * pairs * kEntryCounts + j];
    bool finite = true;
    if (p_.magnitudes) {
      std::fill_n(p_.sums, pairs * kEntrySums, 0.0);
      for (i64 s = 0; s < stripes; s++)
        for (i64 j = 0; j < pairs * kEntrySums; j++)
          p_.sums[j] += sums[s * pairs * kEntrySums + j];
      for (i64 j = 0; j < pairs * kEntrySums; j++) finite = finite && std::isfinite(p_.sums[j]);
    }
    return checked(bad_, finite);
  }

 private:
  void region(i64 q, Region& r, i64* counts, double* sums) const {
    const i64 first = q * per_region_, last = std::min(entries_.tiles(), first + per_region_);
    const i64 size = entries_.size(), n = m_.n;
    i64 valid = 0;
    for (i64 t = first; t < last; t++) valid += entries_.valid(t);
    for (i64 i = 0; i < n; i++) {
      u64 *negative = r.negative.data() + i * words_, *nonzero = r.nonzero.data() + i * words_;
      i64 alive = 0;
      if (floats_) {
        float* x = r.x.data() + i * kRegion;
        for (i64 t = first; t < last; t++) entries_.tile(i, t, x + (t - first) * size);
        std::fill(x + (last - first) * size, x + kRegion, 0.0f);
        u64* top = p_.thresholds ? r.top.data() + i * words_ : nullptr;
        alive = k_.signs(x, kRegion, top ? p_.thresholds[i] : 0.0f, negative, nonzero, top);
      } else {
        for (i64 t = first; t < last; t++) {
          const i64 at = (t - first) * size / 64;
          alive += entries_.tile_signs(i, t, negative + at, nonzero + at);
        }
        const i64 used = (last - first) * size / 64;
        std::fill(negative + used, negative + words_, u64{0});
        std::fill(nonzero + used, nonzero + words_, u64{0});
      }
      r.zeros[i] = valid - alive;
    }
    count_signs(r, valid, counts);
    if (p_.thresholds) count_top(r, counts);
    if (sums) add_sums(r, sums);
  }

  // Calls visit(i0, j0) for blocks of four that hold a pair.
  template <class Visit>
  void blocks(const Visit& visit) const {
    const i64 n = m_.n, rows = p_.split ? p_.split : n;
    for (i64 j0 = p_.split ? p_.split / 4 * 4 : 0; j0 < n; j0 += 4)
      for (i64 i0 = 0; i0 < std::min(rows, j0 + 4); i0 += 4) visit(i0, j0);
  }
  bool wanted(i64 i, i64 j) const {
    return i < j && j < m_.n && (p_.split == 0 || (i < p_.split && j >= p_.split));
  }

  template <class Count>
  void bits(const u64* data, const Count& count, i64 i0, i64 j0, i64* out) const {
    const u64 *x[4], *y[4];
    for (i64 e = 0; e < 4; e++) {
      x[e] = data + std::min(i0 + e, m_.n - 1) * words_;
      y[e] = data + std::min(j0 + e, m_.n - 1) * words_;
    }
    count(x, y, words_, p_.vpopcnt, out);
  }

  void count_signs(const Region& r, i64 valid, i64* counts) const {
    blocks([&](i64 i0, i64 j0) {
      i64 found[16];
      bits(r.negative.data(), k_.count_xor, i0, j0, found);
      for (i64 a = 0; a < 4; a++)
        for (i64 b = 0; b < 4; b++) {
          const i64 i = i0 + a, j = j0 + b;
          if (!wanted(i, j)) continue;
          i64* to = counts + (i * m_.n + j) * kEntryCounts;
          if (r.zeros[i] == 0 && r.zeros[j] == 0) {
            to[0] += found[a * 4 + b];
            to[1] += valid;
          } else {
            signs_with_zeros(r, i, j, to);
          }
        }
    });
  }

  void signs_with_zeros(const Region& r, i64 i, i64 j, i64* to) const {
    const u64 *x = r.negative.data() + i * words_, *y = r.negative.data() + j * words_;
    const u64 *p = r.nonzero.data() + i * words_, *q = r.nonzero.data() + j * words_;
    u64 conflicts[8], both[8];
    const u64 *c[4] = {conflicts, both, conflicts, both};
    for (i64 w = 0; w < words_; w += 8) {
      for (i64 e = 0; e < 8; e++) {
        both[e] = p[w + e] & q[w + e];
        conflicts[e] = (x[w + e] ^ y[w + e]) & both[e];
      }
      i64 found[16];
      k_.count_and(c, c, 8, p_.vpopcnt, found);
      to[0] += found[0];
      to[1] += found[5];
    }
  }

  void count_top(const Region& r, i64* counts) const {
    blocks([&](i64 i0, i64 j0) {
      i64 found[16];
      bits(r.top.data(), k_.count_and, i0, j0, found);
      for (i64 a = 0; a < 4; a++)
        for (i64 b = 0; b < 4; b++)
          if (wanted(i0 + a, j0 + b))
            counts[((i0 + a) * m_.n + j0 + b) * kEntryCounts + 2] += found[a * 4 + b];
    });
  }

  // Four deltas stay in L1 while the others pass.
  void add_sums(const Region& r, double* sums) const {
    const i64 n = m_.n, rows = p_.split ? p_.split : n;
    const float one = 1;
    for (i64 i = 0; i < n; i++)
      k_.sums(r.x.data() + i * kRegion, r.x.data() + i * kRegion, kRegion, 1, kRegion, &one,
              sums + (i * n + i) * kEntrySums);
    for (i64 j0 = p_.split; j0 < n; j0 += 4)
      for (i64 i = 0; i < std::min(rows, std::min(j0 + 4, n)); i++) {
        const i64 j = std::max(j0, i + 1), count = std::min(j0 + 4, n) - j;
        float ratios[4];
        for (i64 c = 0; c < count; c++) ratios[c] = std::ldexp(1.0f, p_.units[i] - p_.units[j + c]);
        if (count > 0)
          k_.sums(r.x.data() + i * kRegion, r.x.data() + j * kRegion, kRegion, count, kRegion,
                  ratios, sums + (i * n + j) * kEntrySums);
      }
  }

  const EntryModule& m_;
  const EntryPairs& p_;
  const TileOptions& options_;
  const EntryKernels& k_;
  FirstBad bad_;
  bool floats_;
  Entries entries_;
  i64 per_region_ = 0, words_ = 0;
};

}  // namespace

TileStatus entry_pairs(const EntryModule& module, const EntryPairs& pairs,
                       const TileOptions& options) {
  return Pairs(module, pairs, options).run();
}

}  // namespace mergeprobe
