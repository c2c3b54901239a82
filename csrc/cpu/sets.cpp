#include "mergeprobe/sets.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "mergeprobe/parallel.hpp"

namespace mergeprobe {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
// Squared distance to the span of the others, relative, that float64 Grams tell from zero.
constexpr double kResolved = 1e-12;

// Sets of one size, as many as there are lanes.
struct Group {
  i64 size;
  std::vector<i64> sets;
};

i64 size_of(const Sets& sets, i64 s) {
  i64 k = 0;
  while (k < sets.widest && sets.members[s * sets.widest + k] >= 0) k++;
  return k;
}

std::vector<Group> grouped(const Sets& sets, i64 lanes) {
  std::vector<std::vector<i64>> by_size(static_cast<std::size_t>(sets.widest + 1));
  for (i64 s = 0; s < sets.count; s++)
    by_size[static_cast<std::size_t>(size_of(sets, s))].push_back(s);
  std::vector<Group> groups;
  for (i64 k = 1; k <= sets.widest; k++) {
    const std::vector<i64>& all = by_size[static_cast<std::size_t>(k)];
    for (std::size_t i = 0; i < all.size(); i += static_cast<std::size_t>(lanes))
      groups.push_back(
          {k, {all.begin() + static_cast<std::ptrdiff_t>(i),
               all.begin() + static_cast<std::ptrdiff_t>(
                                 std::min(i + static_cast<std::size_t>(lanes), all.size()))}});
  }
  return groups;
}

// exp(entropy) of the diagonal of `a` in one lane, as shares of its sum.
double effective_rank(const double* a, i64 k, i64 lanes, i64 lane) {
  double total = 0, entropy = 0;
  for (i64 i = 0; i < k; i++) total += std::fmax(a[(i * k + i) * lanes + lane], 0.0);
  for (i64 i = 0; i < k; i++) {
    const double share = std::fmax(a[(i * k + i) * lanes + lane], 0.0) / total;
    if (share > 0) entropy -= share * std::log(share);
  }
  return std::exp(entropy);
}

struct Workspace {
  Buffer<double> grams, weights, lambda, scratch, solution, error, direction, gap;
  std::vector<char> whole;  // of each lane: every member is something on its own inputs
};

class Geometry {
 public:
  Geometry(const Sets& sets, const double* gram, i64 n, const SetGeometry& out,
           const SetKernels& kernels)
      : sets_(sets), gram_(gram), n_(n), out_(out), k_(kernels) {}

  void run(const Group& group, Workspace& w) const {
    const i64 k = group.size, lanes = k_.lanes;
    w.grams.reserve(k * k * lanes);
    w.scratch.reserve(k * k * lanes);
    w.error.reserve(k * lanes);
    double *grams = w.grams.data(), *cosines = w.scratch.data();
    for (i64 lane = 0; lane < lanes; lane++) gather(set(group, lane), k, lane, grams, cosines);
    for (i64 lane = 0; lane < static_cast<i64>(group.sets.size()); lane++)
      norms(set(group, lane), k);
    k_.eigenvalues(k, grams);
    ranks(group, grams, out_.gram_rank);
    std::copy_n(cosines, k * k * lanes, grams);
    k_.eigenvalues(k, grams);
    ranks(group, grams, out_.cosine_rank);
    for (i64 i = 0; i < k * k * lanes; i++) cosines[i] *= static_cast<double>(k);
    k_.inverse_diagonal(k, cosines, kResolved, w.error.data());
    for (i64 lane = 0; lane < static_cast<i64>(group.sets.size()); lane++) {
      const i64 s = set(group, lane);
      bool zero = false;
      for (i64 i = 0; i < k; i++) {
        const bool defined = own(s, i) > 0;
        zero |= !defined;
        const double inverse = w.error.data()[i * lanes + lane];
        out_.leverage[s * sets_.widest + i] = defined ? std::fmax(0.0, 1 - 1 / inverse) : kNaN;
      }
      if (zero) out_.cosine_rank[s] = kNaN;
    }
  }

