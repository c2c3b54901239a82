// What a pass of P1 is to do: rows stacked and cut into tiles, epilogues by the view they read.
#pragma once
#include <algorithm>
#include <vector>

#include "mergeprobe/gram.hpp"

namespace mergeprobe::gram {

inline i64 round_up(i64 n, i64 to) { return (n + to - 1) / to * to; }

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
  std::vector<RowRef> u;
  std::vector<std::vector<RowRef>> v;  // per view, see Epilogue::view; empty if none needs it
  std::vector<Tile> tiles;

  Stack(const GramModule& g, bool second, const std::vector<int>& views, i64 limit)
      : blocks(second ? g.blocks2 : g.blocks1),
        n(second ? g.n2 : g.n1),
        weights(second ? g.weights2 : g.weights1),
        row_of(static_cast<std::size_t>(n) + 1, 0) {
    const Block* b = blocks;
    for (i64 i = 0; i < n; i++) row_of[i + 1] = row_of[i] + b[i].rank;
    auto add = [&](std::vector<RowRef>& to, const Matrix& m, i64 rank) {
      for (i64 a = 0; a < rank; a++) to.push_back({at(m, a, 0), m.col_stride, m.dtype});
    };
    u.reserve(rows());
    for (i64 i = 0; i < n; i++) add(u, b[i].u, b[i].rank);
    for (int view : views) {
      if (static_cast<std::size_t>(view) >= v.size()) v.resize(view + 1);
      v[view].reserve(rows());
      const Matrix* other =
          view == 0 ? nullptr : second ? g.views[view - 1].v2 : g.views[view - 1].v1;
      for (i64 i = 0; i < n; i++) add(v[view], other ? other[i] : b[i].v, b[i].rank);
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

// The epilogues that read one view's N.
struct Group {
  int view;
  bool reads_n = false;
  std::vector<int> epilogues;          // indices
  std::vector<Channel> channels;
  std::vector<int> forward, mirrored;  // per epilogue: its channel for (i,j) and for (j,i)

  explicit Group(int v) : view(v) {}
};

struct Plan {
  std::vector<Epilogue> epilogues;
  std::vector<Group> groups;
  std::vector<int> views;  // whose N is read
  bool reads_m = false;

  Plan(const Epilogue* e, int n) : epilogues(e, e + n) {
    for (int k = 0; k < n; k++) {
      const Epilogue& x = epilogues[k];
      auto it = std::find_if(groups.begin(), groups.end(),
                             [&](const Group& g) { return g.view == x.view; });
      if (it == groups.end()) it = groups.insert(groups.end(), Group(x.view));
      Group& g = *it;
      auto channel = [&](int weight) {
        const Channel c{x.product, weight};
        auto at = std::find(g.channels.begin(), g.channels.end(), c);
        if (at == g.channels.end()) at = g.channels.insert(g.channels.end(), c);
        return static_cast<int>(at - g.channels.begin());
      };
      g.epilogues.push_back(k);
      g.forward.push_back(channel(x.row_weight));
      g.mirrored.push_back(channel(x.column_weight));
      g.reads_n = g.reads_n || x.product != Product::uu;
      reads_m = reads_m || x.product != Product::vv;
    }
    for (const Group& g : groups)
      if (g.reads_n) views.push_back(g.view);
  }
};

inline i64 columns_of(const GramModule& g, int view) {
  return view == 0 ? g.q : g.views[view - 1].q;
}

}  // namespace mergeprobe::gram
