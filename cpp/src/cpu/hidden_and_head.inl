// KERNEL: a hidden layer and the head behind it on a tile, in one pass.
//
// Stores between the layers of a small network take the place of multiply-adds. With one hidden layer, up to 8
// inputs and up to 16 outputs, the hidden units can stay in registers: 8 inputs, 8 units and 16 sums. Every
// multiply-add then loads its weight, which pays where wide blocks do.
#pragma once

#include <stdint.h>

#include "activations.inl"
#include "blocks.hpp"
#include "kernels.hpp"
#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

constexpr int kHeadUnits = 8;
template <class T>
constexpr bool kHasHiddenHead = kCanBeWide && kLanes<T> == 16;

/// y[NO][rows] = V^T relu(W^T x[NI][rows] + b) + c, the same sums as two calls of dense_tile.
template <class T, int NI, int NO>
NVPFLOW_NOINLINE void hidden_and_head(const Dense<T>& hidden, const Dense<T>& head, const T* x, T* y, int64_t rows) {
  constexpr int L = kLanes<T>;
  for (int64_t r = 0; r < rows; r += L) {
    Vec<T> in[NI], sum[NO];
    for (int i = 0; i < NI; ++i) in[i] = load<T>(x + i * rows + r);
    for (int o = 0; o < NO; ++o) sum[o] = set1(head.bias[o]);
    for (int64_t begin = 0; begin < head.in; begin += head.segment) {
      const int64_t end = smaller(begin + head.segment, head.in);
      for (int64_t h = begin; h < end; h += kHeadUnits) {
        const T *w = hidden.weights + h / L * L * NI + h % L, *v = head.weights + h * L;
        Vec<T> unit[kHeadUnits];
        for (int k = 0; k < kHeadUnits; ++k) unit[k] = set1(hidden.bias[h + k]);
        if (r == 0) {  // the other rows find the weights in the first-level cache
          for (int k = 0; k < NI; ++k) __builtin_prefetch(w + (NI + k) * L);
          for (int k = 0; k < kHeadUnits; ++k) __builtin_prefetch(v + (2 * kHeadUnits + k) * L);
        }
#pragma GCC unroll 16
        for (int i = 0; i < NI; ++i) {
#pragma GCC unroll 16
          for (int k = 0; k < kHeadUnits; ++k) unit[k] = fma(set1(w[i * L + k]), in[i], unit[k]);
        }
        for (int k = 0; k < kHeadUnits; ++k) unit[k] = rectify<T>(unit[k], Act::relu);
#pragma GCC unroll 16
        for (int k = 0; k < kHeadUnits; ++k) {
#pragma GCC unroll 16
          for (int o = 0; o < NO; ++o) sum[o] = fma(set1(v[k * L + o]), unit[k], sum[o]);
        }
      }
      for (int o = 0; o < NO; ++o) {
        T* to = y + o * rows + r;  // where the total of finished segments waits
        store<T>(to, begin > 0 ? load<T>(to) + sum[o] : sum[o]);
        sum[o] = Vec<T>{};
      }
    }
  }
}

/// hidden_and_head of the sizes it is made for: the halves of a flow differ by a feature at most. Returns whether it
/// ran.
template <class T, int NI = 1>
bool hidden_and_head_of(const Dense<T>& hidden, const Dense<T>& head, const T* x, T* y, int64_t rows) {
  if constexpr (2 * NI <= kLanes<T>) {
    if (hidden.in != NI) return hidden_and_head_of<T, NI + 1>(hidden, head, x, y, rows);
    const auto run = [&](auto outputs) __attribute__((always_inline)) {
      constexpr int n = decltype(outputs)::value;
      if constexpr (n > 0 && n <= kLanes<T>) {
        if (head.out == n) return hidden_and_head<T, NI, n>(hidden, head, x, y, rows), true;
      }
      return false;
    };
    return run(Count<2 * NI - 2>{}) || run(Count<2 * NI>{}) || run(Count<2 * NI + 2>{});
  } else {
    return false;
  }
}

}  // namespace
}  // namespace nvpflow::cpu
