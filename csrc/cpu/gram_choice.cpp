// Which products of a module are streamed: a model of what each way costs.
#include "gram_streamed.hpp"

namespace mergeprobe::gram {
namespace {

// What the model counts, in multiply-adds at the pace of the R x R tiles (110 G/s on Zen 5), fitted
// to 25 problems of r = 32 to 128, d = 320 to 2048 and 8 to 200 blocks. The suite large_rank of
// bench/speed has the times.
constexpr double kReduce = 3;    // an entry of the R x R tiles, for each weighted sum over rows
constexpr double kForm = 1.3;    // a multiply-add of a dense entry: short sums, written out
constexpr double kFlatten = 14;  // a dense entry, packed anew
constexpr double kGram = 1.2;    // a multiply-add of the Gram, whose operands do not stay in L2
// The model is off by a quarter at most; where streaming is hardly cheaper, tiles stay.
constexpr double kMargin = 1.15;

double tiles_cost(const GramModule& g, const std::vector<Epilogue>& epilogues) {
  if (epilogues.empty()) return 0;
  const Plan plan(epilogues.data(), static_cast<int>(epilogues.size()));
  double one = 0, two = 0;
  for (i64 i = 0; i < g.n1; i++) one += static_cast<double>(g.blocks1[i].rank);
  for (i64 i = 0; g.blocks2 && i < g.n2; i++) two += static_cast<double>(g.blocks2[i].rank);
  double each = plan.reads_m ? static_cast<double>(g.p) : 0;
  for (int view : plan.views) each += static_cast<double>(columns_of(g, view));
  for (const Group& group : plan.groups)
    each += kReduce * static_cast<double>(group.channels.size());
  return each * (g.blocks2 ? one * two : one * (one + 1) / 2);
}

double streamed_cost(const GramModule& g, Product x, const std::vector<Epilogue>& epilogues,
                     i64 lanes) {
  const Work work(x, g, epilogues);
  double dense = 0;
  const i64 rows = round_up(left_of(x) ? g.q : g.p, lanes);
  const i64 columns = round_up(right_of(x) ? g.q : g.p, lanes);
  for (const DenseTile& t : cut(rows / lanes, columns / lanes, left_of(x) == right_of(x), lanes))
    dense += static_cast<double>(t.rows * lanes * t.columns * lanes);
  double each = 0;
  auto form = [&](const Block* blocks, i64 n, const Kinds& kinds) {
    double sum = 0;
    for (i64 i = 0; i < n; i++) sum += kForm * static_cast<double>(blocks[i].rank) + kFlatten;
    each += sum * static_cast<double>(kinds.count());
  };
  form(g.blocks1, g.n1, work.kinds[0]);
  if (g.blocks2) form(g.blocks2, g.n2, work.kinds[1]);
  const double n1 = static_cast<double>(round_up(g.n1, lanes));
  const double n2 = static_cast<double>(round_up(g.blocks2 ? g.n2 : g.n1, lanes));
  for (const Sum& sum : work.sums) {
    const bool half = !g.blocks2 && sum.row == sum.column;
    each += kGram * (half ? n1 * (n1 + static_cast<double>(lanes)) / 2 : n1 * n2);
  }
  return dense * each;
}

}  // namespace

Products streamed_products(const GramModule& g, const Plan& plan, const GramOptions& options) {
  Products present = 0;
  for (const Epilogue& x : plan.epilogues)
    if (x.view == 0) present |= 1u << static_cast<int>(x.product);
  if (options.streaming == Streaming::always) return present;
  const double without = tiles_cost(g, plan.epilogues);
  Products best = 0;
  double least = without / kMargin;
  // Already to flatten the smallest dense matrices is too much: most modules of small ranks.
  const double side = static_cast<double>(std::min(g.p, g.q));
  if (kFlatten * static_cast<double>(g.n1) * side * side / 2 >= least) return 0;
  for (Products set = 1; set < 8; set++) {
    if ((set & present) != set) continue;
    std::vector<Epilogue> rest;
    for (const Epilogue& x : plan.epilogues)
      if (!streams(set, x)) rest.push_back(x);
    double cost = tiles_cost(g, rest);
    for (Product x : {Product::uv, Product::uu, Product::vv})
      if (has(set, x)) cost += streamed_cost(g, x, plan.epilogues, options.kernels->f32.lanes);
    if (cost < least) least = cost, best = set;
  }
  return best;
}

}  // namespace mergeprobe::gram
