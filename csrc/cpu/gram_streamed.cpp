#include "gram_streamed.hpp"

#include "mergeprobe/parallel.hpp"

namespace mergeprobe::gram {
namespace {

// Blocks a side of a tile of the Gram: its float32 sums (150 KB) and a k-block of both operands
// stay in L2. Measured: 96 to 320 are within 5%.
constexpr i64 kGramRows = 192;
// Flattened tiles of all blocks in memory at once, or one of each. Measured: 8 MiB take 10% longer
// than 2 with 50 blocks and are within 3% with 200; 32 MiB lose 10 to 30%.
constexpr i64 kSlabBytes = i64{2} << 20;

constexpr i64 kMostLanes = 16;

// One stack of blocks and its packed factors.
struct Side {
  const Block* blocks;
  i64 n;
  const double* const* weights;
  i64 columns[2], panels[2];  // of every u and of every v
  std::vector<i64> row_of;    // n + 1
  std::vector<i64> tiles;     // panels of blocks at which the Gram's tiles start, and their end
  Buffer<float>* packed;      // of u and of v

  Side(const GramModule& g, bool second, i64 lanes, Buffer<float>* to)
      : blocks(second ? g.blocks2 : g.blocks1),
        n(second ? g.n2 : g.n1),
        weights(second ? g.weights2 : g.weights1),
        columns{g.p, g.q},
        panels{round_up(g.p, lanes) / lanes, round_up(g.q, lanes) / lanes},
        row_of(static_cast<std::size_t>(n) + 1, 0),
        packed(to) {
    for (i64 i = 0; i < n; i++) row_of[i + 1] = row_of[i] + blocks[i].rank;
    const i64 all = round_up(n, lanes) / lanes, most = kGramRows / lanes;
    const i64 count = (all + most - 1) / most;
    for (i64 t = 0; t <= count; t++) tiles.push_back(count ? all * t / count : 0);
  }
  i64 gram_tiles() const { return static_cast<i64>(tiles.size()) - 1; }
  i64 rows(i64 t) const { return tiles[t + 1] - tiles[t]; }
  // A block's factor: [k-block][panel][k][lane], k its rank.
  float* factor(int which, i64 i, i64 lanes) const {
    return packed[which].data() + row_of[i] * panels[which] * lanes;
  }
};

struct Scratch {
  Buffer<float> weighted, dense, gram;
};

class Streamer {
 public:
  explicit Streamer(const GramOptions& options)
      : options_(options),
        gemm_(options.kernels->f32),
        W(gemm_.lanes),
        scratch_(std::max(1, options.threads)) {}

  void module(const GramModule& g, Products products, const Plan& plan) {
    const bool symmetric = g.blocks2 == nullptr;
    const Side one(g, false, W, factors_[0]);
    const Side two(g, !symmetric, W, factors_[symmetric ? 0 : 1]);
    std::vector<Work> all;
    bool reads[2] = {false, false};
    for (Product x : {Product::uv, Product::uu, Product::vv}) {
      if (!has(products, x)) continue;
      all.emplace_back(x, g, plan.epilogues);
      reads[left_of(x)] = reads[right_of(x)] = true;
    }
    for (int which : {0, 1}) {
      if (!reads[which]) continue;
      pack(one, which);
      if (!symmetric) pack(two, which);
    }
    for (const Work& work : all) product(g, work, one, symmetric ? one : two);
  }

 private:
  void pack(const Side& side, int which) const {
    const i64 panels = side.panels[which];
    side.packed[which].reserve(side.row_of.back() * panels * W);
    parallel_for(side.n, options_.threads, [&](i64 i, int) {
      const Block& b = side.blocks[i];
      const Matrix& m = which == 0 ? b.u : b.v;
      float* to = side.factor(which, i, W);
      std::vector<RowRef> rows(static_cast<std::size_t>(W));
      for (i64 k0 = 0; k0 < b.rank; k0 += gemm_.kc) {
        const i64 kc = std::min(gemm_.kc, b.rank - k0);
        for (i64 panel = 0; panel < panels; panel++, to += kc * W) {
          const i64 count = std::min(W, side.columns[which] - panel * W);
          for (i64 t = 0; t < count; t++)
            rows[t] = {at(m, 0, panel * W + t), m.row_stride, m.dtype};
          gemm_.pack_panel(rows.data(), count, k0, kc, to);
        }
      }
    });
  }

