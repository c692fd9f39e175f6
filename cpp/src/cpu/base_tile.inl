// What a base's way back reads and writes of a gradient tile.
#pragma once

#include <stdint.h>

#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

template <class T>
struct BaseTile {
  const T* state;  // [D][rows]: latents
  int64_t features, count, rows;
  const int64_t* place;   // of the features; null: their own index
  T* log_prob_cotangent;  // [rows]; what it becomes is that of the log-determinant
  T* cotangent;           // [D][rows]: of the latents, written
  T* tape;                // what weight_gradient needs, written
};

NVPFLOW_INLINE int64_t place_of(const int64_t* table, int64_t feature) {
  return table == nullptr ? feature : table[feature];
}

}  // namespace
}  // namespace nvpflow::cpu
