// Set statistics as Python calls them: arrays in, checked, results written where they are wanted.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "bind/records.hpp"
#include "mergeprobe/sets.hpp"

namespace py = pybind11;
using namespace mergeprobe;
using namespace mergeprobe::bind;

namespace {

using I32Array = py::array_t<std::int32_t, py::array::c_style>;

Sets sets_of(const I32Array& members, const F64Array& weights, i64 n) {
  expect(members.ndim() == 2, "members", "expected 2 dimensions");
  expect(weights.ndim() == 2 && weights.shape(0) == members.shape(0) &&
             weights.shape(1) == members.shape(1),
         "weights", "expected the shape of members");
  for (py::ssize_t i = 0; i < members.size(); i++)
    expect(members.data()[i] >= -1 && members.data()[i] < n, "members", "no such adapter");
  return {members.shape(0), members.shape(1), members.data(), weights.data()};
}

double* per_set(F64Array& a, const Sets& s, const char* name) {
  expect(a.ndim() == 1 && a.shape(0) == s.count, name, "expected one value per set");
  return a.mutable_data();
}

double* per_member(F64Array& a, const Sets& s, const char* name) {
  expect(a.ndim() == 2 && a.shape(0) == s.count && a.shape(1) == s.widest, name,
         "expected one value per member");
  return a.mutable_data();
}

double* wanted(const py::object& o, const Sets& s, const char* name) {
  if (o.is_none()) return nullptr;
  expect(py::isinstance<F64Array>(o), name, "expected float64");
  F64Array a = py::reinterpret_borrow<F64Array>(o);
  return per_member(a, s, name);
}

void py_set_geometry(const I32Array& members, const F64Array& weights, const F64Array& gram,
                     F64Array& merged_norm, F64Array& superposition, F64Array& gram_rank,
                     F64Array& cosine_rank, F64Array& leverage, int threads,
                     const std::string& isa) {
  expect(gram.ndim() == 2 && gram.shape(0) == gram.shape(1), "gram", "expected a square");
  const Sets sets = sets_of(members, weights, gram.shape(0));
  const SetGeometry out{per_set(merged_norm, sets, "merged_norm"),
                        per_set(superposition, sets, "superposition"),
                        per_set(gram_rank, sets, "gram_rank"),
                        per_set(cosine_rank, sets, "cosine_rank"),
                        per_member(leverage, sets, "leverage")};
  const Kernels& kernels = kernels_called(isa);
  const double* const g = gram.data();
  const i64 n = gram.shape(0);
  py::gil_scoped_release release;
  set_geometry(sets, g, n, out, kernels, threads);
}

void py_set_retention(const I32Array& members, const F64Array& weights, const F64Array& grams,
                      const I64Array& domain_of, const F64Array& lambda, const py::object& error,
                      const py::object& direction, const py::object& mean_weights,
                      const py::object& mean_error, const py::object& worst_weights,
                      const py::object& worst_error, F64Array& gap, double ridge,
                      double tolerance, int threads, const std::string& isa) {
  expect(grams.ndim() == 3 && grams.shape(1) == grams.shape(2), "grams", "expected squares");
  const i64 n = grams.shape(1);
  const Sets sets = sets_of(members, weights, n);
  expect(domain_of.ndim() == 1 && domain_of.shape(0) == n, "domain_of", "one per adapter");
  for (i64 i = 0; i < n; i++)
    expect(domain_of.data()[i] >= 0 && domain_of.data()[i] < grams.shape(0), "domain_of",
           "no such domain");
  expect(lambda.ndim() == 1 && lambda.shape(0) == n, "lambdas", "one per adapter");
  expect(error.is_none() == direction.is_none() &&
             mean_weights.is_none() == mean_error.is_none() &&
             worst_weights.is_none() == worst_error.is_none(),
         "error", "each has a companion");
  const SetRetention out{wanted(error, sets, "error"),
                         wanted(direction, sets, "direction"),
                         wanted(mean_weights, sets, "mean_weights"),
                         wanted(mean_error, sets, "mean_error"),
                         wanted(worst_weights, sets, "worst_weights"),
                         wanted(worst_error, sets, "worst_error"),
                         per_set(gap, sets, "gap")};
  const Kernels& kernels = kernels_called(isa);
  const double* const g = grams.data();
  const i64* const domains = domain_of.data();
  const double* const l = lambda.data();
  py::gil_scoped_release release;
  set_retention(sets, g, n, domains, l, out, {ridge, tolerance}, kernels, threads);
}

}  // namespace

void bind_sets(py::module_& m) {
  m.def("set_geometry", &py_set_geometry, py::arg("members").noconvert(),
        py::arg("weights").noconvert(), py::arg("gram").noconvert(),
        py::arg("merged_norm").noconvert(), py::arg("superposition").noconvert(),
        py::arg("gram_rank").noconvert(), py::arg("cosine_rank").noconvert(),
        py::arg("leverage").noconvert(), py::arg("threads"), py::arg("isa"),
        "Norms, effective ranks and leverages of sets of adapters from their Gram matrix.");
  m.def("set_retention", &py_set_retention, py::arg("members").noconvert(),
        py::arg("weights").noconvert(), py::arg("grams").noconvert(),
        py::arg("domain_of").noconvert(), py::arg("lambdas").noconvert(), py::arg("error"),
        py::arg("direction"), py::arg("mean_weights"), py::arg("mean_error"),
        py::arg("worst_weights"), py::arg("worst_error"), py::arg("gap").noconvert(),
        py::arg("ridge"), py::arg("tolerance"), py::arg("threads"), py::arg("isa"),
        "Errors of merges of sets of adapters, and the weights that make them least.");
}
