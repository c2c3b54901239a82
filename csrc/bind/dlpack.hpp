// The DLPack exchange structures (github.com/dmlc/dlpack, ABI 1.0 and the unversioned one before
// it), declared here because the binary layout is the whole interface, and a view over them.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>

#include "mergeprobe/types.hpp"

namespace mergeprobe::bind {

namespace py = pybind11;

struct DLDevice {
  std::int32_t device_type;
  std::int32_t device_id;
};
struct DLDataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};
struct DLManagedTensorVersioned {
  std::uint32_t major, minor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned*);
  std::uint64_t flags;
  DLTensor tensor;
};
constexpr std::int32_t kDLCPU = 1;
constexpr std::uint8_t kDLFloat = 2, kDLBfloat = 4;

// A two-dimensional CPU tensor of floats that someone else owns; keeps it alive. Errors carry the
// argument's name.
class MatrixView {
 public:
  MatrixView(const py::handle& tensor, const char* name) {
    if (!py::hasattr(tensor, "__dlpack__"))
      throw py::type_error(std::string(name) +
                           ": expected a torch tensor or a numpy array (an object with __dlpack__)");
    try {
      // numpy exports read-only arrays only to consumers that know the versioned structure.
      capsule_ = tensor.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 0));
    } catch (py::error_already_set& e) {
      if (!e.matches(PyExc_TypeError)) throw py::value_error(std::string(name) + ": " + e.what());
      capsule_ = tensor.attr("__dlpack__")();
    }
    PyObject* const capsule = capsule_.ptr();
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
      auto* m = static_cast<DLManagedTensorVersioned*>(
          PyCapsule_GetPointer(capsule, "dltensor_versioned"));
      if (m->major != 1) throw py::value_error(std::string(name) + ": unknown DLPack version");
      read(m->tensor, name);
    } else if (PyCapsule_IsValid(capsule, "dltensor")) {
      read(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"))->tensor, name);
    } else {
      throw py::type_error(std::string(name) + ": __dlpack__ did not return a DLPack capsule");
    }
  }

  i64 rows() const { return rows_; }
  i64 columns() const { return columns_; }
  const Matrix& matrix() const { return matrix_; }

 private:
  // The capsule keeps its name, so its own destructor frees it when this view goes.
  void read(const DLTensor& t, const char* name) {
    const std::string prefix = std::string(name) + ": ";
    if (t.device.device_type != kDLCPU)
      throw py::value_error(prefix + "expected a CPU tensor");
    if (t.ndim != 2)
      throw py::value_error(prefix + "expected 2 dimensions, got " + std::to_string(t.ndim));
    const DLDataType d = t.dtype;
    if (d.lanes == 1 && d.code == kDLFloat && d.bits == 32) {
      matrix_.dtype = Dtype::f32;
    } else if (d.lanes == 1 && d.code == kDLFloat && d.bits == 16) {
      matrix_.dtype = Dtype::f16;
    } else if (d.lanes == 1 && d.code == kDLBfloat && d.bits == 16) {
      matrix_.dtype = Dtype::bf16;
    } else if (d.lanes == 1 && d.code == kDLFloat && d.bits == 64) {
      matrix_.dtype = Dtype::f64;
    } else {
      throw py::value_error(prefix + "expected float32, bfloat16, float16 or float64");
    }
    rows_ = t.shape[0];
    columns_ = t.shape[1];
    matrix_.row_stride = t.strides ? t.strides[0] : columns_;
    matrix_.col_stride = t.strides ? t.strides[1] : 1;
    matrix_.data = static_cast<const char*>(t.data) + t.byte_offset;
  }

  py::object capsule_;
  Matrix matrix_{};
  i64 rows_ = 0, columns_ = 0;
};

}  // namespace mergeprobe::bind
