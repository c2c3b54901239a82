#include "mergeprobe/gram.hpp"

#include <algorithm>
#include <vector>

#include "mergeprobe/parallel.hpp"

namespace mergeprobe {
namespace {

// Two fp32 scratch tiles of 320 x 320 (0.8 MB) still live in a 1 MB L2. Measured at 96 to 384 rows on
// Zen 5: 320 is best or within 2%, 192 costs 5 to 10%, 96 costs 20%.
constexpr i64 kDefaultTileRows = 320;

i64 round_up(i64 n, i64 to) { return (n + to - 1) / to * to; }

// Whole blocks, at most `limit` rows unless one block alone is larger.
struct Tile {
  i64 first_block, end_block, first_row, rows;
};

// One stack of blocks, its rows in order and its tiling.
struct Stack {
  const Block* blocks;
  i64 n;
  const double* const* weights;
  std::vector<i64> row_of;  // n + 1
  std::vector<RowRef> u, v;
  std::vector<Tile> tiles;

  Stack(const Block* b, i64 count, const double* const* w, i64 limit)
      : blocks(b), n(count), weights(w), row_of(static_cast<std::size_t>(count) + 1, 0) {
    for (i64 i = 0; i < n; i++) row_of[i + 1] = row_of[i] + b[i].rank;
    u.reserve(rows());
    v.reserve(rows());
    for (i64 i = 0; i < n; i++)
      for (i64 a = 0; a < b[i].rank; a++) {
        u.push_back({at(b[i].u, a, 0), b[i].u.col_stride, b[i].u.dtype});
        v.push_back({at(b[i].v, a, 0), b[i].v.col_stride, b[i].v.dtype});
      }
    // Tiles of equal size leave no thread with a small one while another has a large one.
    i64 widest = 0;
    for (i64 i = 0; i < n; i++) widest = std::max(widest, b[i].rank);
    const i64 tiles_needed = (rows() + limit - 1) / limit;
    const i64 even =
        tiles_needed > 1 ? std::min(limit, rows() / tiles_needed + widest) : limit;
    for (i64 i = 0; i < n;) {
      i64 end = i + 1;
      while (end < n && row_of[end + 1] - row_of[i] <= even) end++;
      tiles.push_back({i, end, row_of[i], row_of[end] - row_of[i]});
      i = end;
    }
  }
  i64 rows() const { return row_of.back(); }
  i64 largest_tile() const {
    i64 most = 0;
    for (const Tile& t : tiles) most = std::max(most, t.rows);
    return most;
  }
};

// Accumulators shared by epilogues: sums over a block's rows of weight * product.
struct Channel {
  Product product;
  int weight;
  bool operator==(const Channel& o) const { return product == o.product && weight == o.weight; }
};

struct Plan {
  std::vector<Epilogue> epilogues;
  std::vector<Channel> channels;
  std::vector<int> forward, mirrored;  // per epilogue: its channel for (i,j) and for (j,i)

  Plan(const Epilogue* e, int n) : epilogues(e, e + n) {
    auto channel = [&](Product product, int weight) {
      const Channel c{product, weight};
      auto it = std::find(channels.begin(), channels.end(), c);
      if (it == channels.end()) it = channels.insert(channels.end(), c);
      return static_cast<int>(it - channels.begin());
    };
    for (const Epilogue& x : epilogues) {
      forward.push_back(channel(x.product, x.row_weight));
      mirrored.push_back(channel(x.product, x.column_weight));
    }
  }
};

template <class T>
struct Scratch {
  Buffer<T> m, n, weight, sums, panels;
};

template <class T>
class Run {
 public:
  Run(const Plan& plan, const GramOptions& options, const GemmKernels<T>& gemm)
      : plan_(plan), options_(options), gemm_(gemm), scratch_(std::max(1, options.threads)) {}

