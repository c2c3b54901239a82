// Entry statistics as Python calls them: one module at a time, results written where wanted.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "bind/records.hpp"
#include "mergeprobe/entries.hpp"

namespace py = pybind11;
using namespace mergeprobe;
using namespace mergeprobe::bind;

namespace {

using I32Array = py::array_t<std::int32_t, py::array::c_style>;
using F32Array = py::array_t<float, py::array::c_style>;

const std::int32_t* permutation(const I32Array& a, i64 n, const char* name) {
  expect(a.ndim() == 1 && a.size() == n, name, "expected one index per row or column");
  for (i64 i = 0; i < n; i++) expect(a.data()[i] >= 0 && a.data()[i] < n, name, "out of range");
  return a.data();
}

EntryModule module_of(const py::array& segments, i64 d_out, i64 d_in) {
  EntryModule m{};
  m.deltas = records<Segment>(segments, "segments");
  m.n = segments.size();
  expect(m.n > 0, "segments", "expected at least one");
  expect(d_out > 0 && d_in > 0 && d_out < (i64{1} << 31) && d_in < (i64{1} << 31), "segments",
         "not a matrix");
  m.d_out = d_out;
  m.d_in = d_in;
  return m;
}

// `tiles` 0: every entry, and no permutations.
EntryModule sampled(const py::array& segments, i64 d_out, i64 d_in, const I32Array& rows,
                    const I32Array& columns, i64 tiles) {
  EntryModule m = module_of(segments, d_out, d_in);
  expect(tiles >= 0, "tiles", "must not be negative");
  if (tiles > 0)
    m.sample = {permutation(rows, d_out, "rows"), permutation(columns, d_in, "columns"), tiles};
  return m;
}

py::tuple result(const TileStatus& s) {
  return py::make_tuple(static_cast<int>(s.status), s.which);
}

py::tuple py_sizes(const py::array& segments, i64 d_out, i64 d_in, F64Array& out, int threads,
                   const std::string& isa) {
  const EntryModule m = module_of(segments, d_out, d_in);
  expect(out.ndim() == 1 && out.size() == m.n, "out", "one per segment");
  const TileOptions options{&kernels_called(isa), threads};
  double* to = out.mutable_data();
  py::gil_scoped_release release;
  const TileStatus status = entry_sizes(m, to, options);
  py::gil_scoped_acquire acquire;
  return result(status);
}

py::tuple py_moments(const py::array& segments, i64 d_out, i64 d_in, const I32Array& rows,
                     const I32Array& columns, i64 tiles, double density, F64Array& out,
                     int threads, const std::string& isa) {
  const EntryModule m = sampled(segments, d_out, d_in, rows, columns, tiles);
  expect(out.ndim() == 2 && out.shape(0) == 8 && out.shape(1) == m.n, "out", "wrong shape");
  expect(density >= 0 && density <= 1, "density", "expected 0 to 1");
  std::vector<EntryMoments> found(static_cast<std::size_t>(m.n));
  const TileOptions options{&kernels_called(isa), threads};
  TileStatus status;
  {
    py::gil_scoped_release release;
    status = entry_moments(m, density, found.data(), options);
  }
  for (i64 i = 0; i < m.n; i++) {
    const EntryMoments& x = found[i];
    const double values[8] = {x.l1, x.squares, x.fourths, x.top_squares, x.threshold,
                              static_cast<double>(x.entries), static_cast<double>(x.zeros),
                              static_cast<double>(x.top)};
    for (i64 f = 0; f < 8; f++) out.mutable_data()[f * m.n + i] = values[f];
  }
  return result(status);
}

py::tuple py_pairs(const py::array& segments, i64 d_out, i64 d_in, const I32Array& rows,
                   const I32Array& columns, i64 tiles, i64 split, const py::object& thresholds,
                   const I32Array& units, I64Array& counts, const py::object& sums, bool vpopcnt,
                   int threads, const std::string& isa) {
  const EntryModule m = sampled(segments, d_out, d_in, rows, columns, tiles);
  expect(split >= 0 && split <= m.n, "split", "out of range");
  auto fits = [&](const py::array& a, i64 width) {
    return a.ndim() == 3 && a.shape(0) == m.n && a.shape(1) == m.n && a.shape(2) == width;
  };
  expect(units.ndim() == 1 && units.size() == m.n, "units", "one per segment");
  EntryPairs p{split, nullptr, units.data(), !sums.is_none(), vpopcnt, counts.mutable_data(),
               nullptr};
  expect(fits(counts, kEntryCounts), "counts", "wrong shape");
  if (!thresholds.is_none()) {
    expect(py::isinstance<F32Array>(thresholds), "thresholds", "expected float32");
    const auto t = py::reinterpret_borrow<F32Array>(thresholds);
    expect(t.ndim() == 1 && t.size() == m.n, "thresholds", "one per segment");
    p.thresholds = t.data();
  }
  if (p.magnitudes) {
    expect(py::isinstance<F64Array>(sums), "sums", "expected float64");
    auto s = py::reinterpret_borrow<F64Array>(sums);
    expect(fits(s, kEntrySums), "sums", "wrong shape");
    p.sums = s.mutable_data();
  }
  const TileOptions options{&kernels_called(isa), threads};
  py::gil_scoped_release release;
  const TileStatus status = entry_pairs(m, p, options);
  py::gil_scoped_acquire acquire;
  return result(status);
}

}  // namespace

void bind_entries(py::module_& m) {
  m.def("entry_sizes", &py_sizes, py::arg("segments"), py::arg("d_out"), py::arg("d_in"),
        py::arg("out").noconvert(), py::arg("threads"), py::arg("isa"),
        "P2: squared sizes of the rank-one units of each delta, added up.");
  m.def("entry_moments", &py_moments, py::arg("segments"), py::arg("d_out"), py::arg("d_in"),
        py::arg("rows").noconvert(), py::arg("columns").noconvert(), py::arg("tiles"),
        py::arg("density"), py::arg("out").noconvert(), py::arg("threads"), py::arg("isa"),
        "P2: moments, zeros and the largest entries of each delta.");
  m.def("entry_pairs", &py_pairs, py::arg("segments"), py::arg("d_out"), py::arg("d_in"),
        py::arg("rows").noconvert(), py::arg("columns").noconvert(), py::arg("tiles"),
        py::arg("split"), py::arg("thresholds"), py::arg("units").noconvert(),
        py::arg("counts").noconvert(), py::arg("sums"),
        py::arg("vpopcnt"), py::arg("threads"), py::arg("isa"),
        "P2: counts and sums over the entries of each pair of deltas.");
}
