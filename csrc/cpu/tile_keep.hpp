// Which entries survive, and the sums over them: the part of the rule that is adapter by adapter.
#pragma once
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "mergeprobe/counter_hash.hpp"
#include "mergeprobe/tile_kernels.hpp"

namespace mergeprobe {

class Keeper {
 public:
  Keeper(const TileModule& m, const TileKernels& k) : m_(m), k_(k) {}

  bool by_row() const { return m_.rule->keep == Keep::della; }

  // A tile of adapter i whose first entry is (row, column).
  void tile(i64 i, i64 row, i64 column, float* x) const {
    const TileAdapter& a = m_.adapters[i];
    switch (m_.rule->keep) {
      case Keep::magnitude: return k_.keep_magnitude(x, kTile, a.low, a.high, a.rescale);
      case Keep::random:
        for (i64 r = 0; r < kTileRows; r++)
          random(a, position(row + r, column), x + r * kTileColumns);
        return;
      case Keep::all:
      case Keep::della:  // whole rows, below
        if (a.rescale != 1.0f) k_.rescale(x, kTile, a.rescale);
    }
  }

  // What of a tile survives, as ones and zeros.
  void marks(i64 i, i64 row, i64 column, const float* x, float* out) const {
    const TileAdapter& a = m_.adapters[i];
    if (m_.rule->keep == Keep::magnitude) return k_.mark_magnitude(x, kTile, a.low, a.high, out);
    for (i64 j = 0; j < kTile; j++) out[j] = 1.0f;
    if (m_.rule->keep != Keep::random) return;
    TileAdapter plain = a;
    plain.rescale = 1.0f;
    for (i64 r = 0; r < kTileRows; r++)
      random(plain, position(row + r, column), out + r * kTileColumns);
  }

  // A row of d_in entries x of adapter i under Keep::della, into `out`, which may be x; with
  // `marks` ones and zeros instead of the entries.
  void della(i64 i, i64 row, const float* x, float* out, bool marks,
             std::vector<std::uint64_t>& scratch) const {
    const TileAdapter& a = m_.adapters[i];
    const i64 n = m_.d_in;
    const std::uint64_t* sorted = ascending(x, n, scratch);
    const std::uint64_t start = position(row, 0);
    const std::uint64_t keys[2] = {hash_key(m_.rule->seed, a.stream, start >> 32),
                                   hash_key(m_.rule->seed, a.stream, (start >> 32) + 1)};
    for (i64 rank = 0; rank < n; rank++) {
      const i64 j = static_cast<i64>(sorted[rank] & 0xffffffffu);
      const double norm = n > 1 ? static_cast<double>(rank) / static_cast<double>(n - 1) : 0.5;
      const double spread = 2 * m_.rule->epsilon;
      const double chance = (a.density - m_.rule->epsilon) + spread * norm;
      const std::uint64_t at = start + static_cast<std::uint64_t>(j);
      const bool kept = bits(at, keys[(at >> 32) - (start >> 32)]) < limit(chance);
      out[j] = !kept ? 0.0f : marks ? 1.0f : x[j] * a.rescale;
    }
  }

 private:
  std::uint64_t position(i64 row, i64 column) const {
    return static_cast<std::uint64_t>(row) * static_cast<std::uint64_t>(m_.d_in) +
           static_cast<std::uint64_t>(column);
  }
  static std::uint32_t bits(std::uint64_t at, std::uint64_t key) {
    return hash32(static_cast<std::uint32_t>(at), static_cast<std::uint32_t>(key),
                  static_cast<std::uint32_t>(key >> 32));
  }
  static double limit(double chance) { return std::floor(chance * 4294967296.0); }

  void random(const TileAdapter& a, std::uint64_t at, float* x) const {
    const double most = limit(a.density);
    const auto lower = static_cast<std::uint32_t>(at);
    if (most >= 4294967296.0) return k_.rescale(x, kTileColumns, a.rescale);
    const std::uint64_t key = hash_key(m_.rule->seed, a.stream, at >> 32);
    if (lower > 0xffffffffu - kTileColumns) {  // the key changes within the row
      const std::uint64_t next = hash_key(m_.rule->seed, a.stream, (at >> 32) + 1);
      for (std::uint64_t j = 0; j < kTileColumns; j++)
        x[j] = bits(at + j, (at + j) >> 32 == at >> 32 ? key : next) < most ? x[j] * a.rescale
                                                                           : 0.0f;
      return;
    }
    const HashRow start{lower, static_cast<std::uint32_t>(key),
                        static_cast<std::uint32_t>(key >> 32)};
    k_.keep_random(x, start, static_cast<std::uint32_t>(most), a.rescale);
  }

  // (bits of |x|, index) by magnitude, equal ones by index: a radix sort of the upper halves.
  static const std::uint64_t* ascending(const float* x, i64 n,
                                        std::vector<std::uint64_t>& scratch) {
    scratch.resize(static_cast<std::size_t>(2 * n));
    std::uint64_t *from = scratch.data(), *to = from + n;
    for (i64 j = 0; j < n; j++) {
      std::uint32_t b;
      std::memcpy(&b, x + j, 4);
      from[j] = static_cast<std::uint64_t>(b & 0x7fffffffu) << 32 | static_cast<std::uint64_t>(j);
    }
    for (int shift = 32; shift < 64; shift += 11) {
      i64 start[2049] = {0};
      for (i64 j = 0; j < n; j++) start[(from[j] >> shift & 2047) + 1]++;
      for (int d = 0; d < 2048; d++) start[d + 1] += start[d];
      for (i64 j = 0; j < n; j++) to[start[from[j] >> shift & 2047]++] = from[j];
      std::swap(from, to);
    }
    return from;
  }

  const TileModule& m_;
  const TileKernels& k_;
};

}  // namespace mergeprobe
