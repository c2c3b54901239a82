// Checks that every binding shares.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "mergeprobe/kernels.hpp"

namespace mergeprobe::bind {

namespace py = pybind11;
using I64Array = py::array_t<i64, py::array::c_style>;
using F64Array = py::array_t<double, py::array::c_style>;

[[noreturn]] inline void fail(const std::string& name, const std::string& why) {
  throw py::value_error(name + ": " + why);
}

inline void expect(bool ok, const char* name, const char* why) {
  if (!ok) fail(name, why);
}

inline const Kernels& kernels_called(const std::string& isa) {
  const Kernels* k = find_kernels(isa.c_str());
  if (!k) fail("isa", "'" + isa + "' is not available on this CPU or in this build");
  return *k;
}

// A numpy array of C structs, laid out by mergeprobe_fast/ops/_tables.py.
template <class S>
S* records(const py::array& a, const char* name) {
  if (a.itemsize() != static_cast<py::ssize_t>(sizeof(S)))
    fail(name, "expected records of " + std::to_string(sizeof(S)) + " bytes, got " +
                   std::to_string(a.itemsize()));
  expect(a.ndim() == 1 && (a.flags() & py::array::c_style), name, "expected one contiguous axis");
  return static_cast<S*>(const_cast<void*>(a.data()));
}

// bounds[0] == 0, never falling, bounds[-1] == total.
inline void expect_bounds(const I64Array& bounds, i64 total, const char* name) {
  expect(bounds.ndim() == 1 && bounds.size() >= 1, name, "expected at least one bound");
  const i64* b = bounds.data();
  expect(b[0] == 0, name, "must start at 0");
  for (py::ssize_t i = 1; i < bounds.size(); i++)
    expect(b[i] >= b[i - 1], name, "must not decrease");
  if (b[bounds.size() - 1] != total)
    fail(name, "must end at " + std::to_string(total) + ", got " +
                   std::to_string(b[bounds.size() - 1]));
}

}  // namespace mergeprobe::bind
