// P2 that ends in numbers: order statistics of |x|.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "mergeprobe/counter_hash.hpp"
#include "simd.hpp"
#include "tile_source.hpp"

namespace mergeprobe {
namespace {

constexpr std::uint32_t kInfinity = 0x7f800000u;
constexpr i64 kFewEntries = 4096;  // all collected, without a sample
constexpr i64 kTaskRows = 64;      // rows that one task counts

std::uint32_t bits_of(float x) {
  std::uint32_t b;
  std::memcpy(&b, &x, 4);
  return b & 0x7fffffffu;
}
float float_of(std::uint32_t b) {
  float x;
  std::memcpy(&x, &b, 4);
  return x;
}

float value(const Matrix& m, i64 row, i64 column) {
  const void* p = at(m, row, column);
  switch (m.dtype) {
    case Dtype::f32: return *static_cast<const float*>(p);
    case Dtype::bf16: return widen(*static_cast<const bf16*>(p));
    case Dtype::f16: return widen(*static_cast<const f16*>(p));
    case Dtype::f64: return static_cast<float>(*static_cast<const double*>(p));
  }
  return 0;
}

// The search for one order statistic. Entries are ordered as the bits of |x|; the answer is the
// largest key that at least `k` entries reach: count(low) >= k > count(high).
struct Search {
  i64 k = 0;
  std::uint32_t low = 0, high = kInfinity + 1;
  i64 reach_low = 0, reach_high = 0;
  std::uint32_t guess = 0;            // where the sample puts the answer
  bool guessed = false;               // the guess alone was tried
  std::uint32_t from = 0, to = 0;     // entries in [from, to) are collected in this pass
  bool done = false;
  float result = 0;
};

// What one thread found for one search in one pass.
struct Found {
  i64 above = 0, inside = 0;
  std::vector<float> entries;
};

class OrderStatistics {
 public:
  OrderStatistics(const OrderBlock* blocks, i64 n, const TileOptions& o)
      : blocks_(blocks), n_(n), options_(o), k_(*o.kernels->tiles) {
    for (i64 i = 0; i < n; i++) ends_.push_back(total_ += blocks[i].d_out * blocks[i].d_in);
  }

  TileStatus run(const i64* counts, i64 n_counts, float* out) {
    for (i64 j = 0; j < n_counts; j++) {
      Search s;
      s.k = counts[j];
      s.reach_low = total_;
      s.done = s.k == 0 || s.k >= total_;
      s.result = s.k == 0 ? std::numeric_limits<float>::infinity() : 0.0f;
      searches_.push_back(s);
    }
    bracket();
    while (active()) {
      pass();
      const TileStatus status = bad_.status();
      if (status.status != Status::ok) return status;
    }
    for (i64 j = 0; j < n_counts; j++) {
      out[j] = searches_[j].result;
      if (counts[j] > 0 && !std::isfinite(out[j])) return {Status::no_convergence, 0};
    }
    return {Status::ok, -1};
  }

 private:
  bool active() const {
    return std::any_of(searches_.begin(), searches_.end(), [](const Search& s) { return !s.done; });
  }

  // Where each answer lies, from a sample: 4.5 standard deviations to either side.
  void bracket() {
    // Sampling an entry costs about as much as collecting twenty.
    const double n = static_cast<double>(total_);
    const i64 best = static_cast<i64>(0.25 * std::pow(n, 2.0 / 3.0));
    const i64 size = total_ <= kFewEntries ? 0 : std::clamp<i64>(best, 256, 1 << 22);
    std::vector<std::uint32_t> sample;
    if (active())
      for (i64 q = 0; q < size; q++) sample.push_back(bits_of(entry(mix64(q) % total_)));
    most_ = total_;
    if (size) most_ = std::max<i64>(1 << 16, static_cast<i64>(16 * n / std::sqrt(double(size))));
    for (Search& s : searches_) {
      s.from = s.low;
      s.to = s.high;
      if (s.done || size == 0) continue;
      const double share = static_cast<double>(s.k) / n, middle = share * double(size);
      const double slack = 4.5 * std::sqrt(middle * (1 - share)) + 3;
      auto ranked = [&](double place) {  // the place-th largest of the sample
        const auto nth = sample.begin() + static_cast<i64>(place);
        std::nth_element(sample.begin(), nth, sample.end(), std::greater<std::uint32_t>());
        return std::min(*nth, kInfinity);
      };
      s.guess = ranked(std::min(middle, double(size - 1)));
      if (middle - slack >= 0) s.to = ranked(std::floor(middle - slack)) + 1;
      if (middle + slack < double(size - 1)) s.from = ranked(std::ceil(middle + slack));
    }
  }

  float entry(std::uint64_t position) const {
    const i64 at = static_cast<i64>(position);
    const i64 i = std::upper_bound(ends_.begin(), ends_.end(), at) - ends_.begin();
    const OrderBlock& block = blocks_[i];
    const i64 inside = at - (i ? ends_[i - 1] : 0);
    const i64 row = inside / block.d_in, column = inside % block.d_in;
    float sum = 0;
    for (i64 r = 0; r < block.delta.rank; r++)
      sum += value(block.delta.u, r, row) * value(block.delta.v, r, column);
    return sum * static_cast<float>(block.delta.scale);
  }