  void modules(const GramModule* modules, i64 count) {
    const i64 limit = options_.tile_rows > 0 ? options_.tile_rows : kDefaultTileRows;
    std::vector<const GramModule*> small, large;
    for (i64 l = 0; l < count; l++) {
      i64 r1 = 0, r2 = 0;
      for (i64 i = 0; i < modules[l].n1; i++) r1 += modules[l].blocks1[i].rank;
      for (i64 i = 0; modules[l].blocks2 && i < modules[l].n2; i++)
        r2 += modules[l].blocks2[i].rank;
      clear(modules[l], r1, modules[l].blocks2 ? r2 : r1);
      (std::max(r1, r2) <= limit ? small : large).push_back(modules + l);
    }
    // The largest first, so that no thread is left with one at the end.
    std::stable_sort(small.begin(), small.end(), [](auto* a, auto* b) {
      return (a->p + a->q) * (a->n1 + a->n2) > (b->p + b->q) * (b->n1 + b->n2);
    });
    parallel_for(static_cast<i64>(small.size()), options_.threads, [&](i64 t, int w) {
      const GramModule& g = *small[t];
      const Stack s1(g.blocks1, g.n1, g.weights1, limit);
      if (!g.blocks2) return one_tile(g, s1, s1, scratch_[w]);
      one_tile(g, s1, Stack(g.blocks2, g.n2, g.weights2, limit), scratch_[w]);
    });
    for (const GramModule* g : large) {
      const Stack s1(g->blocks1, g->n1, g->weights1, limit);
      if (g->blocks2) {
        many_tiles(*g, s1, Stack(g->blocks2, g->n2, g->weights2, limit));
      } else {
        many_tiles(*g, s1, s1);
      }
    }
  }

 private:
  i64 panels(i64 rows) const { return (rows + gemm_.lanes - 1) / gemm_.lanes; }

  // Empty blocks have no tile entries of their own, so their rows of the output are set here.
  void clear(const GramModule& g, i64 r1, i64 r2) const {
    const i64 n2 = g.blocks2 ? g.n2 : g.n1;
    const i64 rows = options_.reduce == Reduce::both ? g.n1 : r1;
    const i64 columns = options_.reduce == Reduce::none ? r2 : n2;
    for (std::size_t e = 0; e < plan_.epilogues.size(); e++)
      for (i64 i = 0; i < rows; i++)
        std::fill_n(g.out[e] + i * g.out_stride, columns, 0.0);
  }

  void pack(const std::vector<RowRef>& rows, const Tile& t, i64 depth, T* dst) const {
    const i64 W = gemm_.lanes, np = panels(t.rows);
    for (i64 k0 = 0; k0 < depth; k0 += gemm_.kc) {
      const i64 kc = std::min(gemm_.kc, depth - k0);
      for (i64 p = 0; p < np; p++, dst += kc * W)
        gemm_.pack_panel(rows.data() + t.first_row + p * W, std::min(W, t.rows - p * W), k0, kc,
                         dst);
    }
  }

  // Both stacks fit one tile: pack and multiply one k-block at a time, all in cache.
  void one_tile(const GramModule& g, const Stack& s1, const Stack& s2, Scratch<T>& s) const {
    if (s1.rows() == 0 || s2.rows() == 0) return;
    const bool symmetric = &s1 == &s2;
    const i64 W = gemm_.lanes;
    const Tile t1{0, s1.n, 0, s1.rows()}, t2{0, s2.n, 0, s2.rows()};
    const i64 np1 = panels(t1.rows), np2 = panels(t2.rows), ld = np2 * W;
    s.m.reserve(np1 * W * ld);
    s.n.reserve(np1 * W * ld);
    s.panels.reserve((np1 + np2) * W * gemm_.kc);
    auto product = [&](const std::vector<RowRef>& a, const std::vector<RowRef>& b, i64 depth,
                       T* c) {
      for (i64 k0 = 0; k0 < depth; k0 += gemm_.kc) {
        const i64 kc = std::min(gemm_.kc, depth - k0);
        T* pa = s.panels.data();
        T* pb = symmetric ? pa : pa + np1 * W * kc;
        for (i64 p = 0; p < np1; p++)
          gemm_.pack_panel(a.data() + p * W, std::min(W, t1.rows - p * W), k0, kc, pa + p * kc * W);
        if (!symmetric)
          for (i64 p = 0; p < np2; p++)
            gemm_.pack_panel(b.data() + p * W, std::min(W, t2.rows - p * W), k0, kc,
                             pb + p * kc * W);
        gemm_.multiply(pa, np1, pb, np2, kc, c, ld, symmetric, k0 > 0);
      }
    };
    product(s1.u, s2.u, g.p, s.m.data());
    product(s1.v, s2.v, g.q, s.n.data());
    finish(g, s1, t1, s2, t2, symmetric, ld, s);
  }

