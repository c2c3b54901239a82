// A view over a CUDA tensor that someone else owns, as csrc/bind/dlpack.hpp has one over the CPU's.
#pragma once
#include <initializer_list>
#include <vector>

#include "bind/dlpack.hpp"

namespace mergeprobe::bind {

constexpr std::int32_t kDLCUDA = 2;
constexpr std::uint8_t kDLInt = 0, kDLUInt = 1;

class DeviceTensor {
 public:
  // No work is ordered by the export: the caller's stream is the one that everything runs on.
  DeviceTensor(const py::handle& tensor, std::string name) : name_(std::move(name)) {
    if (!py::hasattr(tensor, "__dlpack__") || !py::hasattr(tensor, "__dlpack_device__"))
      throw py::type_error(name_ + ": expected a CUDA tensor (an object with __dlpack__)");
    const auto where = tensor.attr("__dlpack_device__")().cast<std::pair<int, int>>();
    expect(where.first == kDLCUDA, "expected a CUDA tensor");
    device_ = where.second;
    const py::object exporter = tensor.attr("__dlpack__");
    try {
      try {
        capsule_ = exporter(py::arg("stream") = -1, py::arg("max_version") = py::make_tuple(1, 0));
      } catch (py::error_already_set& e) {
        if (!e.matches(PyExc_TypeError)) throw;
        capsule_ = exporter(py::arg("stream") = -1);
      }
    } catch (py::error_already_set& e) {
      throw py::value_error(name_ + ": " + py::str(e.value()).cast<std::string>());
    }
    PyObject* const capsule = capsule_.ptr();
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
      auto* m = static_cast<DLManagedTensorVersioned*>(
          PyCapsule_GetPointer(capsule, "dltensor_versioned"));
      expect(m->major == 1, "unknown DLPack version");
      tensor_ = &m->tensor;
    } else {
      expect(PyCapsule_IsValid(capsule, "dltensor"), "__dlpack__ did not return a DLPack capsule");
      tensor_ = &static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"))->tensor;
    }
    expect(tensor_->device.device_type == kDLCUDA && tensor_->device.device_id == device_,
           "lies elsewhere than its __dlpack_device__");
  }

  int device() const { return device_; }
  i64 size(int axis) const { return tensor_->shape[axis]; }
  char* data() const { return static_cast<char*>(tensor_->data) + tensor_->byte_offset; }

  // A matrix of floats with any strides.
  Matrix matrix() const {
    expect_axes(2);
    const DLDataType d = tensor_->dtype;
    Matrix m{data(), stride(0), stride(1), Dtype::f32};
    if (d.lanes == 1 && d.code == kDLBfloat && d.bits == 16) {
      m.dtype = Dtype::bf16;
    } else if (d.lanes == 1 && d.code == kDLFloat && d.bits == 16) {
      m.dtype = Dtype::f16;
    } else if (d.lanes == 1 && d.code == kDLFloat && d.bits == 64) {
      m.dtype = Dtype::f64;
    } else {
      expect(d.lanes == 1 && d.code == kDLFloat && d.bits == 32,
             "expected float32, bfloat16, float16 or float64");
    }
    return m;
  }

  // Contiguous memory of that type; a shape of -1 is any.
  template <class I>
  I* array(std::initializer_list<i64> shape) const {
    const DLDataType d = tensor_->dtype;
    constexpr bool is_signed = static_cast<I>(-1) < I{0};
    expect(d.lanes == 1 && d.code == (is_signed ? kDLInt : kDLUInt) && d.bits == 8 * sizeof(I),
           is_signed ? "expected int64" : "expected uint8");
    expect_axes(static_cast<int>(shape.size()));
    int axis = 0;
    for (const i64 n : shape) {
      expect(n < 0 || size(axis) == n, "expected a size of " + std::to_string(n) + " along axis " +
                                           std::to_string(axis) + ", got " +
                                           std::to_string(size(axis)));
      axis++;
    }
    i64 next = 1;
    for (axis = static_cast<int>(shape.size()) - 1; axis >= 0; next *= size(axis--))
      expect(size(axis) <= 1 || stride(axis) == next, "expected contiguous memory");
    return reinterpret_cast<I*>(data());
  }

  void expect(bool ok, const std::string& why) const {
    if (!ok) throw py::value_error(name_ + ": " + why);
  }

 private:
  void expect_axes(int n) const {
    expect(tensor_->ndim == n, "expected " + std::to_string(n) +
                                   (n == 1 ? " dimension" : " dimensions") + ", got " +
                                   std::to_string(tensor_->ndim));
  }
  i64 stride(int axis) const {
    if (tensor_->strides) return tensor_->strides[axis];
    i64 stride = 1;
    for (int a = tensor_->ndim - 1; a > axis; a--) stride *= size(a);
    return stride;
  }

  // The capsule keeps its name, so its own destructor frees it when this view goes.
  std::string name_;
  py::object capsule_;
  const DLTensor* tensor_ = nullptr;
  int device_ = 0;
};

}  // namespace mergeprobe::bind
