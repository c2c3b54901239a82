// The thread of a GPU, and the launches.
#include <cuda_runtime.h>

#include "launch.hpp"

namespace mergeprobe::cuda {
namespace {

struct Thread {
  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ i64 block() const { return blockIdx.x; }
  __device__ __forceinline__ i64 split() const { return blockIdx.y; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ bool all(bool x) const { return __syncthreads_and(x); }
  // Rounded once whatever the compiler's flags say.
  __device__ __forceinline__ float fma(float a, float b, float c) const {
    return __fmaf_rn(a, b, c);
  }
  __device__ __forceinline__ int ones(u32 x) const { return __popc(x); }
  __device__ __forceinline__ void add(i64* to, i64 x) const {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(x));
  }
  __device__ __forceinline__ void least(i64* to, i64 x) const {
    atomicMin(reinterpret_cast<long long*>(to), static_cast<long long>(x));
  }
  // All lanes of a warp, to the same place.
  __device__ __forceinline__ void warp_add(i64* to, int x) const {
    const int total = __reduce_add_sync(0xffffffffu, x);
    if (threadIdx.x % 32 == 0) add(to, total);
  }
  // 16 bytes to shared memory behind the thread's back, or zeros; there after wait().
  __device__ __forceinline__ void copy(Four* to, const u32* from, bool there) const {
    const auto shared = static_cast<u32>(__cvta_generic_to_shared(to));
    const int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from),
                 "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ void wait() const { asm volatile("cp.async.wait_all;" ::: "memory"); }
  // d (16 x 8) += bits set in a (16 x 256) & b (256 x 8).
  // Lane 4 g + c gives words c and c + 4 of rows g and g + 8 of a, and of column g of b.
  __device__ __forceinline__ void and_popc(int* d, Two low, Two high, Two b) const {
    asm volatile(
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(low.v[0]), "r"(high.v[0]), "r"(low.v[1]), "r"(high.v[1]), "r"(b.v[0]), "r"(b.v[1]));
  }
};

struct Upload {
  SignDelta deltas[kUpload];
};

__global__ void upload_kernel(const __grid_constant__ Upload from, SignDelta* to, int n) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x))
    to[i] = from.deltas[i];
}

__global__ void __launch_bounds__(kThreads, 2)
    generate_kernel(const __grid_constant__ SignSlab slab) {
  __shared__ GenerateShared shared;
  Thread t;
  generate(slab, shared, t);
}

template <class Product>
__global__ void __launch_bounds__(kThreads, 2)
    count_kernel(const __grid_constant__ SignSlab slab, const __grid_constant__ SignCounts counts) {
  extern __shared__ __align__(16) char memory[];
  Thread t;
  count<Product>(slab, counts, *reinterpret_cast<CountShared*>(memory), t);
}

// After a failure nothing more is called.
class Launcher {
 public:
  Launcher(cudaStream_t stream, bool matrix)
      : stream_(stream), count_(matrix ? count_kernel<BinaryMatrix> : count_kernel<Scalar>) {
    check("cudaFuncSetAttribute",
          cudaFuncSetAttribute(count_, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               sizeof(CountShared)));
  }
  Failure failure() const { return failure_; }

  void clear(void* data, i64 bytes, int value) {
    if (!failure_.call)
      check("cudaMemsetAsync",
            cudaMemsetAsync(data, value, static_cast<std::size_t>(bytes), stream_));
  }
  // As arguments of a kernel: a copy from pageable memory might wait for the stream.
  void upload(SignDelta* to, const SignDelta* from, i64 n) {
    if (failure_.call) return;
    Upload packet{};
    std::copy_n(from, n, packet.deltas);
    upload_kernel<<<1, 64, 0, stream_>>>(packet, to, static_cast<int>(n));
    check("launch of upload_kernel", cudaGetLastError());
  }
  void generate(i64 blocks, const SignSlab& slab) {
    if (failure_.call) return;
    generate_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream_>>>(slab);
    check("launch of generate_kernel", cudaGetLastError());
  }
  void count(i64 blocks, i64 splits, const SignSlab& slab, const SignCounts& counts) {
    if (failure_.call) return;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(splits));
    count_<<<grid, kThreads, sizeof(CountShared), stream_>>>(slab, counts);
    check("launch of count_kernel", cudaGetLastError());
  }

 private:
  void check(const char* call, cudaError_t code) {
    if (!failure_.call && code != cudaSuccess) failure_ = {call, static_cast<int>(code)};
  }

  cudaStream_t stream_;
  void (*count_)(SignSlab, SignCounts);
  Failure failure_;
};

}  // namespace

const char* describe(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

Failure count_devices(int* count) {
  const cudaError_t code = cudaGetDeviceCount(count);
  return code == cudaSuccess ? Failure{} : Failure{"cudaGetDeviceCount", static_cast<int>(code)};
}

int runtime_version() { return CUDART_VERSION; }

Failure sign_pairs(SignCall call, int device, void* stream, Engine engine) {
  int before = 0, major = 0;
  cudaError_t code = cudaGetDevice(&before);
  if (code != cudaSuccess) return {"cudaGetDevice", code};
  code = cudaSetDevice(device);
  if (code != cudaSuccess) return {"cudaSetDevice", code};
  Failure failure;
  code = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (code == cudaSuccess)
    code = cudaDeviceGetAttribute(&call.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (code != cudaSuccess) {
    failure = {"cudaDeviceGetAttribute", code};
  } else {
    // Parts after Hopper have no such instruction: theirs is put together from byte products.
    const bool native = major == 8 || major == 9;
    Launcher launcher(static_cast<cudaStream_t>(stream),
                      engine == Engine::matrix || (engine == Engine::fastest && native));
    run_signs(call, launcher);
    failure = launcher.failure();
  }
  code = cudaSetDevice(before);
  if (!failure.call && code != cudaSuccess) failure = {"cudaSetDevice", code};
  return failure;
}

}  // namespace mergeprobe::cuda
