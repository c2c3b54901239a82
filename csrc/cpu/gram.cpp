#include "mergeprobe/gram.hpp"

#include <algorithm>
#include <vector>

#include "gram_plan.hpp"
#include "gram_streamed.hpp"
#include "mergeprobe/parallel.hpp"

namespace mergeprobe {
namespace {

using namespace gram;

// Two fp32 scratch tiles of 320 x 320 (0.8 MB) still live in a 1 MB L2. Measured at 96 to 384 rows on
// Zen 5: 320 is best or within 2%, 192 costs 5 to 10%, 96 costs 20%.
constexpr i64 kDefaultTileRows = 320;

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
    auto cost = [&](const GramModule* g) {
      i64 columns = g->p;
      for (int view : plan_.views) columns += columns_of(*g, view);
      return columns * (g->n1 + g->n2);
    };
    std::stable_sort(small.begin(), small.end(),
                     [&](auto* a, auto* b) { return cost(a) > cost(b); });
    parallel_for(static_cast<i64>(small.size()), options_.threads, [&](i64 t, int w) {
      const GramModule& g = *small[t];
      const Stack s1(g, false, plan_.views, limit);
      if (!g.blocks2) return one_tile(g, s1, s1, scratch_[w]);
      one_tile(g, s1, Stack(g, true, plan_.views, limit), scratch_[w]);
    });
    for (const GramModule* g : large) {
      const Stack s1(*g, false, plan_.views, limit);
      if (g->blocks2) {
        many_tiles(*g, s1, Stack(*g, true, plan_.views, limit));
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
    const Pair pair{g, s1, t1, s2, t2, symmetric, ld};
    if (plan_.reads_m) {
      product(s1.u, s2.u, g.p, s.m.data());
      complete(pair, g.p, s.m.data());
    }
    for (const Group& group : plan_.groups) {
      if (group.reads_n) {
        product(s1.v[group.view], s2.v[group.view], columns_of(g, group.view), s.n.data());
        complete(pair, columns_of(g, group.view), s.n.data());
      }
      finish(pair, group, s);
    }
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
    // What is packed: u (depth p) and the v of every view in use, one after the other.
    std::vector<i64> depth{plan_.reads_m ? g.p : 0}, from{0};
    for (int view : plan_.views) depth.push_back(columns_of(g, view));
    for (i64 d : depth) from.push_back(from.back() + d);
    packed1_.reserve(at1.back() * from.back());
    if (!symmetric) packed2_.reserve(at2.back() * from.back());
    T* const two = symmetric ? packed1_.data() : packed2_.data();
    // Where operand k of a tile lies.
    auto first_of = [&](std::size_t k, i64 t) {
      return packed1_.data() + at1.back() * from[k] + at1[t] * depth[k];
    };
    auto second_of = [&](std::size_t k, i64 t) {
      return two + at2.back() * from[k] + at2[t] * depth[k];
    };
    const i64 operands = static_cast<i64>(depth.size());
    parallel_for(operands * (symmetric ? first : first + second), options_.threads,
                 [&](i64 task, int) {
      const i64 t = task / operands;
      const std::size_t k = static_cast<std::size_t>(task % operands);
      const bool one = t < first;
      const Stack& s = one ? s1 : s2;
      const i64 index = one ? t : t - first;
      if (k == 0 && !plan_.reads_m) return;
      pack(k == 0 ? s.u : s.v[plan_.views[k - 1]], s.tiles[index], depth[k],
           one ? first_of(k, index) : second_of(k, index));
    });
    std::vector<std::pair<i64, i64>> pairs;
    for (i64 i = 0; i < first; i++)
      for (i64 j = symmetric ? i + 1 : 0; j < second; j++) pairs.emplace_back(i, j);
    // Diagonal tiles cost half: last, they even out the threads.
    for (i64 i = 0; symmetric && i < first; i++) pairs.emplace_back(i, i);
    const i64 tallest = round_up(s1.largest_tile(), W), widest = round_up(s2.largest_tile(), W);
    parallel_for(static_cast<i64>(pairs.size()), options_.threads, [&](i64 task, int w) {
      const i64 i = pairs[task].first, j = pairs[task].second;
      const Tile &t1 = s1.tiles[i], &t2 = s2.tiles[j];
      const bool diagonal = symmetric && i == j;
      Scratch<T>& s = scratch_[w];
      // One cache line off a power of two, so that the rows of C do not share cache sets.
      const i64 ld = widest + 64 / static_cast<i64>(sizeof(T));
      s.m.reserve(tallest * ld);
      s.n.reserve(tallest * ld);
      auto product = [&](std::size_t k, T* c) {
        gemm_.multiply(first_of(k, i), panels(t1.rows), second_of(k, j), panels(t2.rows), depth[k],
                       c, ld, diagonal, false);
      };
      const Pair pair{g, s1, t1, s2, t2, symmetric, ld};
      if (plan_.reads_m) {
        product(0, s.m.data());
        complete(pair, depth[0], s.m.data());
      }
      std::size_t k = 0;
      for (const Group& group : plan_.groups) {
        if (group.reads_n) {
          k++;
          product(k, s.n.data());
          complete(pair, depth[k], s.n.data());
        }
        finish(pair, group, s);
      }
    });
  }

  // One tile of a module's Gram: blocks t1 of the first stack against t2 of the second.
  struct Pair {
    const GramModule& g;
    const Stack& s1;
    const Tile& t1;
    const Stack& s2;
    const Tile& t2;
    bool symmetric;
    i64 ld;
    bool diagonal() const { return symmetric && t1.first_block == t2.first_block; }
  };

  // What `multiply` leaves out: the lower triangle, and everything where there are no columns.
  static void complete(const Pair& x, i64 depth, T* c) {
    if (depth == 0) std::fill_n(c, x.t1.rows * x.ld, T(0));
    if (!x.diagonal()) return;
    for (i64 a = 0; a < x.t1.rows; a++)
      for (i64 b = 0; b < a; b++) c[a * x.ld + b] = c[b * x.ld + a];
  }

  void finish(const Pair& x, const Group& group, Scratch<T>& s) const {
    if (options_.reduce == Reduce::both) return blocks(x, group, s);
    for (int e : group.epilogues) rows(x, e, s);
  }

  static double weight(const Stack& s, int index, i64 row) {
    return index < 0 ? 1.0 : s.weights[index][row];
  }

  // Row sums of each block first (vectorised), then the weighted sum over each block of columns.
  void blocks(const Pair& pair, const Group& group, Scratch<T>& s) const {
    const GramModule& g = pair.g;
    const Stack &s1 = pair.s1, &s2 = pair.s2;
    const Tile &t1 = pair.t1, &t2 = pair.t2;
    const i64 ld = pair.ld;
    const i64 columns = round_up(t2.rows, gemm_.lanes);
    const i64 n_channels = static_cast<i64>(group.channels.size());
    s.sums.reserve(columns * n_channels);
    s.weight.reserve(t1.rows);
    const bool diagonal = pair.diagonal();
    for (i64 i = t1.first_block; i < t1.end_block; i++) {
      const i64 a0 = s1.row_of[i], rank = s1.blocks[i].rank;
      if (rank == 0) continue;
      const i64 offset = (a0 - t1.first_row) * ld;
      for (i64 c = 0; c < n_channels; c++) {
        const Channel& channel = group.channels[c];
        for (i64 a = 0; a < rank; a++)
          s.weight[a] = static_cast<T>(weight(s1, channel.weight, a0 + a));
        gemm_.reduce_rows(channel.product, s.m.data() + offset, s.n.data() + offset, ld, rank,
                          columns, s.weight.data(), s.sums.data() + c * columns);
      }
      for (i64 j = diagonal ? i : t2.first_block; j < t2.end_block; j++) {
        const i64 b0 = s2.row_of[j], width = s2.blocks[j].rank;
        for (std::size_t k = 0; k < group.epilogues.size(); k++) {
          const int e = group.epilogues[k];
          const Epilogue& x = plan_.epilogues[e];
          auto total = [&](int channel, int column_weight) {
            const T* sum = s.sums.data() + channel * columns + (b0 - t2.first_row);
            double value = 0;
            for (i64 b = 0; b < width; b++)
              value += weight(s2, column_weight, b0 + b) * static_cast<double>(sum[b]);
            return value;
          };
          const double value = total(group.forward[k], x.column_weight);
          g.out[e][i * g.out_stride + j] = value;
          if (pair.symmetric && i != j)
            g.out[e][j * g.out_stride + i] = x.row_weight == x.column_weight
                                                 ? value
                                                 : total(group.mirrored[k], x.row_weight);
        }
      }
    }
  }

  // reduce = columns or none: one output row per stacked row.
  void rows(const Pair& pair, int e, const Scratch<T>& s) const {
    const GramModule& g = pair.g;
    const Stack &s1 = pair.s1, &s2 = pair.s2;
    const Tile &t1 = pair.t1, &t2 = pair.t2;
    const i64 ld = pair.ld;
    const bool mirrored = pair.symmetric && !pair.diagonal();
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
  // Not in huge pages: with glibc asking for them, 2 to 200 adapters took within 1.5% as long.
  Buffer<T> packed1_, packed2_;
};

// Modules that stream the same products together: what they stream, and the rest in tiles.
void partly_streamed(const GramModule* modules, i64 n_modules, const Plan& plan,
                     const GramOptions& options) {
  std::vector<const GramModule*> by_products[8];
  for (i64 l = 0; l < n_modules; l++)
    by_products[streamed_products(modules[l], plan, options)].push_back(modules + l);
  for (Products products = 0; products < 8; products++) {
    const auto& here = by_products[products];
    if (here.empty()) continue;
    stream(here, products, plan, options);
    std::vector<Epilogue> rest;
    std::vector<double*> out;
    for (const GramModule* g : here)
      for (std::size_t e = 0; e < plan.epilogues.size(); e++)
        if (!streams(products, plan.epilogues[e])) out.push_back(g->out[e]);
    for (const Epilogue& x : plan.epilogues)
      if (!streams(products, x)) rest.push_back(x);
    if (rest.empty()) continue;
    std::vector<GramModule> same;
    for (const GramModule* g : here) {
      same.push_back(*g);
      same.back().out = out.data() + (same.size() - 1) * rest.size();
    }
    const Plan tiles(rest.data(), static_cast<int>(rest.size()));
    Run<float>(tiles, options, options.kernels->f32)
        .modules(same.data(), static_cast<i64>(same.size()));
  }
}

}  // namespace

void block_gram(const GramModule* modules, i64 n_modules, const Epilogue* epilogues,
                int n_epilogues, const GramOptions& options) {
  const Plan plan(epilogues, n_epilogues);
  if (options.fp64) {
    Run<double>(plan, options, options.kernels->f64).modules(modules, n_modules);
  } else if (options.streaming == Streaming::never || options.reduce != Reduce::both) {
    Run<float>(plan, options, options.kernels->f32).modules(modules, n_modules);
  } else {
    partly_streamed(modules, n_modules, plan, options);
  }
}

}  // namespace mergeprobe
