/* Independent fused multiply-adds on registers: what the core could do if memory cost nothing.
   Built by suites/gram.py with -march=native; 12 chains hide a latency of 4 at 2 to 3 a cycle.
   Assembly, because GCC spills an array of vectors to the stack. */
#if defined(__AVX512F__)
typedef float vec __attribute__((vector_size(64)));
#else
typedef float vec __attribute__((vector_size(32)));
#endif
#define CHAINS 12
#define FMA(c) "vfmadd132ps %13, %12, %" #c "\n\t"

double flops_per_iteration(void) { return 2.0 * CHAINS * (sizeof(vec) / sizeof(float)); }

float fma_loop(long iterations) {
  vec x0 = {0}, x1 = x0, x2 = x0, x3 = x0, x4 = x0, x5 = x0, x6 = x0, x7 = x0, x8 = x0, x9 = x0,
      x10 = x0, x11 = x0;
  vec a = x0 + 0.999f, b = x0 + 0.001f;
  for (long i = 0; i < iterations; i++)
    __asm__ volatile(FMA(0) FMA(1) FMA(2) FMA(3) FMA(4) FMA(5) FMA(6) FMA(7) FMA(8) FMA(9) FMA(10)
                     FMA(11)
                     : "+v"(x0), "+v"(x1), "+v"(x2), "+v"(x3), "+v"(x4), "+v"(x5), "+v"(x6),
                       "+v"(x7), "+v"(x8), "+v"(x9), "+v"(x10), "+v"(x11)
                     : "v"(b), "v"(a));
  return (x0 + x1 + x2 + x3 + x4 + x5 + x6 + x7 + x8 + x9 + x10 + x11)[0];
}
