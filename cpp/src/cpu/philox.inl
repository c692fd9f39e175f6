// KERNEL: random words from counters. About 30 integer operations per 64 bits.
#pragma once

#include <stdint.h>

#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

/// kStreamComponent of random.hpp.
constexpr uint32_t kComponentStream = 5;

/// Philox 4x32-10 on L counters {row, block, stream} at once; words [4][L]. The scalar text, and the streams, are in
/// random.hpp.
template <int L>
NVPFLOW_INLINE void philox_lanes(uint64_t key, uint64_t row, uint32_t block, uint32_t* words, uint32_t stream = 0) {
  uint32_t c0[L], c1[L], c2[L], c3[L];
  for (int l = 0; l < L; ++l) {
    const uint64_t r = row + static_cast<uint64_t>(l);
    c0[l] = static_cast<uint32_t>(r);
    c1[l] = static_cast<uint32_t>(r >> 32);
    c2[l] = block;
    c3[l] = stream;
  }
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int l = 0; l < L; ++l) {
      const uint64_t product0 = uint64_t{0xD2511F53u} * c0[l];
      const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2[l];
      const uint32_t next0 = static_cast<uint32_t>(product1 >> 32) ^ c1[l] ^ k0;
      const uint32_t next2 = static_cast<uint32_t>(product0 >> 32) ^ c3[l] ^ k1;
      c1[l] = static_cast<uint32_t>(product1);
      c3[l] = static_cast<uint32_t>(product0);
      c0[l] = next0;
      c2[l] = next2;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int l = 0; l < L; ++l) {
    words[l] = c0[l];
    words[L + l] = c1[l];
    words[2 * L + l] = c2[l];
    words[3 * L + l] = c3[l];
  }
}

}  // namespace
}  // namespace nvpflow::cpu
