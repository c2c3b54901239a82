#include "mergeprobe/angles.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#include "mergeprobe/parallel.hpp"

namespace mergeprobe {
namespace {

// Two tiles of cosines of this many rows (1 MB in float64) live in L2 beside the panels.
constexpr i64 kTileRows = 256;
// Deviation from orthonormal vectors that shows in no squared sine.
constexpr double kOrthonormal = 1e-14;

// Entries of one stack that the kernels take, at most kTileRows rows of them.
struct Tile {
  std::vector<i64> entries;
  std::vector<i64> row_of;  // where each starts; one more
  i64 rows() const { return row_of.back(); }
};

struct Stack {
  const Block* blocks;
  const double* sigma;
  i64 n;
  std::vector<Tile> tiles;
  std::vector<i64> own;  // where each entry's own deviations start, those of u, then of v

  Stack(const Block* b, const double* s, i64 count) : blocks(b), sigma(s), n(count) {
    for (i64 i = 0; i < n; i++) {
      own.push_back(-1);
      if (b[i].rank < 1 || b[i].rank > kWidestAngles) continue;
      if (tiles.empty() || tiles.back().rows() + b[i].rank > kTileRows) tiles.push_back({{}, {0}});
      tiles.back().entries.push_back(i);
      tiles.back().row_of.push_back(tiles.back().rows() + b[i].rank);
    }
  }
};

struct Workspace {
  Buffer<double> panels, m, n, lanes;
};

struct Task {
  i64 module, one, two;  // tiles
};

double power(double x) { return x * x; }

class Run {
 public:
  Run(const AngleModule* modules, i64 count, i64 top, const Kernels& kernels, int threads)
      : modules_(modules), top_(top), g_(kernels.f64), k_(*kernels.angles), threads_(threads),
        work_(static_cast<std::size_t>(std::max(1, threads))) {
    for (i64 l = 0; l < count; l++) {
      const AngleModule& a = modules[l];
      ones_.emplace_back(a.blocks1, a.sigma1, a.n1);
      twos_.emplace_back(a.blocks2, a.sigma2, a.blocks2 ? a.n2 : 0);
    }
  }

  void run() {
    deviations();
    std::vector<Task> tasks;
    for (i64 l = 0; l < static_cast<i64>(ones_.size()); l++) {
      const i64 n1 = count(ones_[l]), n2 = count(second(l));
      for (i64 i = 0; i < n1; i++)
        for (i64 j = symmetric(l) ? i : 0; j < n2; j++) tasks.push_back({l, i, j});
    }
    // The largest first, so that no thread is left with one at the end.
    auto cost = [&](const Task& t) {
      const i64 both = ones_[t.module].tiles[t.one].rows() * second(t.module).tiles[t.two].rows();
      return both * (modules_[t.module].p + modules_[t.module].q);
    };
    std::stable_sort(tasks.begin(), tasks.end(),
                     [&](const Task& a, const Task& b) { return cost(a) > cost(b); });
    parallel_for(static_cast<i64>(tasks.size()), threads_,
                 [&](i64 t, int w) { tile(tasks[t], work_[w]); });
  }

 private:
  static i64 count(const Stack& s) { return static_cast<i64>(s.tiles.size()); }
  bool symmetric(i64 l) const { return modules_[l].blocks2 == nullptr; }
  const Stack& second(i64 l) const { return symmetric(l) ? ones_[l] : twos_[l]; }
  i64 panels(i64 rows) const { return (rows + g_.lanes - 1) / g_.lanes; }

  void rows_of(const Stack& s, const Tile& t, bool u, std::vector<RowRef>& out) const {
    out.clear();
    for (i64 i : t.entries)
      for (i64 a = 0; a < s.blocks[i].rank; a++) {
        const Matrix& m = u ? s.blocks[i].u : s.blocks[i].v;
        out.push_back({at(m, a, 0), m.col_stride, m.dtype});
      }
  }

  // C = A B^T; `upper`: A is B, and only panels on or above the diagonal.
  void product(const std::vector<RowRef>& a, const std::vector<RowRef>& b, i64 depth, bool upper,
               Workspace& w, double* c, i64 ld) const {
    const i64 lanes = g_.lanes, np1 = panels(static_cast<i64>(a.size()));
    const i64 np2 = panels(static_cast<i64>(b.size()));
    w.panels.reserve((np1 + np2) * lanes * g_.kc);
    auto pack = [&](const std::vector<RowRef>& from, i64 k0, i64 kc, double* to) {
      const i64 n = static_cast<i64>(from.size());
      for (i64 p = 0; p < panels(n); p++)
        g_.pack_panel(from.data() + p * lanes, std::min(lanes, n - p * lanes), k0, kc,
                      to + p * kc * lanes);
    };
    for (i64 k0 = 0; k0 < depth; k0 += g_.kc) {
      const i64 kc = std::min(g_.kc, depth - k0);
      double* const pa = w.panels.data();
      double* const pb = upper ? pa : pa + np1 * lanes * kc;
      pack(a, k0, kc, pa);
      if (!upper) pack(b, k0, kc, pb);
      g_.multiply(pa, np1, pb, np2, kc, c, ld, upper, k0 > 0);
    }
    if (depth == 0) std::fill_n(c, np1 * lanes * ld, 0.0);
  }

