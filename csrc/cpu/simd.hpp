// A register of lanes. GCC and Clang vector extensions compile to the widest set the file is built
// for; other compilers get a plain array that they may vectorise.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define MP_BYTES 64
#elif defined(__AVX2__)
#define MP_BYTES 32
#else
#define MP_BYTES 16
#endif

#if defined(__GNUC__) || defined(__clang__)
#define MP_INLINE static inline __attribute__((always_inline))
#define MP_NOINLINE static __attribute__((noinline))
#define MP_RESTRICT __restrict__
#define MP_UNROLL(n) _Pragma(MP_STRINGIZE(GCC unroll n))
#define MP_STRINGIZE(x) #x
#define MP_PREFETCH(p) __builtin_prefetch((p), 0, 2)
#else
#define MP_INLINE static __forceinline
#define MP_NOINLINE static __declspec(noinline)
#define MP_RESTRICT __restrict
#define MP_UNROLL(n)
#define MP_PREFETCH(p) ((void)(p))
#endif

namespace mergeprobe {
namespace {

template <class T>
struct Lanes {
  static constexpr int count = MP_BYTES / static_cast<int>(sizeof(T));
#if defined(__GNUC__) || defined(__clang__)
  typedef T vec __attribute__((vector_size(MP_BYTES)));
#else
  struct vec {
    T lane[count];
    T operator[](int i) const { return lane[i]; }
    T& operator[](int i) { return lane[i]; }
    friend vec operator+(vec a, const vec& b) {
      for (int i = 0; i < count; i++) a.lane[i] += b.lane[i];
      return a;
    }
    friend vec operator-(vec a, const vec& b) {
      for (int i = 0; i < count; i++) a.lane[i] -= b.lane[i];
      return a;
    }
    friend vec operator*(vec a, const vec& b) {
      for (int i = 0; i < count; i++) a.lane[i] *= b.lane[i];
      return a;
    }
    friend vec operator/(vec a, const vec& b) {
      for (int i = 0; i < count; i++) a.lane[i] /= b.lane[i];
      return a;
    }
  };
#endif
};

template <class T>
using vec_t = typename Lanes<T>::vec;

template <class T>
MP_INLINE vec_t<T> load(const T* p) {
  vec_t<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
MP_INLINE void store(T* p, const vec_t<T>& v) {
  std::memcpy(p, &v, sizeof v);
}
template <class T>
MP_INLINE vec_t<T> broadcast(T x) {
#if defined(__GNUC__) || defined(__clang__)
  return x - vec_t<T>{};
#else
  vec_t<T> v;
  for (int i = 0; i < Lanes<T>::count; i++) v[i] = x;
  return v;
#endif
}

// [a0 b0 a1 b1 ...] of the low and of the high halves.
template <class T>
MP_INLINE void interleave(const vec_t<T>& a, const vec_t<T>& b, vec_t<T>& low, vec_t<T>& high) {
  constexpr int n = Lanes<T>::count;
#if defined(__GNUC__) && !defined(__clang__)
  typedef typename std::conditional<sizeof(T) == 4, std::int32_t, std::int64_t>::type I;
  typedef I mask __attribute__((vector_size(MP_BYTES)));
  mask lo, hi;
  for (int i = 0; i < n; i++) {
    lo[i] = i / 2 + (i % 2 ? n : 0);
    hi[i] = i / 2 + n / 2 + (i % 2 ? n : 0);
  }
  low = __builtin_shuffle(a, b, lo);
  high = __builtin_shuffle(a, b, hi);
#else
  vec_t<T> lo{}, hi{};
  for (int i = 0; i < n; i++) {
    lo[i] = i % 2 ? b[i / 2] : a[i / 2];
    hi[i] = i % 2 ? b[n / 2 + i / 2] : a[n / 2 + i / 2];
  }
  low = lo;
  high = hi;
#endif
}

// Transposes a square of `count` registers in log2(count) perfect shuffles.
template <class T>
MP_INLINE void transpose(vec_t<T>* r) {
  constexpr int n = Lanes<T>::count;
  vec_t<T> t[n];
  for (int round = 1; round < n; round *= 2) {
    MP_UNROLL(16)
    for (int i = 0; i < n / 2; i++) interleave<T>(r[i], r[i + n / 2], t[2 * i], t[2 * i + 1]);
    MP_UNROLL(16)
    for (int i = 0; i < n; i++) r[i] = t[i];
  }
}

MP_INLINE float widen(float x) { return x; }
MP_INLINE double widen(double x) { return x; }

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

MP_INLINE float from_bits(std::uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
MP_INLINE float widen(bf16 x) { return from_bits(static_cast<std::uint32_t>(x.bits) << 16); }
// Exponent and mantissa are moved as an integer and rescaled by a power of two, which is exact for
// subnormals too; the exponent field of infinities and NaNs needs a second rescale.
MP_INLINE float widen(f16 x) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fffu) << 13;
  const float scaled = from_bits(magnitude) * from_bits(0x77800000u);  // * 2^112
  const float special = from_bits(magnitude | 0x7f800000u);
  const float value = magnitude >= 0x0f800000u ? special : scaled;
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return from_bits(bits | (static_cast<std::uint32_t>(x.bits & 0x8000u) << 16));
}

}  // namespace
}  // namespace mergeprobe