  void pass() {
    const std::size_t n_searches = searches_.size();
    std::vector<std::vector<Found>> found(static_cast<std::size_t>(options_.threads),
                                          std::vector<Found>(n_searches));
    for (i64 i = 0; i < n_; i++) count(i, found);
    for (std::size_t j = 0; j < n_searches; j++)
      if (!searches_[j].done) conclude(searches_[j], j, found);
  }

  void count(i64 index, std::vector<std::vector<Found>>& found) {
    const OrderBlock& block = blocks_[index];
    TileSource source(&block.delta, 1, block.d_in, index, k_, bad_);
    source.pack_a(options_.threads);
    const i64 tasks = (block.d_out + kTaskRows - 1) / kTaskRows;
    parallel_for(tasks, options_.threads, [&](i64 task, int worker) {
      const i64 first = task * kTaskRows, last = std::min(block.d_out, first + kTaskRows);
      Buffer<float> b(block.delta.rank * kTileRows + 1), tile(kTile), inside(kTile + 16);
      each_tile(source, 1, block.d_in, first, last, b.data(), tile.data(),
                [&](i64, i64, i64, i64 rows, i64 columns, float* x) {
                  // NaN is above every bound; entries outside the matrix are taken off again.
                  const i64 outside =
                      set_outside(x, rows, columns, std::numeric_limits<float>::quiet_NaN());
                  for (std::size_t j = 0; j < searches_.size(); j++) {
                    const Search& s = searches_[j];
                    if (s.done) continue;
                    Found& f = found[worker][j];
                    const i64 hits = k_.between(x, kTile, s.from, s.to, &f.above, inside.data());
                    f.above -= outside;
                    f.inside += hits;
                    if (f.inside <= most_)
                      f.entries.insert(f.entries.end(), inside.data(), inside.data() + hits);
                  }
                });
    });
  }

  void conclude(Search& s, std::size_t j, std::vector<std::vector<Found>>& found) {
    i64 above = 0, inside = 0;
    bool stored = true;
    for (const auto& f : found) {
      above += f[j].above;
      inside += f[j].inside;
      stored = stored && f[j].inside <= most_;
    }
    if (s.k <= above) {
      s.low = s.to;
      s.reach_low = above;
    } else if (s.k > above + inside) {
      s.high = s.from;
      s.reach_high = above + inside;
    } else if (stored) {
      s.result = selected(s, s.k - above - 1, j, found);
      s.done = true;
      return;
    } else {
      s.low = s.from;
      s.reach_low = above + inside;
      s.high = s.to;
      s.reach_high = above;
    }
    if (s.high <= s.low + 1) {  // NaN, from products that overflow, lies above every key
      s.result = s.high > s.low ? float_of(s.low) : std::numeric_limits<float>::infinity();
      s.done = true;
    } else if (s.reach_low - s.reach_high <= most_) {
      s.from = s.low;
      s.to = s.high;
    } else {
      // Too many to collect, perhaps all alike: one key is counted, the range shrinks around it.
      const bool again = s.guessed || s.guess < s.low || s.guess >= s.high;
      s.from = again ? s.low + (s.high - s.low) / 2 : s.guess;
      s.to = s.from + 1;
      s.guessed = true;
    }
  }

  // The entry of that rank, from 0 for the largest, among those collected: counted by the leading
  // bits of their distance from the bottom, then only the right ones are put in order.
  static float selected(const Search& s, i64 rank, std::size_t j,
                        const std::vector<std::vector<Found>>& found) {
    int shift = 0;
    while ((s.to - s.from) >> shift >= 4096) shift++;
    std::vector<i64> counts(4096, 0);
    for (const auto& f : found)
      for (float x : f[j].entries) counts[(bits_of(x) - s.from) >> shift]++;
    std::uint32_t bucket = 4095;
    while (rank >= counts[bucket]) rank -= counts[bucket--];
    std::vector<float> entries;
    for (const auto& f : found)
      for (float x : f[j].entries)
        if ((bits_of(x) - s.from) >> shift == bucket) entries.push_back(x);
    std::nth_element(entries.begin(), entries.begin() + rank, entries.end(), std::greater<float>());
    return entries[static_cast<std::size_t>(rank)];
  }

  const OrderBlock* blocks_;
  i64 n_, total_ = 0, most_ = 0;
  const TileOptions& options_;
  const TileKernels& k_;
  FirstBad bad_;
  std::vector<i64> ends_;
  std::vector<Search> searches_;
};

}  // namespace

TileStatus order_statistics(const OrderBlock* blocks, i64 n, const i64* counts, i64 n_counts,
                            float* out, const TileOptions& options) {
  return OrderStatistics(blocks, n, options).run(counts, n_counts, out);
}

}  // namespace mergeprobe
