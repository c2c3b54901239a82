// Decision trees as Python calls them: arrays in, checked.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "bind/records.hpp"
#include "mergeprobe/forest.hpp"

namespace py = pybind11;
using namespace mergeprobe;
using namespace mergeprobe::bind;

namespace {

using F32Array = py::array_t<float, py::array::c_style>;

void py_forest_sums(const py::array& nodes, const I64Array& roots, const I64Array& depths,
                    const F32Array& x, F64Array& out) {
  const ForestNode* const n = records<ForestNode>(nodes, "nodes");
  const i64 count = nodes.size();
  expect(x.ndim() == 2, "x", "expected 2 dimensions");
  const i64 rows = x.shape(0), columns = x.shape(1);
  expect(out.ndim() == 1 && out.shape(0) == rows, "out", "expected one value per row");
  expect(depths.size() == roots.size(), "depths", "expected one per tree");
  for (i64 i = 0; i < count; i++) {
    expect(n[i].column >= 0 && (n[i].column < columns || rows == 0), "nodes", "no such column");
    for (const i64 child : n[i].child)
      expect(child >= 0 && child < count, "nodes", "no such child");
  }
  for (py::ssize_t t = 0; t < roots.size(); t++)
    expect(roots.data()[t] >= 0 && roots.data()[t] < count, "roots", "no such node");
  const i64 *const r = roots.data(), *const d = depths.data();
  const i64 trees = roots.size();
  const float* const values = x.data();
  double* const into = out.mutable_data();
  py::gil_scoped_release release;
  forest_sums(n, r, d, trees, values, rows, columns, into);
}

}  // namespace

void bind_forest(py::module_& m) {
  m.def("forest_sums", &py_forest_sums, py::arg("nodes").noconvert(), py::arg("roots").noconvert(),
        py::arg("depths").noconvert(), py::arg("x").noconvert(), py::arg("out").noconvert(),
        "The sums of the leaves that rows come to, over trees in their order.");
}
