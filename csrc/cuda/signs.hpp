// What is launched for the sign statistics of one module, and in which order; no CUDA in here.
#pragma once
#include <algorithm>
#include <cstddef>

#include "signs.cuh"

namespace mergeprobe::cuda {

constexpr i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
constexpr i64 kAlign = 256;  // bytes; of each part of the workspace
constexpr i64 kUpload = 48;  // deltas in the arguments of a launch, which may be 4 KB

inline i64 sign_tiles(i64 d_out, i64 d_in) {
  return ceil_div(d_out, kRows) * ceil_div(d_in, kColumns);
}

// Parts of the workspace in bytes: the table of deltas, two counts per delta, then the bits.
inline i64 sign_table_bytes(i64 n) {
  return ceil_div(n * static_cast<i64>(sizeof(SignDelta)), kAlign) * kAlign +
         ceil_div(2 * n * 8, kAlign) * kAlign;
}
inline i64 sign_tile_bytes(i64 n) { return n * kWords * 2 * 4; }

// Tiles of a slab for that many bytes; 0: too few. A grid and a 32-bit count have their limits.
inline i64 sign_slab_tiles(i64 n, i64 d_out, i64 d_in, i64 bytes) {
  const i64 fit = (bytes - sign_table_bytes(n)) / sign_tile_bytes(n);
  return std::max<i64>(
      0, std::min({fit, sign_tiles(d_out, d_in), (i64{1} << 30) / n, i64{1} << 17}));
}

// Bytes for as many tiles as `limit` allows, at least one.
inline i64 sign_workspace(i64 n, i64 d_out, i64 d_in, i64 limit) {
  const i64 tiles = std::max<i64>(1, sign_slab_tiles(n, d_out, d_in, limit));
  return sign_table_bytes(n) + tiles * sign_tile_bytes(n);
}

inline i64 sign_valid(i64 d_out, i64 d_in, i64 first, i64 tiles) {
  const i64 panels = ceil_div(d_in, kColumns);
  i64 valid = 0;
  for (i64 t = first; t < first + tiles; t++)
    valid += std::min<i64>(kRows, d_out - t / panels * kRows) *
             std::min<i64>(kColumns, d_in - t % panels * kColumns);
  return valid;
}

struct SignCall {
  const SignDelta* deltas;  // on the host
  i64 n, d_out, d_in;
  i64 *conflicts, *both, *bad;
  void* workspace;
  i64 bytes;
  int multiprocessors;
};

// Device: upload(table, deltas, n), clear(data, bytes, value), generate(blocks, slab),
// count(blocks, splits, slab, counts); all in order.
template <class Device>
void run_signs(const SignCall& call, Device& device) {
  const i64 n = call.n, slab_tiles = sign_slab_tiles(n, call.d_out, call.d_in, call.bytes);
  char* const base = static_cast<char*>(call.workspace);
  auto* const table = reinterpret_cast<SignDelta*>(base);
  auto* const bits = reinterpret_cast<u32*>(base + sign_table_bytes(n));
  SignSlab s{};
  s.deltas = table;
  s.n = n;
  s.d_out = call.d_out;
  s.d_in = call.d_in;
  s.negatives = reinterpret_cast<i64*>(
      base + ceil_div(n * static_cast<i64>(sizeof(SignDelta)), kAlign) * kAlign);
  s.alive = s.negatives + n;
  s.bad = call.bad;
  device.clear(call.conflicts, n * n * 8, 0);
  device.clear(call.both, n * n * 8, 0);
  device.clear(call.bad, 8, 0x7f);  // beyond every delta
  for (i64 i = 0; i < n; i += kUpload)
    device.upload(table + i, call.deltas + i, std::min(kUpload, n - i));
  const i64 tiles = sign_tiles(call.d_out, call.d_in);
  for (s.first = 0; s.first < tiles; s.first += s.tiles) {
    s.tiles = std::min(slab_tiles, tiles - s.first);
    s.words = s.tiles * kWords;
    s.valid = sign_valid(call.d_out, call.d_in, s.first, s.tiles);
    s.negative = bits;
    s.nonzero = bits + n * s.words;
    device.clear(s.negatives, 2 * n * 8, 0);
    device.generate(n * s.tiles, s);
    const i64 side = ceil_div(n, kSide), blocks = ceil_div(side, 2) * (side + 1);
    // Enough blocks for every multiprocessor, and enough words to be worth a block.
    const i64 most = std::min<i64>(65535, std::max<i64>(1, s.words / (8 * kStage)));
    const i64 want = std::clamp<i64>(ceil_div(4 * call.multiprocessors, blocks), 1, most);
    const i64 range = ceil_div(ceil_div(s.words, want), kStage) * kStage;
    device.count(blocks, ceil_div(s.words, range), s,
                 SignCounts{call.conflicts, call.both, range});
  }
}

}  // namespace mergeprobe::cuda