  // U^T U - 1 and V^T V - 1 of every entry.
  void deviations() {
    std::vector<std::pair<i64, i64>> entries;  // module, entry; those of the second stack negative
    i64 total = 0;
    for (i64 l = 0; l < static_cast<i64>(ones_.size()); l++)
      for (bool first : {true, false}) {
        Stack& s = first ? ones_[l] : twos_[l];
        for (const Tile& t : s.tiles)
          for (i64 i : t.entries) {
            s.own[i] = total;
            total += 2 * s.blocks[i].rank * s.blocks[i].rank;
            entries.emplace_back(l, first ? i : -1 - i);
          }
      }
    own_.resize(static_cast<std::size_t>(total));
    parallel_for(static_cast<i64>(entries.size()), threads_, [&](i64 t, int worker) {
      const i64 l = entries[t].first;
      const bool first = entries[t].second >= 0;
      const i64 i = first ? entries[t].second : -1 - entries[t].second;
      const Stack& s = first ? ones_[l] : twos_[l];
      const i64 k = s.blocks[i].rank, ld = panels(k) * g_.lanes;
      const Tile alone{{i}, {0, k}};
      Workspace& w = work_[worker];
      w.m.reserve(ld * ld);
      double* to = own_.data() + s.own[i];
      std::vector<RowRef> rows;
      for (bool u : {true, false}) {
        rows_of(s, alone, u, rows);
        product(rows, rows, u ? modules_[l].p : modules_[l].q, true, w, w.m.data(), ld);
        for (i64 a = 0; a < k; a++)
          for (i64 b = 0; b < k; b++)
            *to++ = w.m[std::min(a, b) * ld + std::max(a, b)] - (a == b ? 1.0 : 0.0);
      }
    });
  }

  void tile(const Task& task, Workspace& w) const {
    const AngleModule& module = modules_[task.module];
    const Stack &s1 = ones_[task.module], &s2 = second(task.module);
    const Tile &t1 = s1.tiles[task.one], &t2 = s2.tiles[task.two];
    const bool diagonal = symmetric(task.module) && task.one == task.two;
    // One cache line off a power of two, so that rows do not share cache sets.
    const i64 ld = panels(t2.rows()) * g_.lanes + 8, size = panels(t1.rows()) * g_.lanes * ld;
    w.m.reserve(size);
    w.n.reserve(size);
    std::vector<RowRef> a, b;
    for (bool u : {true, false}) {
      rows_of(s1, t1, u, a);
      rows_of(s2, t2, u, b);
      product(a, b, u ? module.p : module.q, diagonal, w, u ? w.m.data() : w.n.data(), ld);
    }
    // Pairs of like ranks go together, so that few lanes are padded.
    std::vector<Pair> pairs;
    for (std::size_t i = 0; i < t1.entries.size(); i++)
      for (std::size_t j = diagonal ? i + 1 : 0; j < t2.entries.size(); j++) {
        const i64 x = t1.entries[i], y = t2.entries[j];
        pairs.push_back(
            {x, y, s1.blocks[x].rank, s2.blocks[y].rank, t1.row_of[i] * ld + t2.row_of[j]});
      }
    std::stable_sort(pairs.begin(), pairs.end(), [](const Pair& x, const Pair& y) {
      return x.k1 != y.k1 ? x.k1 < y.k1 : x.k2 < y.k2;
    });
    for (std::size_t p = 0; p < pairs.size(); p += static_cast<std::size_t>(k_.lanes))
      group(module, s1, s2, pairs.data() + p,
            std::min(k_.lanes, static_cast<i64>(pairs.size() - p)), ld, w);
  }

  struct Pair {
    i64 i, j, k1, k2, at;
  };

  // Entries of a small matrix into lane `lane` of a larger one.
  void gather(const double* from, i64 ld, i64 rows, i64 cols, i64 wide, i64 lane,
              double* to) const {
    for (i64 a = 0; a < rows; a++)
      for (i64 b = 0; b < cols; b++) to[(a * wide + b) * k_.lanes + lane] = from[a * ld + b];
  }

