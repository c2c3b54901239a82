// Sign statistics of pairs of deltas, as one thread of a block runs them. A thread is a `T`: on a
// GPU launch.cuh, in tests/cuda_on_host.cpp a fiber, so that the same source runs in both places.
//
//   generate: a tile of 64 x 128 entries of one delta, summed over the rank in order in float32 as
//             csrc/cpu/entry_kernels.cpp does with fused multiply-adds, packed to bits.
//   count:    bits set in x_i & y_j for 128 x 128 pairs of deltas and a range of words.
//
// With n the negative entries and z those that are not 0, as bits of a delta,
//   conflicts = |n_i & z_j| + |z_i & n_j| - 2 |n_i & n_j|,   both = |z_i & z_j|,
// and where nothing is 0, z is all there is: one product, |n_i| and |n_j| do.
#pragma once
#include <cstring>

#include "mergeprobe/types.hpp"

#ifdef __CUDACC__
#define MP_DEVICE __device__ __forceinline__
#define MP_UNROLL_ALL _Pragma("unroll")
#define MP_UNROLL_4 _Pragma("unroll 4")
#define MP_ROLLED _Pragma("unroll 1")
#else
#define MP_DEVICE inline
#define MP_UNROLL_ALL
#define MP_UNROLL_4
#define MP_ROLLED
#endif