 private:
  // The last lanes repeat the last set.
  static i64 set(const Group& g, i64 lane) {
    return g.sets[static_cast<std::size_t>(
        std::min(lane, static_cast<i64>(g.sets.size()) - 1))];
  }
  i64 member(i64 s, i64 i) const { return sets_.members[s * sets_.widest + i]; }
  double at(i64 s, i64 i, i64 j) const { return gram_[member(s, i) * n_ + member(s, j)]; }
  double own(i64 s, i64 i) const { return at(s, i, i); }

  // Both matrices with trace 1. A zero adapter is orthogonal to all others.
  void gather(i64 s, i64 k, i64 lane, double* grams, double* cosines) const {
    double total = 0;
    for (i64 i = 0; i < k; i++) total += own(s, i);
    for (i64 i = 0; i < k; i++)
      for (i64 j = 0; j < k; j++) {
        const i64 to = (i * k + j) * k_.lanes + lane;
        const double length = std::sqrt(own(s, i)) * std::sqrt(own(s, j));
        const double cosine = i == j ? 1.0 : length > 0 ? at(s, i, j) / length : 0.0;
        grams[to] = total > 0 ? at(s, i, j) / total : i == j ? 1.0 : 0.0;
        cosines[to] = cosine / static_cast<double>(k);
      }
  }

  void norms(i64 s, i64 k) const {
    double merged = 0, apart = 0;
    for (i64 i = 0; i < k; i++) {
      const double w = sets_.weights[s * sets_.widest + i];
      double row = 0;
      for (i64 j = 0; j < k; j++) row += at(s, i, j) * sets_.weights[s * sets_.widest + j];
      merged += w * row;
      apart += w * w * own(s, i);
    }
    out_.merged_norm[s] = std::sqrt(std::fmax(merged, 0.0));
    out_.superposition[s] = apart > 0 ? std::fmax(merged, 0.0) / apart : kNaN;
  }

  void ranks(const Group& group, const double* eigen, double* out) const {
    for (i64 lane = 0; lane < static_cast<i64>(group.sets.size()); lane++) {
      const i64 s = set(group, lane);
      double total = 0;
      for (i64 i = 0; i < group.size; i++) total += own(s, i);
      out[s] = total > 0 ? effective_rank(eigen, group.size, k_.lanes, lane) : kNaN;
    }
  }

  const Sets& sets_;
  const double* gram_;
  const i64 n_;
  const SetGeometry& out_;
  const SetKernels& k_;
};

class Retention {
 public:
  Retention(const Sets& sets, const double* grams, i64 n, const i64* domain_of,
            const double* lambda, const SetRetention& out, const RetentionOptions& options,
            const SetKernels& kernels)
      : sets_(sets), grams_(grams), n_(n), domain_(domain_of), lambda_(lambda), out_(out),
        options_(options), k_(kernels) {}

  void run(const Group& group, Workspace& w) const {
    const i64 k = group.size, lanes = k_.lanes, used = static_cast<i64>(group.sets.size());
    w.grams.reserve(k * k * k * lanes);
    for (Buffer<double>* b : {&w.weights, &w.lambda, &w.solution, &w.error, &w.direction})
      b->reserve(k * lanes);
    w.gap.reserve(lanes);
    w.scratch.reserve(k_.scratch(k));
    w.whole.clear();
    for (i64 lane = 0; lane < lanes; lane++)
      w.whole.push_back(gather(group.sets[static_cast<std::size_t>(std::min(lane, used - 1))], k,
                               lane, w));
    double *g = w.grams.data(), *x = w.solution.data(), *e = w.error.data(),
           *d = w.direction.data();
    if (out_.error) {
      k_.errors(k, g, w.weights.data(), e, d);
      scatter(group, w, e, out_.error, true);
      scatter(group, w, d, out_.direction, true);
    }
    if (out_.mean_weights || out_.worst_weights) replace_undefined(k, w);
    if (out_.mean_weights) {
      k_.least_mean(k, g, w.lambda.data(), options_.ridge, w.scratch.data(), x);
      k_.errors(k, g, x, e, d);
      scatter(group, w, x, out_.mean_weights, false);
      scatter(group, w, e, out_.mean_error, false);
    }
    if (out_.worst_weights) {
      k_.least_worst(k, g, options_.ridge, options_.tolerance, w.scratch.data(), x, w.gap.data());
      k_.errors(k, g, x, e, d);
      scatter(group, w, x, out_.worst_weights, false);
      scatter(group, w, e, out_.worst_error, false);
      for (i64 lane = 0; lane < used; lane++) {
        const i64 s = group.sets[static_cast<std::size_t>(lane)];
        out_.gap[s] = w.whole[static_cast<std::size_t>(lane)] ? w.gap.data()[lane] : kNaN;
      }
    }
  }

