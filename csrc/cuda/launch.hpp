// What the binding calls: pointers and a stream in, the CUDA call that failed out. Nothing here
// waits for the device.
#pragma once
#include "signs.hpp"

namespace mergeprobe::cuda {

struct Failure {
  const char* call = nullptr;  // nullptr: none
  int code = 0;                // a cudaError_t
};
const char* describe(int code);
Failure count_devices(int* count);
int runtime_version();

enum class Engine { fastest, scalar, matrix };

// On the device of that number; the caller's current device is current again afterwards.
Failure sign_pairs(SignCall call, int device, void* stream, Engine engine);

}  // namespace mergeprobe::cuda
