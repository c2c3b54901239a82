// Random bits as a function of (seed, stream, position): no state, so order and threads do not
// matter. The same bits as counter_hash of mergeprobe_fast/ops/tiles_reference.py.
#pragma once
#include <cstdint>

namespace mergeprobe {
namespace {

// Finaliser of splitmix64 (Steele, Lea and Flood 2014).
static inline std::uint64_t mix64(std::uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// The key of all positions that share their upper 32 bits.
static inline std::uint64_t hash_key(std::uint64_t seed, std::uint64_t stream,
                                     std::uint64_t upper) {
  return mix64(mix64(mix64(seed) ^ stream) ^ upper);
}

// triple32 (Wellons 2018), keyed before the first and before the third multiplication.
static inline std::uint32_t hash32(std::uint32_t lower, std::uint32_t key, std::uint32_t key2) {
  std::uint32_t x = lower ^ key;
  x ^= x >> 17;
  x *= 0xED5AD4BBu;
  x ^= x >> 11;
  x *= 0xAC4C1B51u;
  x += key2;
  x ^= x >> 15;
  x *= 0x31848BABu;
  return x ^ (x >> 14);
}

}  // namespace
}  // namespace mergeprobe
