// P2 as Python calls it: record arrays in, checked against what the C++ structs say.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "bind/records.hpp"
#include "mergeprobe/tiles.hpp"

namespace py = pybind11;
using namespace mergeprobe;
using namespace mergeprobe::bind;

namespace {

struct Module {
  TileModule m{};

  Module(const py::array& segments, const py::array& adapters, const py::array& rule, i64 d_out,
         i64 d_in) {
    m.deltas = records<Segment>(segments, "segments");
    m.adapters = records<TileAdapter>(adapters, "adapters");
    m.rule = records<TileRule>(rule, "rule");
    m.n = segments.size();
    expect(m.n > 0, "segments", "expected at least one");
    expect(adapters.size() == m.n, "adapters", "one per segment");
    expect(rule.size() == 1, "rule", "expected one");
    expect(d_out > 0 && d_in > 0 && d_in < (i64{1} << 32), "segments", "not a matrix");
    m.d_out = d_out;
    m.d_in = d_in;
  }
};

py::tuple result(const TileStatus& s) {
  return py::make_tuple(static_cast<int>(s.status), s.which);
}

// A float32 matrix of that shape with contiguous rows, or nullptr for None.
float* matrix(const py::object& o, i64 rows, i64 columns, const char* name, i64* stride = nullptr) {
  if (o.is_none()) return nullptr;
  const auto a = o.cast<py::array>();
  expect(py::isinstance<py::array_t<float>>(a) && a.ndim() == 2, name, "expected float32, 2 axes");
  expect(a.shape(0) == rows && a.shape(1) == columns, name, "wrong shape");
  const i64 step = a.shape(0) > 1 ? a.strides(0) / 4 : columns;
  expect(a.size() == 0 || (a.shape(1) <= 1 || a.strides(1) == 4), name, "rows must be contiguous");
  expect(stride ? step >= columns : step == columns, name, "wrong strides");
  if (stride) *stride = step;
  return static_cast<float*>(const_cast<void*>(a.data()));
}

py::tuple tiles_merge(const py::array& segments, const py::array& adapters, const py::array& rule,
                      i64 d_out, i64 d_in, const py::object& fisher, const py::object& minus,
                      i64 first, i64 last, const py::object& out, const py::object& x,
                      const py::object& y, const py::object& z, F64Array& squares, int threads,
                      const std::string& isa) {
  Module module(segments, adapters, rule, d_out, d_in);
  py::array others, low_rank;
  if (!fisher.is_none()) {
    others = fisher.cast<py::array>();
    module.m.fisher = records<Segment>(others, "fisher");
    expect(others.size() == module.m.n, "fisher", "one per segment");
  }
  expect(!fisher.is_none() == (module.m.rule->combine == Combine::fisher), "fisher",
         "goes with that rule");
  expect(first >= 0 && first <= last && last <= d_out, "rows", "out of range");
  expect(squares.size() == 1, "squares", "expected one");
  TileTarget target{};
  target.first = first;
  target.last = last;
  if (!minus.is_none()) {
    low_rank = minus.cast<py::array>();
    target.minus = records<Segment>(low_rank, "minus");
    expect(low_rank.size() == 1, "minus", "expected one");
  }
  target.dense = matrix(out, last - first, d_in, "out", &target.dense_stride);
  if (!x.is_none()) {
    target.width = x.cast<py::array>().ndim() == 2 ? x.cast<py::array>().shape(1) : -1;
    expect(target.width >= 0 && target.width % 16 == 0, "x", "expected a multiple of 16 columns");
    target.x = matrix(x, d_in, target.width, "x");
    target.y = matrix(y, last - first, target.width, "y");
    target.z = matrix(z, d_in, target.width, "z");
  }
  const TileOptions options{&kernels_called(isa), threads};
  TileStatus status;
  {
    py::gil_scoped_release release;
    status = merge_tiles(module.m, target, options);
  }
  squares.mutable_data()[0] = target.squares;
  return result(status);
}

py::tuple tiles_norms(const py::array& segments, const py::array& adapters, const py::array& rule,
                      i64 d_out, i64 d_in, F64Array& out, int threads, const std::string& isa) {
  const Module module(segments, adapters, rule, d_out, d_in);
  const i64 n = module.m.n;
  expect(out.ndim() == 2 && out.shape(0) == 7 && out.shape(1) == n, "out", "wrong shape");
  std::vector<TileNorms> norms(static_cast<std::size_t>(n));
  const TileOptions options{&kernels_called(isa), threads};
  TileStatus status;
  {
    py::gil_scoped_release release;
    status = tile_norms(module.m, norms.data(), options);
  }
  for (i64 i = 0; i < n; i++) {
    const TileNorms& x = norms[i];
    const double values[7] = {x.l1, x.l1_kept, x.squares, x.squares_kept, x.largest, x.largest_kept,
                              static_cast<double>(x.kept)};
    for (i64 f = 0; f < 7; f++) out.mutable_data()[f * n + i] = values[f];
  }
  return result(status);
}

py::tuple tiles_order(const py::array& segments, const I64Array& shapes, const I64Array& bounds,
                      const I64Array& counts, const I64Array& count_bounds, py::array_t<float>& out,
                      int threads, const std::string& isa) {
  const Segment* s = records<Segment>(segments, "segments");
  expect(shapes.ndim() == 2 && shapes.shape(0) == segments.size() && shapes.shape(1) == 2, "shapes",
         "one pair per segment");
  expect_bounds(bounds, segments.size(), "bounds");
  expect(count_bounds.size() == bounds.size(), "count_bounds", "as many as bounds");
  expect_bounds(count_bounds, counts.size(), "count_bounds");
  expect(out.size() == counts.size(), "out", "one per count");
  std::vector<OrderBlock> blocks;
  for (i64 i = 0; i < segments.size(); i++) {
    const i64* shape = shapes.data() + 2 * i;
    expect(shape[0] > 0 && shape[1] > 0, "shapes", "empty matrices");
    blocks.push_back({s[i], shape[0], shape[1]});
  }
  const TileOptions options{&kernels_called(isa), threads};
  float* target = out.mutable_data();
  py::gil_scoped_release release;
  TileStatus status{Status::ok, -1};
  for (py::ssize_t g = 0; g + 1 < bounds.size() && status.status == Status::ok; g++) {
    const i64 first = bounds.data()[g], c = count_bounds.data()[g];
    status = order_statistics(blocks.data() + first, bounds.data()[g + 1] - first,
                              counts.data() + c, count_bounds.data()[g + 1] - c, target + c,
                              options);
    if (status.which >= 0) status.which += first;
  }
  py::gil_scoped_acquire acquire;
  return result(status);
}

}  // namespace

void bind_tiles(py::module_& m) {
  m.def("tiles_merge", &tiles_merge, py::arg("segments"), py::arg("adapters"), py::arg("rule"),
        py::arg("d_out"), py::arg("d_in"), py::arg("fisher"), py::arg("minus"), py::arg("first"),
        py::arg("last"), py::arg("out"), py::arg("x"), py::arg("y"), py::arg("z"),
        py::arg("squares").noconvert(), py::arg("threads"), py::arg("isa"),
        "P2: an elementwise merge, dense, through a sketch, or only its norm.");
  m.def("tiles_norms", &tiles_norms, py::arg("segments"), py::arg("adapters"), py::arg("rule"),
        py::arg("d_out"), py::arg("d_in"), py::arg("out").noconvert(), py::arg("threads"),
        py::arg("isa"), "P2: norms of each delta before and after pruning.");
  m.def("tiles_order", &tiles_order, py::arg("segments"), py::arg("shapes").noconvert(),
        py::arg("bounds").noconvert(), py::arg("counts").noconvert(),
        py::arg("count_bounds").noconvert(), py::arg("out").noconvert(), py::arg("threads"),
        py::arg("isa"), "P2: the k-th largest entries of groups of deltas, by magnitude.");
}