namespace mergeprobe::cuda {

using u32 = std::uint32_t;

constexpr int kThreads = 256;
// generate: entries of a tile, units of the rank in shared memory at a time, words of a tile. A
// thread has 4 x 8 entries, the bits of one word.
constexpr int kRows = 64, kColumns = 128, kDepth = 16, kWords = kRows * kColumns / 32;
// count: deltas on either side, words of each in shared memory at a time.
constexpr int kSide = 128, kStage = 32;

struct alignas(8) Two {
  u32 v[2];
};
struct alignas(16) Four {
  Two half[2];
};
struct alignas(16) FourFloats {
  float v[4];
};

struct SignDelta {
  Matrix u, v;  // rank x d_out, rank x d_in
  std::int32_t rank;
  std::int32_t sign;  // of the scale: -1, 0 or 1
};

// A slab: tiles [first, first + tiles) of every delta. Bits of delta i start at word i * words.
struct SignSlab {
  const SignDelta* deltas;
  i64 n, d_out, d_in, first, tiles, words;
  i64 valid;  // entries of a delta that are in the matrix
  u32 *negative, *nonzero;
  i64 *negatives, *alive;  // bits set in either, of each delta
  i64* bad;                // the least 2 i, or 2 i + 1 for A, of a factor that is not finite
};

struct GenerateShared {
  alignas(16) float b[kDepth][kRows + 4];  // 4: rows k and k + 1 in other banks
  alignas(16) float a[kDepth][kColumns + 4];
};

// Two stages of words, then all products of the block.
union CountShared {
  struct {
    Four left[2][kSide * kStage / 4], right[2][kSide * kStage / 4];
  } words;
  int products[kSide * kSide];
};

struct SignCounts {
  i64* conflicts;  // (n, n), pairs i < j
  i64* both;
  i64 range;       // words of a block, a multiple of kStage
};

MP_DEVICE u32 bits_of(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  return bits;
}
MP_DEVICE float float_of(u32 bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};
MP_DEVICE float widen(float x) { return x; }
MP_DEVICE float widen(double x) { return static_cast<float>(x); }
MP_DEVICE float widen(Bf16 x) { return float_of(u32{x.bits} << 16); }
MP_DEVICE float widen(F16 x) {
  const u32 sign = (x.bits & 0x8000u) << 16, rest = (x.bits & 0x7fffu) << 13;
  // Subnormal halves are subnormal floats here: a power of two moves them all.
  const u32 size = (x.bits & 0x7c00u) == 0x7c00u ? rest | 0x7f800000u
                                                 : bits_of(float_of(rest) * 5.192296858534828e33f);
  return float_of(sign | size);
}

// What a thread fetches: entries (k, j), (k + down, j + right), ... of a matrix, in bytes from each
// other.
struct Walk {
  const char* from;
  i64 step;
  int k, j, down, right;
};

template <class S, int kWidth>
MP_DEVICE bool fetch_as(Walk w, int depth, i64 count, float (&to)[kDepth][kWidth + 4]) {
  u32 bad = 0;
  MP_UNROLL_4  // reads under way at a time; more take more registers
  for (int e = 0; e < kDepth * kWidth; e += kThreads) {
    const bool there = w.k < depth && w.j < count;
    const float x = there ? widen(*reinterpret_cast<const S*>(w.from)) : 0.0f;
    bad |= (bits_of(x) & 0x7f800000u) == 0x7f800000u;
    to[w.k][w.j] = x;
    w.from += w.step;
    w.k += w.down;
    w.j += w.right;
  }
  return !bad;
}

// to[k][j] = m[k0 + k][j0 + j] for j < kWidth, 0 from k = depth and from j = count on; false for
// NaN or infinity. Threads that are neighbours read along memory.
template <int kWidth, class T>
MP_DEVICE bool fetch(T& t, const Matrix& m, int k0, int depth, i64 j0, i64 count,
                     float (&to)[kDepth][kWidth + 4]) {
  const i64 size = m.dtype == Dtype::f64 ? 8 : m.dtype == Dtype::f32 ? 4 : 2;
  const i64 along_k = m.row_stride * size, along_j = m.col_stride * size;
  Walk w;
  if (m.row_stride < m.col_stride) {
    w.k = t.thread() % kDepth;
    w.j = t.thread() / kDepth;
    w.down = 0;
    w.right = kThreads / kDepth;
  } else {
    w.k = t.thread() / kWidth;
    w.j = t.thread() % kWidth;
    w.down = kThreads / kWidth;
    w.right = 0;
  }
  w.from = static_cast<const char*>(m.data) + (k0 + w.k) * along_k + (j0 + w.j) * along_j;
  w.step = w.down * along_k + w.right * along_j;
  switch (m.dtype) {
    case Dtype::f32: return fetch_as<float, kWidth>(w, depth, count, to);
    case Dtype::bf16: return fetch_as<Bf16, kWidth>(w, depth, count, to);
    case Dtype::f16: return fetch_as<F16, kWidth>(w, depth, count, to);
    case Dtype::f64: return fetch_as<double, kWidth>(w, depth, count, to);
  }
  return true;
}

// Block (tile, delta) = (block % tiles, block / tiles).
template <class T>
MP_DEVICE void generate(const SignSlab& s, GenerateShared& shared, T& t) {
  const i64 delta = t.block() / s.tiles, tile = t.block() % s.tiles;
  const i64 panels = (s.d_in + kColumns - 1) / kColumns;
  const i64 row = (s.first + tile) / panels * kRows, column = (s.first + tile) % panels * kColumns;
  const SignDelta d = s.deltas[delta];
  const int y = t.thread() / 16 * 4, x = t.thread() % 16 * 4;
  float acc[4][8];
  MP_UNROLL_ALL
  for (int i = 0; i < 4; i++)
    MP_UNROLL_ALL
    for (int j = 0; j < 8; j++) acc[i][j] = 0;
  for (int k0 = 0; k0 < d.rank; k0 += kDepth) {
    const int depth = d.rank - k0 < kDepth ? d.rank - k0 : kDepth;
    if (k0) t.sync();
    if (!fetch<kRows>(t, d.u, k0, depth, row, s.d_out - row, shared.b)) t.least(s.bad, 2 * delta);
    if (!fetch<kColumns>(t, d.v, k0, depth, column, s.d_in - column, shared.a))
      t.least(s.bad, 2 * delta + 1);
    t.sync();
    for (int k = 0; k < depth; k++) {
      const auto b = *reinterpret_cast<const FourFloats*>(&shared.b[k][y]);
      const auto low = *reinterpret_cast<const FourFloats*>(&shared.a[k][x]);
      const auto high = *reinterpret_cast<const FourFloats*>(&shared.a[k][x + kColumns / 2]);
      MP_UNROLL_ALL
      for (int i = 0; i < 4; i++)
        MP_UNROLL_ALL
        for (int j = 0; j < 4; j++) {
          acc[i][j] = t.fma(b.v[i], low.v[j], acc[i][j]);
          acc[i][j + 4] = t.fma(b.v[i], high.v[j], acc[i][j + 4]);
        }
    }
  }
  u32 below = 0, above = 0;
  MP_UNROLL_ALL
  for (int i = 0; i < 4; i++)
    MP_UNROLL_ALL
    for (int j = 0; j < 8; j++) {
      below |= u32{acc[i][j] < 0} << (i * 8 + j);
      above |= u32{acc[i][j] > 0} << (i * 8 + j);
    }
  const u32 negative = d.sign < 0 ? above : d.sign > 0 ? below : 0;
  const u32 nonzero = d.sign ? below | above : 0;
  const i64 at = delta * s.words + tile * kWords + t.thread();
  s.negative[at] = negative;
  s.nonzero[at] = nonzero;
  t.warp_add(s.negatives + delta, t.ones(negative));
  t.warp_add(s.alive + delta, t.ones(nonzero));
}

// Four words of a row lie at row * kFours + (four ^ swizzle(row)). Sixteen lanes read two words
// each at a time: at two neighbouring places of four rows (BinaryMatrix), where no two meet in a
// bank, or at one place of sixteen rows (Scalar), where two do. Rows 8 apart have the same.
constexpr int kFours = kStage / 4;
MP_DEVICE int swizzle(int row) { return (row & 3) << 1 | (row >> 2 & 1); }

MP_DEVICE int rows_after(const SignSlab& s, i64 row) {
  return s.n - row < kSide ? static_cast<int>(s.n - row) : kSide;
}

// Four words of the thread's row, which starts at `from`, and of every 32nd after it; zeros for
// those from `rows` on.
template <class T>
MP_DEVICE void stage(T& t, const SignSlab& s, const u32* from, int rows, Four* to) {
  const int row = t.thread() / kFours, four = t.thread() % kFours;
  to += row * kFours + (four ^ swizzle(row));
  MP_UNROLL_ALL
  for (int e = 0; e < kSide; e += kThreads / kFours) {
    const bool there = e < rows;
    t.copy(to + e * kFours, there ? from + e * s.words : s.negative, there);
  }
}

// The 64 products of a thread, and row and column of number q. Scalar: 8 x 8, by popcount.
struct Scalar {
  template <class T>
  static MP_DEVICE void add(T& t, const Four* left, const Four* right, int (&acc)[64]) {
    const int y = row(t.thread(), 0), x = column(t.thread(), 0);
    left += y * kFours;
    right += x * kFours;
    MP_ROLLED
    for (int two = 0; two < 2 * kFours; two++) {  // words at a time: more take more registers
      Two a[8];
      MP_UNROLL_ALL
      for (int i = 0; i < 8; i++)
        a[i] = left[16 * i * kFours + (two / 2 ^ swizzle(y))].half[two % 2];
      MP_UNROLL_ALL
      for (int j = 0; j < 8; j++) {
        const Two b = right[16 * j * kFours + (two / 2 ^ swizzle(x))].half[two % 2];
        MP_UNROLL_ALL
        for (int i = 0; i < 8; i++)
          MP_UNROLL_ALL
          for (int w = 0; w < 2; w++) acc[8 * i + j] += t.ones(a[i].v[w] & b.v[w]);
      }
    }
  }
  static MP_DEVICE int row(int thread, int q) { return thread / 16 + 16 * (q / 8); }
  static MP_DEVICE int column(int thread, int q) { return thread % 16 + 16 * (q % 8); }
};

// By the tensor core's m16n8k256 on bits: 64 x 32 products of a warp. A lane reads two words of a
// row at a time; which bits meet in which instruction does not matter.
struct BinaryMatrix {
  template <class T>
  static MP_DEVICE void add(T& t, const Four* left, const Four* right, int (&acc)[64]) {
    const int warp = t.thread() / 32, group = t.thread() % 32 / 4, lane = t.thread() % 4;
    left += (warp / 4 * 64 + group) * kFours;
    right += (warp % 4 * 32 + group) * kFours;
    MP_ROLLED
    for (int step = 0; step < kFours; step += 2) {
      const int at = (step + lane / 2) ^ swizzle(group);
      Two b[4];
      MP_UNROLL_ALL
      for (int j = 0; j < 4; j++) b[j] = right[8 * j * kFours + at].half[lane % 2];
      MP_UNROLL_ALL
      for (int i = 0; i < 4; i++) {
        const Two low = left[16 * i * kFours + at].half[lane % 2];
        const Two high = left[(16 * i + 8) * kFours + at].half[lane % 2];
        MP_UNROLL_ALL
        for (int j = 0; j < 4; j++) t.and_popc(&acc[16 * i + 4 * j], low, high, b[j]);
      }
    }
  }
  static MP_DEVICE int row(int thread, int q) {
    return thread / 128 * 64 + q / 16 * 16 + q % 4 / 2 * 8 + thread % 32 / 4;
  }
  static MP_DEVICE int column(int thread, int q) {
    return thread / 32 % 4 * 32 + q / 4 % 4 * 8 + thread % 4 * 2 + q % 2;
  }
};

// Products of deltas [i0, i0 + kSide) and [j0, ...) over words [first, last), into shared.products
// for all to see.
template <class Product, class T>
MP_DEVICE void multiply(T& t, const SignSlab& s, const u32* left, const u32* right, i64 i0, i64 j0,
                        i64 first, i64 last, CountShared& shared) {
  int acc[64];
  MP_UNROLL_ALL
  for (int q = 0; q < 64; q++) acc[q] = 0;
  const i64 row = t.thread() / kFours, at = first + 4 * (t.thread() % kFours);
  const int left_rows = rows_after(s, i0 + row), right_rows = rows_after(s, j0 + row);
  left += (i0 + row) * s.words + at;
  right += (j0 + row) * s.words + at;
  stage(t, s, left, left_rows, shared.words.left[0]);
  stage(t, s, right, right_rows, shared.words.right[0]);
  int half = 0;
  MP_ROLLED
  for (i64 word = first + kStage; word <= last; word += kStage, half ^= 1) {
    t.wait();
    t.sync();  // this half is there for all, and the other one has been read
    if (word < last) {
      left += kStage;
      right += kStage;
      stage(t, s, left, left_rows, shared.words.left[half ^ 1]);
      stage(t, s, right, right_rows, shared.words.right[half ^ 1]);
    }
    Product::add(t, shared.words.left[half], shared.words.right[half], acc);
  }
  t.sync();
  MP_UNROLL_ALL
  for (int q = 0; q < 64; q++)
    shared.products[Product::row(t.thread(), q) * kSide + Product::column(t.thread(), q)] = acc[q];
  t.sync();
}

// Block (tile of pairs, range of words) = (block, split). Row y of a rectangle of blocks holds the
// tiles of rows y and m - 1 - y on and above the diagonal, together m + 1.
template <class Product, class T>
MP_DEVICE void count(const SignSlab& s, const SignCounts& c, CountShared& shared, T& t) {
  const i64 m = (s.n + kSide - 1) / kSide, y = t.block() / (m + 1), x = t.block() % (m + 1);
  const bool upper = x < m - y;
  if (!upper && 2 * y == m - 1) return;  // the middle row of an odd number, once
  const i64 i0 = (upper ? y : m - 1 - y) * kSide, j0 = (upper ? y + x : x - 1) * kSide;
  const i64 first = t.split() * c.range;
  const i64 last = first + c.range < s.words ? first + c.range : s.words;
  // Threads of the first half look at the rows' deltas, the others at the columns'.
  const i64 mine = t.thread() < kSide ? i0 + t.thread() : j0 + t.thread() - kSide;
  const bool no_zeros = t.all(mine >= s.n || s.alive[mine] == s.valid);
  // 0: n_i & z_j, 1: z_i & n_j, 2: n_i & n_j, 3: z_i & z_j.
  MP_ROLLED
  for (int product = no_zeros ? 2 : 0; product < (no_zeros ? 3 : 4); product++) {
    const u32* left = product % 2 ? s.nonzero : s.negative;
    const u32* right = product % 3 ? s.negative : s.nonzero;
    t.sync();  // the last products have been read
    multiply<Product>(t, s, left, right, i0, j0, first, last, shared);
    const bool once = no_zeros && first == 0;
    MP_ROLLED
    for (int e = t.thread(); e < kSide * kSide; e += kThreads) {
      const i64 i = i0 + e / kSide, j = j0 + e % kSide;
      if (i >= j || j >= s.n) continue;
      const i64 found = shared.products[e];
      if (product == 3) {
        t.add(c.both + i * s.n + j, found);
      } else if (product == 2) {
        t.add(c.conflicts + i * s.n + j,
              (once ? s.negatives[i] + s.negatives[j] : 0) - 2 * found);
        if (once) t.add(c.both + i * s.n + j, s.valid);
      } else {
        t.add(c.conflicts + i * s.n + j, found);
      }
    }
  }
}

}  // namespace mergeprobe::cuda