  // Tiles of the dense matrices, as many at a time as the slab holds.
  void product(const GramModule& g, const Work& work, const Side& one, const Side& two) {
    const int left = left_of(work.product), right = right_of(work.product);
    const bool symmetric = &one == &two;
    for (const Sum& sum : work.sums)
      for (i64 i = 0; i < one.n; i++) std::fill_n(sum.out + i * g.out_stride, two.n, 0.0);
    const std::vector<DenseTile> tiles = cut(one.panels[left], one.panels[right], left == right, W);
    Slab slab;
    slab.second = one.tiles.back() * work.kinds[0].count();
    slab.panels = slab.second + (symmetric ? 0 : two.tiles.back() * work.kinds[1].count());
    if (slab.panels == 0) return;
    const i64 most = kSlabBytes / (4 * W * slab.panels);
    for (std::size_t first = 0; first < tiles.size(); first += slab.tiles.size()) {
      slab.tiles.clear();
      slab.starts.assign(1, 0);
      for (std::size_t t = first; t < tiles.size(); t++) {
        const i64 end = slab.starts.back() + depth(tiles[t]);
        if (t > first && end > most) break;
        slab.tiles.push_back(tiles[t]);
        slab.starts.push_back(end);
      }
      memory_.reserve(slab.starts.back() * slab.panels * W);
      fill(work, one, two, slab);
      multiply(g, work, one, two, slab);
    }
    // A sum of squares is none below zero, which its rounding may be.
    const bool squares = left == right && not_negative(one, work.kinds[0]) &&
                         not_negative(two, work.kinds[symmetric ? 0 : 1]);
    for (const Sum& sum : work.sums)
      for (i64 i = 0; i < one.n; i++) {
        double* out = sum.out + i * g.out_stride;
        const i64 known = symmetric && sum.row == sum.column ? i : 0;
        for (i64 j = 0; j < known; j++) out[j] = sum.out[j * g.out_stride + i];
        for (i64 j = known; squares && j < two.n; j++) out[j] = std::max(out[j], 0.0);
      }
  }

  static bool not_negative(const Side& side, const Kinds& kinds) {
    for (int weight : kinds.weights)
      for (i64 a = 0; weight >= 0 && a < side.row_of.back(); a++)
        if (side.weights[weight][a] < 0) return false;
    return true;
  }

  // Numbers of a flattened tile.
  i64 depth(const DenseTile& t) const { return t.rows * W * t.columns * W; }

  // Some tiles, flattened and packed: [tile][side][kind][Gram tile][k-block][panel][k][lane], with
  // a block in each lane.
  struct Slab {
    i64 second, panels;       // panels of the first side, and of both
    std::vector<DenseTile> tiles;
    std::vector<i64> starts;  // k at which they start, and the end
  };

  float* at_panel(const Slab& slab, std::size_t tile, const Side& side, bool second,
                  std::size_t kind, i64 t) const {
    const i64 panel = (second ? slab.second : 0) +
                      static_cast<i64>(kind) * side.tiles.back() + side.tiles[t];
    const i64 before = slab.starts[tile] * slab.panels;
    return memory_.data() + (before + panel * (slab.starts[tile + 1] - slab.starts[tile])) * W;
  }

  void fill(const Work& work, const Side& one, const Side& two, const Slab& slab) {
    struct Job {
      std::size_t tile;
      bool second;
      std::size_t kind;
      i64 t, panel;
    };
    std::vector<Job> jobs;
    for (std::size_t k = 0; k < slab.tiles.size(); k++)
      for (int s = 0; s < 2; s++) {
        const Side& side = s ? two : one;
        // All kinds of some blocks while their factors are in cache.
        for (i64 t = 0; t < side.gram_tiles(); t++)
          for (i64 panel = 0; panel < side.rows(t); panel++)
            for (std::size_t kind = 0; kind < work.kinds[s].weights.size(); kind++)
              jobs.push_back({k, s == 1, kind, t, panel});
      }
    parallel_for(static_cast<i64>(jobs.size()), options_.threads, [&](i64 j, int w) {
      const Job& job = jobs[j];
      const Side& side = job.second ? two : one;
      const DenseTile& tile = slab.tiles[job.tile];
      const i64 size = depth(tile);
      // One cache line more, so that the rows do not share cache sets.
      const i64 stride = size + 16;
      Scratch& s = scratch_[w];
      s.dense.reserve(stride * W);
      const i64 i0 = (side.tiles[job.t] + job.panel) * W, count = std::min(W, side.n - i0);
      RowRef rows[kMostLanes];
      for (i64 i = 0; i < count; i++) {
        float* to = s.dense.data() + i * stride;
        form(side, i0 + i, work.product, work.kinds[job.second].weights[job.kind], tile, to, s);
        rows[i] = {to, 1, Dtype::f32};
      }
      float* to = at_panel(slab, job.tile, side, job.second, job.kind, job.t);
      for (i64 k0 = 0; k0 < size; k0 += gemm_.kc) {
        const i64 kc = std::min(gemm_.kc, size - k0);
        gemm_.pack_panel(rows, count, k0, kc, to + (k0 * side.rows(job.t) + job.panel * kc) * W);
      }
    });
  }