  void many_tiles(const GramModule& g, const Stack& s1, const Stack& s2) {
    const bool symmetric = &s1 == &s2;
    const i64 W = gemm_.lanes;
    auto offsets = [&](const Stack& s) {
      std::vector<i64> at(s.tiles.size() + 1, 0);
      for (std::size_t t = 0; t < s.tiles.size(); t++)
        at[t + 1] = at[t] + panels(s.tiles[t].rows) * W;
      return at;
    };
    const std::vector<i64> at1 = offsets(s1), at2 = symmetric ? at1 : offsets(s2);
    const i64 first = static_cast<i64>(s1.tiles.size()), second = static_cast<i64>(s2.tiles.size());
    u1_.reserve(at1.back() * g.p);
    v1_.reserve(at1.back() * g.q);
    if (!symmetric) {
      u2_.reserve(at2.back() * g.p);
      v2_.reserve(at2.back() * g.q);
    }
    T* const u2 = symmetric ? u1_.data() : u2_.data();
    T* const v2 = symmetric ? v1_.data() : v2_.data();
    parallel_for(2 * (symmetric ? first : first + second), options_.threads, [&](i64 task, int) {
      const i64 t = task / 2;
      const bool one = t < first, u = task % 2 == 0;
      const Stack& s = one ? s1 : s2;
      const i64 index = one ? t : t - first, depth = u ? g.p : g.q;
      T* base = one ? (u ? u1_.data() : v1_.data()) : (u ? u2 : v2);
      pack(u ? s.u : s.v, s.tiles[index], depth, base + (one ? at1 : at2)[index] * depth);
    });
    std::vector<std::pair<i64, i64>> pairs;
    for (i64 i = 0; i < first; i++)
      for (i64 j = symmetric ? i + 1 : 0; j < second; j++) pairs.emplace_back(i, j);
    // Diagonal tiles cost half: last, they even out the threads.
    for (i64 i = 0; symmetric && i < first; i++) pairs.emplace_back(i, i);
    const i64 tallest = round_up(s1.largest_tile(), W), widest = round_up(s2.largest_tile(), W);
    parallel_for(static_cast<i64>(pairs.size()), options_.threads, [&](i64 task, int w) {
      const auto [i, j] = pairs[task];
      const Tile &t1 = s1.tiles[i], &t2 = s2.tiles[j];
      const bool diagonal = symmetric && i == j;
      Scratch<T>& s = scratch_[w];
      // One cache line off a power of two, so that the rows of C do not share cache sets.
      const i64 ld = widest + 64 / static_cast<i64>(sizeof(T));
      s.m.reserve(tallest * ld);
      s.n.reserve(tallest * ld);
      gemm_.multiply(u1_.data() + at1[i] * g.p, panels(t1.rows), u2 + at2[j] * g.p,
                     panels(t2.rows), g.p, s.m.data(), ld, diagonal, false);
      gemm_.multiply(v1_.data() + at1[i] * g.q, panels(t1.rows), v2 + at2[j] * g.q,
                     panels(t2.rows), g.q, s.n.data(), ld, diagonal, false);
      finish(g, s1, t1, s2, t2, symmetric, ld, s);
    });
  }

  static void mirror(T* c, i64 rows, i64 ld) {
    for (i64 a = 0; a < rows; a++)
      for (i64 b = 0; b < a; b++) c[a * ld + b] = c[b * ld + a];
  }

  void finish(const GramModule& g, const Stack& s1, const Tile& t1, const Stack& s2,
              const Tile& t2, bool symmetric, i64 ld, Scratch<T>& s) const {
    const bool diagonal = symmetric && t1.first_block == t2.first_block;
    if (g.p == 0) std::fill_n(s.m.data(), t1.rows * ld, T(0));
    if (g.q == 0) std::fill_n(s.n.data(), t1.rows * ld, T(0));
    if (diagonal) {
      mirror(s.m.data(), t1.rows, ld);
      mirror(s.n.data(), t1.rows, ld);
    }
    if (options_.reduce == Reduce::both) return blocks(g, s1, t1, s2, t2, symmetric, ld, s);
    for (std::size_t e = 0; e < plan_.epilogues.size(); e++)
      rows(g, static_cast<int>(e), s1, t1, s2, t2, symmetric && !diagonal, ld, s);
  }

  static double weight(const Stack& s, int index, i64 row) {
    return index < 0 ? 1.0 : s.weights[index][row];
  }

