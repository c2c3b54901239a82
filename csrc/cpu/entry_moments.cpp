// P2 that ends in numbers: sizes, moments and the largest entries of each delta.
#include <cmath>
#include <functional>
#include <limits>

#include "entry_source.hpp"

namespace mergeprobe {
namespace {

constexpr i64 kQuick = 2048;  // entries of a sample that bracket its thresholds

// The k-th largest magnitude, k from 1, of which at least k are there.
float largest(std::vector<float>& x, i64 k) {
  const auto nth = x.begin() + (k - 1);
  std::nth_element(x.begin(), nth, x.end(), std::greater<float>());
  return *nth;
}

// The same of x[0, n), n >= k: what the first of them say narrows it down to a part.
float threshold_of(const float* x, i64 n, i64 k, std::vector<float>& scratch) {
  auto all = [&](i64 count) {
    scratch.resize(static_cast<std::size_t>(count));
    for (i64 j = 0; j < count; j++) scratch[j] = std::fabs(x[j]);
  };
  if (n > 4 * kQuick) {
    const double share = static_cast<double>(k) / static_cast<double>(n);
    const double middle = share * double(kQuick), slack = 4 * std::sqrt(middle * (1 - share)) + 2;
    all(kQuick);
    const float infinity = std::numeric_limits<float>::infinity();
    const float high = middle - slack < 1 ? infinity : largest(scratch, i64(middle - slack));
    const float low = middle + slack > kQuick ? 0.0f : largest(scratch, i64(middle + slack));
    i64 above = 0, inside = 0;
    scratch.resize(static_cast<std::size_t>(n));
    for (i64 j = 0; j < n; j++) {
      const float size = std::fabs(x[j]);
      scratch[inside] = size;
      above += size > high;
      inside += (size >= low) & (size <= high);
    }
    scratch.resize(static_cast<std::size_t>(inside));
    if (above < k && k <= above + inside) return largest(scratch, k - above);
  }
  all(n);
  return largest(scratch, k);
}

void add(const EntryMoments& x, EntryMoments& sum) {
  sum.l1 += x.l1;
  sum.squares += x.squares;
  sum.fourths += x.fourths;
  sum.top_squares += x.top_squares;
  sum.entries += x.entries;
  sum.zeros += x.zeros;
  sum.top += x.top;
}

}  // namespace

TileStatus entry_sizes(const EntryModule& m, double* out, const TileOptions& options) {
  const TileProducts& k = *options.kernels->tiles->products;
  FirstBad bad;
  parallel_for(m.n, options.threads, [&](i64 i, int) {
    const Segment& s = m.deltas[i];
    std::vector<float> part(static_cast<std::size_t>(s.rank * kTileColumns));
    std::vector<double> square[2];
    for (bool left : {true, false}) {
      const i64 columns = left ? m.d_out : m.d_in;
      std::vector<double>& sum = square[left];
      sum.assign(static_cast<std::size_t>(s.rank), 0.0);
      for (i64 first = 0; first < columns; first += kTileColumns) {
        const i64 count = std::min(kTileColumns, columns - first);
        if (!k.pack(left ? s.u : s.v, s.rank, first, count, kTileColumns, part.data()))
          bad.report(i, left);
        for (i64 r = 0; r < s.rank; r++)
          for (i64 j = 0; j < kTileColumns; j++) {
            const double x = static_cast<double>(part[r * kTileColumns + j]);
            sum[r] += x * x;
          }
      }
    }
    out[i] = 0;
    for (i64 r = 0; r < s.rank; r++) out[i] += square[0][r] * square[1][r];
    out[i] *= s.scale * s.scale;
  });
  return checked(bad, true);
}

TileStatus entry_moments(const EntryModule& m, double density, EntryMoments* out,
                         const TileOptions& options) {
  const EntryKernels& k = *options.kernels->entries;
  FirstBad bad;
  Entries entries(m, *options.kernels, kStrip, bad);
  entries.pack(options.threads);
  if (bad.status().status != Status::ok) return bad.status();
  const i64 tiles = entries.tiles(), size = entries.size();
  i64 valid = 0;
  for (i64 t = 0; t < tiles; t++) valid += entries.valid(t);
  const i64 most = std::min(valid, static_cast<i64>(density * static_cast<double>(valid)));
  for (i64 i = 0; i < m.n; i++) {
    out[i] = EntryMoments{};
    out[i].threshold = std::numeric_limits<float>::infinity();
    out[i].entries = out[i].zeros = valid;
  }
  if (m.sample.tiles > 0) {
    parallel_for(m.n, options.threads, [&](i64 i, int) {
      std::vector<float> scratch;
      Buffer<float> x(tiles * size);
      for (i64 t = 0; t < tiles; t++) entries.tile(i, t, x.data() + t * size);
      // Zeros outside the matrix come after every entry.
      if (most > 0)
        out[i].threshold = threshold_of(x.data(), tiles * size, most, scratch);
      k.moments(x.data(), tiles * size, static_cast<float>(out[i].threshold), out + i);
    });
  } else {
    for (i64 i = 0; i < m.n && most > 0; i++) {
      const OrderBlock block{m.deltas[i], m.d_out, m.d_in};
      float threshold = 0;
      TileStatus status = order_statistics(&block, 1, &most, 1, &threshold, options);
      if (status.status != Status::ok) return {status.status, i};
      out[i].threshold = threshold;
    }
    const i64 stripes = std::min(kEntryStripes, tiles);
    std::vector<EntryMoments> parts(static_cast<std::size_t>(stripes * m.n), EntryMoments{});
    parallel_for(stripes, options.threads, [&](i64 stripe, int) {
      alignas(64) float x[kTile];
      for (i64 i = 0; i < m.n; i++)
        for (i64 t = stripe * tiles / stripes; t < (stripe + 1) * tiles / stripes; t++) {
          entries.tile(i, t, x);
          k.moments(x, size, static_cast<float>(out[i].threshold),
                    parts.data() + stripe * m.n + i);
        }
    });
    for (i64 stripe = 0; stripe < stripes; stripe++)
      for (i64 i = 0; i < m.n; i++) add(parts[stripe * m.n + i], out[i]);
  }
  bool finite = true;
  for (i64 i = 0; i < m.n; i++) finite = finite && std::isfinite(out[i].fourths);
  return checked(bad, finite);
}

}  // namespace mergeprobe