 private:
  i64 member(i64 s, i64 i) const { return sets_.members[s * sets_.widest + i]; }
  const double* gram_of(i64 adapter) const { return grams_ + domain_[adapter] * n_ * n_; }
  double own(i64 adapter) const { return gram_of(adapter)[adapter * n_ + adapter]; }
  bool gather(i64 s, i64 k, i64 lane, Workspace& w) const {
    bool defined = true;
    for (i64 i = 0; i < k; i++) {
      const i64 m = member(s, i);
      const double* gram = gram_of(m);
      const double energy = own(m), scale = energy > 0 ? 1 / energy : 0;
      defined &= energy > 0;
      w.weights.data()[i * k_.lanes + lane] = sets_.weights[s * sets_.widest + i];
      w.lambda.data()[i * k_.lanes + lane] = lambda_[m];
      double* to = w.grams.data() + i * k * k * k_.lanes + lane;
      for (i64 a = 0; a < k; a++) {
        const double* row = gram + member(s, a) * n_;
        for (i64 b = 0; b < k; b++, to += k_.lanes) {
          *to = row[member(s, b)] * scale;
          defined &= *to == *to;
        }
      }
    }
    return defined;
  }

  // Sets with a member that is nothing on its own inputs have no optimum; their lanes go along.
  void replace_undefined(i64 k, Workspace& w) const {
    for (i64 lane = 0; lane < k_.lanes; lane++) {
      if (w.whole[static_cast<std::size_t>(lane)]) continue;
      for (i64 i = 0; i < k * k * k; i++)
        w.grams.data()[i * k_.lanes + lane] = i / k % k == i % k ? 1.0 : 0.0;
    }
  }

  void scatter(const Group& group, const Workspace& w, const double* from, double* to,
               bool by_member) const {
    const i64 k = group.size;
    for (i64 lane = 0; lane < static_cast<i64>(group.sets.size()); lane++) {
      const i64 s = group.sets[static_cast<std::size_t>(lane)];
      const bool whole = w.whole[static_cast<std::size_t>(lane)];
      for (i64 i = 0; i < k; i++)
        to[s * sets_.widest + i] =
            whole || (by_member && own(member(s, i)) > 0) ? from[i * k_.lanes + lane] : kNaN;
    }
  }

  const Sets& sets_;
  const double* grams_;
  const i64 n_;
  const i64* domain_;
  const double* lambda_;
  const SetRetention& out_;
  const RetentionOptions& options_;
  const SetKernels& k_;
};

template <class Work>
void each_group(const Sets& sets, const SetKernels& kernels, int threads, const Work& work) {
  const std::vector<Group> groups = grouped(sets, kernels.lanes);
  std::vector<Workspace> space(static_cast<std::size_t>(std::max(1, threads)));
  parallel_for(static_cast<i64>(groups.size()), threads, [&](i64 i, int worker) {
    work.run(groups[static_cast<std::size_t>(i)], space[static_cast<std::size_t>(worker)]);
  });
}

}  // namespace

void set_geometry(const Sets& sets, const double* gram, i64 n, const SetGeometry& out,
                  const Kernels& kernels, int threads) {
  each_group(sets, *kernels.sets, threads, Geometry(sets, gram, n, out, *kernels.sets));
}

void set_retention(const Sets& sets, const double* grams, i64 n, const i64* domain_of,
                   const double* lambda, const SetRetention& out, const RetentionOptions& options,
                   const Kernels& kernels, int threads) {
  each_group(sets, *kernels.sets, threads,
             Retention(sets, grams, n, domain_of, lambda, out, options, *kernels.sets));
}

}  // namespace mergeprobe
