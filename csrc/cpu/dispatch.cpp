// Which instruction sets were compiled in, and which of them this CPU and operating system run.
#include <cstring>

#include "mergeprobe/kernels.hpp"

namespace mergeprobe {

extern const Kernels kernels_baseline;
#if defined(MP_HAVE_X86_SETS)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

static bool runs_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
static bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

int available_kernels(const Kernels** out, int capacity) {
  int n = 0;
  auto add = [&](const Kernels& k) {
    if (n < capacity) out[n++] = &k;
  };
#if defined(MP_HAVE_X86_SETS)
  if (runs_avx512()) add(kernels_avx512);
  if (runs_avx2()) add(kernels_avx2);
#endif
  add(kernels_baseline);
  return n;
}

const Kernels* find_kernels(const char* isa) {
  const Kernels* all[4];
  const int n = available_kernels(all, 4);
  if (!isa || !*isa) return all[0];
  for (int i = 0; i < n; i++)
    if (std::strcmp(all[i]->isa, isa) == 0) return all[i];
  return nullptr;
}

}  // namespace mergeprobe
