// The CUDA kernels as Python calls them: checks every argument by name, launches, never waits.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device_tensor.hpp"
#include "cuda/launch.hpp"

namespace py = pybind11;
using namespace mergeprobe;
using namespace mergeprobe::bind;

namespace {

struct CallFailed {
  std::string why;
};

void check(const cuda::Failure& failure) {
  if (failure.call)
    throw CallFailed{std::string(failure.call) + ": " + cuda::describe(failure.code)};
}

void expect(bool ok, const std::string& name, const std::string& why) {
  if (!ok) throw py::value_error(name + ": " + why);
}

cuda::Engine engine_called(const std::string& name) {
  if (name == "auto") return cuda::Engine::fastest;
  if (name == "popcount") return cuda::Engine::scalar;
  expect(name == "matrix", "engine", "expected 'auto', 'popcount' or 'matrix', got '" + name + "'");
  return cuda::Engine::matrix;
}

void py_sign_pairs(const py::list& factors, const py::object& counts, const py::object& bad,
                   const py::object& workspace, std::uintptr_t stream, const std::string& engine) {
  const i64 n = static_cast<i64>(factors.size());
  expect(n > 0 && n <= (i64{1} << 20), "factors", "expected 1 to 2^20 of them");
  const cuda::Engine chosen = engine_called(engine);
  const DeviceTensor found(counts, "counts"), flag(bad, "bad"), space(workspace, "workspace");
  std::vector<cuda::SignDelta> table;
  std::vector<DeviceTensor> alive;
  cuda::SignCall call{};
  for (i64 i = 0; i < n; i++) {
    const std::string name = "factors[" + std::to_string(i) + "]";
    expect(py::isinstance<py::tuple>(factors[i]) && py::len(factors[i]) == 3, name,
           "expected (B, A, scale)");
    const auto item = factors[i].cast<py::tuple>();
    const double scale = item[2].cast<double>();
    expect(std::isfinite(scale), name, "the scale is not finite");
    const DeviceTensor& b = alive.emplace_back(item[0], name + ": B");
    const Matrix left = b.matrix();
    const i64 d_out = b.size(0), rank = b.size(1);
    b.expect(b.device() == found.device(), "lies on another device than counts");
    const DeviceTensor& a = alive.emplace_back(item[1], name + ": A");
    const Matrix right = a.matrix();
    a.expect(a.device() == found.device(), "lies on another device than counts");
    expect(rank == a.size(0) && rank < (i64{1} << 31), name,
           "B has " + std::to_string(rank) + " columns, A " + std::to_string(a.size(0)) + " rows");
    if (i == 0) {
      call.d_out = d_out;
      call.d_in = a.size(1);
      expect(call.d_out > 0 && call.d_in > 0 && call.d_out < (i64{1} << 31) &&
                 call.d_in < (i64{1} << 31),
             name, "not a matrix");
    }
    expect(d_out == call.d_out && a.size(1) == call.d_in, name,
           "delta is " + std::to_string(d_out) + " x " + std::to_string(a.size(1)) +
               ", expected " + std::to_string(call.d_out) + " x " + std::to_string(call.d_in));
    table.push_back({{left.data, left.col_stride, left.row_stride, left.dtype}, right,
                     static_cast<std::int32_t>(rank), (scale > 0) - (scale < 0)});
  }
  call.deltas = table.data();
  call.n = n;
  call.conflicts = found.array<i64>({2, n, n});
  call.both = call.conflicts + n * n;
  flag.expect(flag.device() == found.device(), "lies on another device than counts");
  call.bad = flag.array<i64>({1});
  space.expect(space.device() == found.device(), "lies on another device than counts");
  call.workspace = space.array<std::uint8_t>({-1});
  call.bytes = space.size(0);
  const i64 least = cuda::sign_workspace(n, call.d_out, call.d_in, 0);
  space.expect(call.bytes >= least, "expected at least " + std::to_string(least) +
                                        " bytes, got " + std::to_string(call.bytes));
  space.expect(reinterpret_cast<std::uintptr_t>(call.workspace) % 16 == 0,
               "expected memory aligned to 16 bytes");
  cuda::Failure failure;
  {
    py::gil_scoped_release release;
    failure = cuda::sign_pairs(call, found.device(), reinterpret_cast<void*>(stream), chosen);
  }
  check(failure);
}

i64 py_workspace(i64 n, i64 d_out, i64 d_in, i64 limit) {
  expect(n > 0 && n <= (i64{1} << 20), "n", "expected 1 to 2^20");
  expect(d_out > 0 && d_in > 0 && d_out < (i64{1} << 31) && d_in < (i64{1} << 31), "d_out",
         "not a matrix");
  return cuda::sign_workspace(n, d_out, d_in, limit);
}

int py_devices() {
  int count = 0;
  check(cuda::count_devices(&count));
  return count;
}

py::dict build_info() {
  py::dict info;
  const int version = cuda::runtime_version();
  info["toolkit"] = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  info["architectures"] = MP_CUDA_ARCHITECTURES;
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(
      PYBIND11_VERSION_MINOR);
  return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels on LoRA factors. Use mergeprobe_fast.ops, which documents them.";
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const CallFailed& failed) {
      py::set_error(py::module_::import("mergeprobe_fast.errors").attr("BackendError"),
                    failed.why.c_str());
    }
  });
  m.def("sign_pairs", &py_sign_pairs, py::arg("factors"), py::arg("counts"), py::arg("bad"),
        py::arg("workspace"), py::arg("stream"), py::arg("engine") = "auto",
        "Conflicts and entries not 0 in both, of pairs i < j, into counts (2, n, n).");
  m.def("sign_workspace", &py_workspace, py::arg("n"), py::arg("d_out"), py::arg("d_in"),
        py::arg("limit"), "Bytes that sign_pairs can use, at most `limit` if that is enough.");
  m.def("devices", &py_devices, "How many devices the driver shows.");
  m.def("build_info", &build_info);
}