  // Row sums of each block first (vectorised), then the weighted sum over each block of columns.
  void blocks(const GramModule& g, const Stack& s1, const Tile& t1, const Stack& s2,
              const Tile& t2, bool symmetric, i64 ld, Scratch<T>& s) const {
    const i64 columns = round_up(t2.rows, gemm_.lanes);
    const i64 n_channels = static_cast<i64>(plan_.channels.size());
    s.sums.reserve(columns * n_channels);
    s.weight.reserve(t1.rows);
    const bool diagonal = symmetric && t1.first_block == t2.first_block;
    for (i64 i = t1.first_block; i < t1.end_block; i++) {
      const i64 a0 = s1.row_of[i], rank = s1.blocks[i].rank;
      if (rank == 0) continue;
      const i64 offset = (a0 - t1.first_row) * ld;
      for (i64 c = 0; c < n_channels; c++) {
        const Channel& channel = plan_.channels[c];
        for (i64 a = 0; a < rank; a++)
          s.weight[a] = static_cast<T>(weight(s1, channel.weight, a0 + a));
        gemm_.reduce_rows(channel.product, s.m.data() + offset, s.n.data() + offset, ld, rank,
                          columns, s.weight.data(), s.sums.data() + c * columns);
      }
      for (i64 j = diagonal ? i : t2.first_block; j < t2.end_block; j++) {
        const i64 b0 = s2.row_of[j], width = s2.blocks[j].rank;
        for (std::size_t e = 0; e < plan_.epilogues.size(); e++) {
          const Epilogue& x = plan_.epilogues[e];
          auto total = [&](int channel, int column_weight) {
            const T* sum = s.sums.data() + channel * columns + (b0 - t2.first_row);
            double value = 0;
            for (i64 b = 0; b < width; b++)
              value += weight(s2, column_weight, b0 + b) * static_cast<double>(sum[b]);
            return value;
          };
          const double value = total(plan_.forward[e], x.column_weight);
          g.out[e][i * g.out_stride + j] = value;
          if (symmetric && i != j)
            g.out[e][j * g.out_stride + i] = x.row_weight == x.column_weight
                                                 ? value
                                                 : total(plan_.mirrored[e], x.row_weight);
        }
      }
    }
  }

  // reduce = columns or none: one output row per stacked row.
  void rows(const GramModule& g, int e, const Stack& s1, const Tile& t1, const Stack& s2,
            const Tile& t2, bool mirrored, i64 ld, const Scratch<T>& s) const {
    const Epilogue& x = plan_.epilogues[e];
    const T* m = x.product == Product::vv ? s.n.data() : s.m.data();
    const T* n = x.product == Product::uu ? s.m.data() : s.n.data();
    auto value = [&](i64 a, i64 b) {
      const i64 at = (a - t1.first_row) * ld + (b - t2.first_row);
      return static_cast<double>(m[at]) * static_cast<double>(n[at]);
    };
    double* out = g.out[e];
    const i64 a1 = t1.first_row + t1.rows, b1 = t2.first_row + t2.rows;
    if (options_.reduce == Reduce::none) {
      for (i64 a = t1.first_row; a < a1; a++)
        for (i64 b = t2.first_row; b < b1; b++) {
          out[a * g.out_stride + b] = weight(s1, x.row_weight, a) * value(a, b) *
                                      weight(s2, x.column_weight, b);
          if (mirrored)
            out[b * g.out_stride + a] = weight(s2, x.row_weight, b) * value(a, b) *
                                        weight(s1, x.column_weight, a);
        }
      return;
    }
    for (i64 a = t1.first_row; a < a1; a++)
      for (i64 j = t2.first_block; j < t2.end_block; j++) {
        double sum = 0;
        for (i64 b = s2.row_of[j]; b < s2.row_of[j + 1]; b++)
          sum += value(a, b) * weight(s2, x.column_weight, b);
        out[a * g.out_stride + j] = sum * weight(s1, x.row_weight, a);
      }
    if (!mirrored) return;
    for (i64 b = t2.first_row; b < b1; b++)
      for (i64 i = t1.first_block; i < t1.end_block; i++) {
        double sum = 0;
        for (i64 a = s1.row_of[i]; a < s1.row_of[i + 1]; a++)
          sum += value(a, b) * weight(s1, x.column_weight, a);
        out[b * g.out_stride + i] = sum * weight(s2, x.row_weight, b);
      }
  }

  const Plan& plan_;
  const GramOptions& options_;
  const GemmKernels<T>& gemm_;
  std::vector<Scratch<T>> scratch_;
  Buffer<T> u1_, v1_, u2_, v2_;
};

}  // namespace

void block_gram(const GramModule* modules, i64 n_modules, const Epilogue* epilogues,
                int n_epilogues, const GramOptions& options) {
  const Plan plan(epilogues, n_epilogues);
  if (options.fp64) {
    Run<double>(plan, options, options.kernels->f64).modules(modules, n_modules);
  } else {
    Run<float>(plan, options, options.kernels->f32).modules(modules, n_modules);
  }
}

}  // namespace mergeprobe