  void group(const AngleModule& module, const Stack& s1, const Stack& s2, const Pair* pairs,
             i64 count, i64 ld, Workspace& w) const {
    const i64 lanes = k_.lanes;
    i64 k1 = 0, k2 = 0;
    for (i64 p = 0; p < count; p++) {
      k1 = std::max(k1, pairs[p].k1);
      k2 = std::max(k2, pairs[p].k2);
    }
    const i64 k = k1 + k2, n = std::min(k1, k2);
    const i64 zeroed = 2 * k1 * k2 + k + 2 * (k1 * k1 + k2 * k2);
    w.lanes.reserve((zeroed + 2 * n + 3 * k + kAngleStatistics) * lanes + k_.scratch(k1, k2));
    double* next = w.lanes.data();
    std::fill_n(next, zeroed * lanes, 0.0);
    auto take = [&](i64 size) { return std::exchange(next, next + size * lanes); };
    double *const m = take(k1 * k2), *const c = take(k1 * k2), *const sigma1 = take(k1),
           *const sigma2 = take(k2);
    double* const own[4] = {take(k1 * k1), take(k2 * k2), take(k1 * k1), take(k2 * k2)};
    const AngleResults out{take(n), take(n), take(k), take(k), take(k), take(kAngleStatistics)};
    double top[64], deviation[2] = {0, 0};
    for (i64 lane = 0; lane < lanes; lane++) {
      const Pair& p = pairs[std::min(lane, count - 1)];
      gather(w.m.data() + p.at, ld, p.k1, p.k2, k2, lane, m);
      gather(w.n.data() + p.at, ld, p.k1, p.k2, k2, lane, c);
      const double* const one = s1.sigma + p.i * module.sigma_stride;
      const double* const two = s2.sigma + p.j * module.sigma_stride;
      top[lane] = std::max(one[0], two[0]);
      for (i64 a = 0; a < p.k1; a++) sigma1[a * lanes + lane] = one[a] / top[lane];
      for (i64 b = 0; b < p.k2; b++) sigma2[b * lanes + lane] = two[b] / top[lane];
      const double* const d1 = own_.data() + s1.own[p.i];
      const double* const d2 = own_.data() + s2.own[p.j];
      for (int v = 0; v < 2; v++) {
        gather(d1 + v * p.k1 * p.k1, p.k1, p.k1, p.k1, k1, lane, own[2 * v]);
        gather(d2 + v * p.k2 * p.k2, p.k2, p.k2, p.k2, k2, lane, own[2 * v + 1]);
        for (i64 x = 0; x < p.k1 * p.k1; x++)
          deviation[v] = std::max(deviation[v], std::fabs(d1[v * p.k1 * p.k1 + x]));
        for (i64 x = 0; x < p.k2 * p.k2; x++)
          deviation[v] = std::max(deviation[v], std::fabs(d2[v * p.k2 * p.k2 + x]));
      }
    }
    const bool u = deviation[0] > kOrthonormal, v = deviation[1] > kOrthonormal;
    k_.pairs({k1, k2, m, c, sigma1, sigma2, u ? own[0] : nullptr, u ? own[1] : nullptr,
              v ? own[2] : nullptr, v ? own[3] : nullptr, next},
             out);
    const bool triangle = module.blocks2 == nullptr;
    const i64 wide = triangle ? module.n1 : module.n2;
    for (i64 lane = 0; lane < count; lane++) {
      const Pair& p = pairs[lane];
      double results[kAngleStatistics];
      for (int s = kDot; s < kAngleStatistics; s++) results[s] = out.sums[s * lanes + lane];
      const i64 least = std::min(p.k1, p.k2);
      angles(out.row + lane, least, results);
      angles(out.col + lane, least, results + kPerSide);
      ends(c + lane, p, k2, results);
      ends(m + lane, p, k2, results + kPerSide);
      results[kAligned] = out.sums[kAligned * lanes + lane];
      results[kPerSide + kAligned] = out.sums[(kPerSide + kAligned) * lanes + lane];
      sum(out, lane, k, results);
      const double t = top[lane];
      for (int s : {kEntries1, kEntries2, kMergedLargest, kMergedSum}) results[s] *= t;
      for (int s : {int{kAligned}, kPerSide + kAligned, int{kDot}, int{kRow1}, int{kRow2},
                    int{kCol1}, int{kCol2}, int{kBoth1}, int{kBoth2}, int{kAgreeing}})
        results[s] *= t * t;
      double* to = module.out + angle_place(triangle, wide, p.i, p.j);
      for (int s = 0; s < kAngleStatistics; s++) to[s * module.out_stride] = results[s];
    }
  }