  // A tile of one block's dense matrix, row by row.
  void form(const Side& side, i64 i, Product product, int weight, const DenseTile& tile, float* to,
            Scratch& s) const {
    const i64 rank = side.blocks[i].rank, ld = tile.columns * W;
    if (rank == 0) std::fill_n(to, depth(tile), 0.0f);
    const int left = left_of(product), right = right_of(product);
    const i64 left_panels = side.panels[left], right_panels = side.panels[right];
    s.weighted.reserve(tile.rows * W * gemm_.kc);
    for (i64 k0 = 0; k0 < rank; k0 += gemm_.kc) {
      const i64 kc = std::min(gemm_.kc, rank - k0);
      const float* a =
          side.factor(left, i, W) + (k0 * left_panels + tile.row * kc) * W;
      const float* b =
          side.factor(right, i, W) + (k0 * right_panels + tile.column * kc) * W;
      if (weight >= 0) {
        const double* weights = side.weights[weight] + side.row_of[i] + k0;
        for (i64 panel = 0; panel < tile.rows; panel++)
          for (i64 k = 0; k < kc; k++) {
            const i64 from = (panel * kc + k) * W;
            const float x = static_cast<float>(weights[k]);
            for (i64 lane = 0; lane < W; lane++) s.weighted[from + lane] = x * a[from + lane];
          }
        a = s.weighted.data();
      }
      gemm_.multiply(a, tile.rows, b, tile.columns, kc, to, ld, false, k0 > 0);
    }
  }

  void multiply(const GramModule& g, const Work& work, const Side& one, const Side& two,
                const Slab& slab) {
    const bool symmetric = &one == &two;
    struct Job {
      const Sum* sum;
      i64 t1, t2;
    };
    std::vector<Job> jobs;
    for (const Sum& sum : work.sums)
      for (i64 t1 = 0; t1 < one.gram_tiles(); t1++)
        for (i64 t2 = symmetric && sum.row == sum.column ? t1 : 0; t2 < two.gram_tiles(); t2++)
          jobs.push_back({&sum, t1, t2});
    parallel_for(static_cast<i64>(jobs.size()), options_.threads, [&](i64 j, int w) {
      const Job& job = jobs[j];
      const bool upper = symmetric && job.sum->row == job.sum->column && job.t1 == job.t2;
      const i64 rows = one.rows(job.t1), columns = two.rows(job.t2), ld = columns * W + 16;
      Buffer<float>& c = scratch_[w].gram;
      c.reserve(rows * W * ld);
      const i64 i0 = one.tiles[job.t1] * W, i1 = std::min(one.n, i0 + rows * W);
      const i64 j0 = two.tiles[job.t2] * W, j1 = std::min(two.n, j0 + columns * W);
      for (std::size_t k = 0; k < slab.tiles.size(); k++) {
        gemm_.multiply(at_panel(slab, k, one, false, job.sum->row, job.t1), rows,
                       at_panel(slab, k, two, !symmetric, job.sum->column, job.t2), columns,
                       depth(slab.tiles[k]), c.data(), ld, upper, false);
        const double times = slab.tiles[k].times;
        for (i64 i = i0; i < i1; i++) {
          double* out = job.sum->out + i * g.out_stride;
          const float* from = c.data() + (i - i0) * ld;
          for (i64 l = upper ? i : j0; l < j1; l++)
            out[l] += times * static_cast<double>(from[l - j0]);
        }
      }
    });
  }

  const GramOptions& options_;
  const GemmKernels<float>& gemm_;
  const i64 W;
  std::vector<Scratch> scratch_;
  Buffer<float> factors_[2][2], memory_;
};

}  // namespace

void stream(const std::vector<const GramModule*>& modules, Products products, const Plan& plan,
            const GramOptions& options) {
  Streamer streamer(options);
  for (const GramModule* g : modules) streamer.module(*g, products, plan);
}

}  // namespace mergeprobe::gram
