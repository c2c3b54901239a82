// Angles of pairs as Python calls them: arrays in, checked, results written where they are wanted.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "bind/records.hpp"
#include "mergeprobe/angles.hpp"

namespace py = pybind11;
using namespace mergeprobe;
using namespace mergeprobe::bind;

namespace {

struct Side {
  const Block* blocks;
  const i64* bounds;
  const double* sigma;

  Side(const py::array& table, const I64Array& module_bounds, const F64Array& spectra, i64 modules,
       const char* name)
      : blocks(records<Block>(table, name)), bounds(module_bounds.data()), sigma(spectra.data()) {
    expect(module_bounds.size() == modules + 1, name, "bounds do not fit the modules");
    expect_bounds(module_bounds, table.size(), name);
    expect(spectra.ndim() == 2 && spectra.shape(0) == table.size(), name, "one spectrum per entry");
    for (py::ssize_t i = 0; i < table.size(); i++)
      expect(blocks[i].rank >= 0 && blocks[i].rank <= spectra.shape(1), name, "rank beyond sigma");
  }
};

void py_pair_angles(const py::array& table1, const I64Array& bounds1, const F64Array& sigma1,
                    const py::object& table2, const py::object& bounds2, const py::object& sigma2,
                    const I64Array& p, const I64Array& q, F64Array& out,
                    const I64Array& out_bounds, i64 top, int threads, const std::string& isa) {
  const i64 modules = p.size();
  expect(q.size() == modules, "q", "one value per module");
  expect(top > 0, "top", "must be positive");
  const Side one(table1, bounds1, sigma1, modules, "table1");
  const bool symmetric = table2.is_none();
  const py::array t2 = symmetric ? table1 : table2.cast<py::array>();
  const I64Array b2 = symmetric ? bounds1 : bounds2.cast<I64Array>();
  const F64Array s2 = symmetric ? sigma1 : sigma2.cast<F64Array>();
  const Side two(t2, b2, s2, modules, "table2");
  expect(s2.shape(1) == sigma1.shape(1), "sigma2", "expected as many columns as sigma1");
  expect(out.ndim() == 2 && out.shape(0) == kAngleStatistics, "out", "one row per statistic");
  expect(out_bounds.size() == modules + 1, "out_bounds", "one bound per module and one more");
  expect_bounds(out_bounds, out.shape(1), "out_bounds");
  static const Block none{};
  std::vector<AngleModule> jobs;
  for (i64 l = 0; l < modules; l++) {
    const i64 n1 = one.bounds[l + 1] - one.bounds[l], n2 = two.bounds[l + 1] - two.bounds[l];
    expect(out_bounds.data()[l + 1] - out_bounds.data()[l] ==
               (symmetric ? n1 * (n1 - 1) / 2 : n1 * n2),
           "out_bounds", "a module needs a place for every pair");
    const i64 width = sigma1.shape(1);
    jobs.push_back({one.blocks + one.bounds[l], one.sigma + one.bounds[l] * width, n1,
                    symmetric ? nullptr : n2 ? two.blocks + two.bounds[l] : &none,
                    two.sigma + two.bounds[l] * width, symmetric ? n1 : n2, width, p.data()[l],
                    q.data()[l], out.mutable_data() + out_bounds.data()[l], out.shape(1)});
  }
  const Kernels& kernels = kernels_called(isa);
  py::gil_scoped_release release;
  pair_angles(jobs.data(), modules, top, kernels, threads);
}

template <class T>
void py_small_singular_values(const py::array_t<T, py::array::c_style>& x, F64Array& out,
                              int threads, const std::string& isa) {
  expect(x.ndim() == 3, "x", "expected 3 dimensions");
  const i64 count = x.shape(0), m = x.shape(1), n = x.shape(2), few = std::min(m, n);
  expect(few > 0 && few <= kWidestAngles, "x", "the narrow side is too wide");
  expect(out.ndim() == 2 && out.shape(0) == count && out.shape(1) == few, "out", "wrong shape");
  const Kernels& kernels = kernels_called(isa);
  const T* const from = x.data();
  double* const to = out.mutable_data();
  py::gil_scoped_release release;
  small_singular_values(from, count, m, n, to, kernels, threads);
}

}  // namespace

void bind_angles(py::module_& m) {
  m.attr("ANGLE_STATISTICS") = int{kAngleStatistics};
  m.attr("WIDEST_ANGLES") = kWidestAngles;
  m.def("pair_angles", &py_pair_angles, py::arg("table1"), py::arg("bounds1").noconvert(),
        py::arg("sigma1").noconvert(), py::arg("table2"), py::arg("bounds2"), py::arg("sigma2"),
        py::arg("p").noconvert(), py::arg("q").noconvert(), py::arg("out").noconvert(),
        py::arg("out_bounds").noconvert(), py::arg("top"), py::arg("threads"), py::arg("isa"),
        "Principal angles and merged spectra of all pairs of canonical forms, module by module.");
  m.def("small_singular_values", &py_small_singular_values<float>, py::arg("x").noconvert(),
        py::arg("out").noconvert(), py::arg("threads"), py::arg("isa"),
        "Singular values of many small matrices.");
  m.def("small_singular_values", &py_small_singular_values<double>, py::arg("x").noconvert(),
        py::arg("out").noconvert(), py::arg("threads"), py::arg("isa"),
        "Singular values of many small matrices.");
}