  // From the `least` largest squared cosines, `lanes` apart and descending.
  void angles(const double* squares, i64 least, double* out) const {
    double logs = 0;
    std::fill_n(out, kPerSide, 0.0);
    for (i64 i = 0; i < least; i++) {
      const double square = std::clamp(squares[i * k_.lanes], 0.0, 1.0), sine2 = 1 - square;
      const double cosine = std::sqrt(square), angle = std::atan2(std::sqrt(sine2), cosine);
      out[kCosineSum] += cosine;
      out[kAngles] += angle * angle;
      out[kSines] += sine2;
      out[kHalves] += 2 * sine2 / (1 + cosine);
      logs -= std::log(std::max(square, kLeastSquare));
      if (i == 0) out[kCosineLargest] = cosine;
      out[kCosineSmallest] = cosine;
      out[kGap] = sine2;
    }
    out[kLogs] = logs;
  }

  // Squares of the cosines between the strongest directions of both, and between the weakest.
  void ends(const double* x, const Pair& p, i64 wide, double* out) const {
    const i64 t = std::min({top_, p.k1, p.k2});
    double first = 0, last = 0;
    for (i64 a = 0; a < t; a++)
      for (i64 b = 0; b < t; b++) {
        first += power(x[(a * wide + b) * k_.lanes]);
        last += power(x[((p.k1 - t + a) * wide + p.k2 - t + b) * k_.lanes]);
      }
    out[kTop] = first;
    out[kBottom] = last;
  }

  // The sum W1 + W2, direction by direction of its left singular vectors.
  void sum(const AngleResults& r, i64 lane, i64 k, double* out) const {
    double largest = 0, values = 0, agreeing = 0;
    for (i64 a = 0; a < k; a++) largest = std::max(largest, r.merged[a * k_.lanes + lane]);
    const double floor = 1e-14 * largest;  // what rounding leaves of a zero
    for (i64 a = 0; a < k; a++) {
      const double square = r.merged[a * k_.lanes + lane];
      const double apart = r.energy1[a * k_.lanes + lane] + r.energy2[a * k_.lanes + lane];
      agreeing += std::max((square - apart) / 2, 0.0);
      if (square > floor) values += std::sqrt(square);
    }
    out[kMergedLargest] = std::sqrt(largest);
    out[kMergedSum] = values;
    out[kAgreeing] = agreeing;
  }

  const AngleModule* const modules_;
  const i64 top_;
  const GemmKernels<double>& g_;
  const AngleKernels& k_;
  const int threads_;
  std::vector<Stack> ones_, twos_;
  std::vector<double> own_;
  std::vector<Workspace> work_;
};

}  // namespace

void pair_angles(const AngleModule* modules, i64 n_modules, i64 top, const Kernels& kernels,
                 int threads) {
  Run(modules, n_modules, top, kernels, threads).run();
}

template <class T>
void small_singular_values(const T* x, i64 count, i64 m, i64 n, double* out,
                           const Kernels& kernels, int threads) {
  const AngleKernels& k = *kernels.angles;
  const i64 lanes = k.lanes, few = std::min(m, n), many = m + n - few;
  const i64 batch = lanes * kAngleGroups, size = many * few * lanes;
  const i64 spare = few * (few + kAngleGroups + 2) * lanes;
  std::vector<Buffer<double>> work(static_cast<std::size_t>(std::max(1, threads)));
  parallel_for((count + batch - 1) / batch, threads, [&](i64 task, int worker) {
    const i64 first = task * batch, here = std::min(batch, count - first);
    const i64 groups = (here + lanes - 1) / lanes;
    Buffer<double>& w = work[worker];
    w.reserve(groups * (size + (few + 1) * lanes) + spare);
    double *const packed = w.data(), *const values = packed + groups * size;
    double* const top = values + groups * few * lanes + spare;
    std::vector<const T*> from(static_cast<std::size_t>(lanes));
    for (i64 g = 0; g < groups; g++) {
      for (i64 lane = 0; lane < lanes; lane++)
        from[lane] = x + (first + std::min(g * lanes + lane, here - 1)) * m * n;
      if constexpr (std::is_same<T, float>::value) {
        k.pack32(from.data(), m * n, packed + g * size, top + g * lanes);
      } else {
        k.pack64(from.data(), m * n, packed + g * size, top + g * lanes);
      }
    }
    k.squares(m, n, groups, packed, values + groups * few * lanes, values);
    for (i64 at = 0; at < here; at++) {
      const double* const squares = values + at / lanes * few * lanes + at % lanes;
      double* const to = out + (first + at) * few;
      for (i64 i = 0; i < few; i++) to[i] = top[at] * std::sqrt(std::max(squares[i * lanes], 0.0));
    }
  });
}

template void small_singular_values(const float*, i64, i64, i64, double*, const Kernels&, int);
template void small_singular_values(const double*, i64, i64, i64, double*, const Kernels&, int);

}  // namespace mergeprobe
