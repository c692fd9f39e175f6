// KERNEL: a dense layer on a tile, feature-major. The weights are read once per tile from L1 or L2. Bound: fused
// multiply-adds (two a cycle where the processor has two such units); a register block of kBlockOut x kBlockRows
// vectors needs kBlockOut + kBlockRows loads for kBlockOut * kBlockRows multiply-adds.
#pragma once

#include <stdint.h>

#include "activations.inl"
#include "blocks.hpp"
#include "kernels.hpp"
#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

/// sum[m][n] += W[i][m] x[i][n] for inputs i in [begin, end), in order.
template <class T, int MO, int NV>
NVPFLOW_INLINE void accumulate(const T* w, const T* x, int64_t begin, int64_t end, int64_t rows,
                               Vec<T> (&sum)[MO][NV]) {
  constexpr int L = kLanes<T>;
  const T* xi = x + begin * rows;
  const T* wi = w + begin * L;
  for (int64_t i = begin; i < end; ++i, xi += rows, wi += L) {
    Vec<T> input[NV];
    if constexpr (NV > 1) __builtin_prefetch(wi + kAhead * L);  // with one vector the loads are the bottleneck
    for (int n = 0; n < NV; ++n) input[n] = load<T>(xi + n * L);
#pragma GCC unroll 16
    for (int m = 0; m < MO; ++m) {
      const Vec<T> weight = set1(wi[m]);
      for (int n = 0; n < NV; ++n) sum[m][n] = fma(weight, input[n], sum[m][n]);
    }
  }
}

/// MO outputs x NV vectors of rows. w: weight of input 0 and the first output; x, y: first row of the block.
template <class T, int MO, int NV, Act act>
NVPFLOW_INLINE void dense_block(const Dense<T>& d, const T* w, const T* bias, const T* x, T* y, int64_t rows) {
  // The total of finished segments waits in registers, or where the outputs go.
  constexpr bool kInRegisters = 2 * MO * NV <= kRegisters;
  Vec<T> sum[MO][NV], total[kInRegisters ? MO : 1][NV] = {};
  const auto each = [&](auto&& f) __attribute__((always_inline)) {
    T* to = y;
#pragma GCC unroll 16
    for (int m = 0; m < MO; ++m, to += rows) {
      for (int n = 0; n < NV; ++n) f(m, n, to + n * kLanes<T>);
      asm("" : "+r"(to));  // or the compiler holds the distance of each output in a register, and has too few
    }
  };
  if (bias == nullptr) {
    each([&](int m, int n, T* from) __attribute__((always_inline)) { sum[m][n] = load<T>(from); });
  } else {
    for (int m = 0; m < MO; ++m) {
      for (int n = 0; n < NV; ++n) sum[m][n] = set1(bias[m]);
    }
  }
  for (int64_t begin = 0;; begin += d.segment) {
    accumulate<T, MO, NV>(w, x, begin, smaller(begin + d.segment, d.in), rows, sum);
    if (begin > 0) {
      each([&](int m, int n, T* to) __attribute__((always_inline)) {
        if constexpr (kInRegisters) {
          sum[m][n] = total[m][n] + sum[m][n];
        } else {
          sum[m][n] = load<T>(to) + sum[m][n];
        }
      });
    }
    if (begin + d.segment >= d.in) break;
    each([&](int m, int n, T* to) __attribute__((always_inline)) {
      if constexpr (kInRegisters) {
        total[m][n] = sum[m][n];
      } else {
        store<T>(to, sum[m][n]);
      }
      sum[m][n] = Vec<T>{};
    });
  }
  each([&](int m, int n, T* to) __attribute__((always_inline)) { store<T>(to, rectify<T>(sum[m][n], act)); });
}

/// Blocks of NV vectors of rows from row r on, as far as whole ones go; returns where they end. Not inlined: several
/// blocks in one function take the registers of each other's addresses.
template <class T, int MO, int NV, Act act>
NVPFLOW_NOINLINE int64_t dense_blocks(const Dense<T>& d, const T* w, const T* bias, const T* x, T* y, int64_t rows,
                                      int64_t r, int64_t end) {
  constexpr int64_t kStep = NV * kLanes<T>;
  for (; r + kStep <= end; r += kStep) dense_block<T, MO, NV, act>(d, w, bias, x + r, y + r, rows);
  return r;
}

/// Rows [begin, end) of the tile for MO consecutive outputs.
template <class T, int MO, Act act>
void dense_strip(const Dense<T>& d, const T* w, const T* bias, const T* x, T* y, int64_t rows, int64_t begin,
                 int64_t end) {
  constexpr int L = kLanes<T>;
  int64_t r = begin;
  if constexpr (MO <= kBlockOut) {
    if constexpr (kCanBeWide) {
      if (d.wide_blocks) r = dense_blocks<T, MO, kBlockRows + 1, act>(d, w, bias, x, y, rows, r, end);
    }
    if (r + kBlockRows * L <= end) r = dense_blocks<T, MO, kBlockRows, act>(d, w, bias, x, y, rows, r, end);
    if constexpr (kBlockRows > 2) {
      if (r + 2 * L <= end) r = dense_blocks<T, MO, 2, act>(d, w, bias, x, y, rows, r, end);
    }
  }
  if (r < end) dense_blocks<T, MO, 1, act>(d, w, bias, x, y, rows, r, end);
}

/// Rows [begin, end) of the tile, by strips of MO outputs.
template <class T, Act act, int MO>
void dense_strips(const Dense<T>& d, const T* x, T* y, int64_t rows, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  for (int64_t block = 0; block < d.out; block += L) {
    const T* w = d.weights + block * d.in;
    const int64_t last = smaller(L, d.out - block);
    int64_t o = 0;
    const auto strips = [&](auto outputs) __attribute__((always_inline)) {
      constexpr int n = decltype(outputs)::value;
      if constexpr (n <= MO && n <= L) {
        for (; o + n <= last; o += n) {
          const T* bias = d.bias == nullptr ? nullptr : d.bias + block + o;
          dense_strip<T, n, act>(d, w + o, bias, x, y + (block + o) * rows, rows, begin, end);
        }
      }
    };
    strips(Count<16>{});
    strips(Count<8>{});
    strips(Count<4>{});
    strips(Count<2>{});
    strips(Count<1>{});
  }
}

template <class T, Act act>
void dense_tile_act(const Dense<T>& d, const T* x, T* y, int64_t rows) {
  constexpr int64_t L = kLanes<T>;
  // A single vector of rows at the end needs more outputs in flight than a strip holds, to hide the latency of its
  // sums. It gets a pass of its own with wider strips, unless strips are wide enough or weights too far away to be read
  // twice.
  const bool alone = rows == L, again = kBlockOut < 8 && !d.far && rows % (kBlockRows * L) == L;
  const int64_t main = alone || again ? rows - L : rows;
  if (main > 0) dense_strips<T, act, kBlockOut>(d, x, y, rows, 0, main);
  if (main < rows) dense_strips<T, act, 2 * kBlockOut>(d, x, y, rows, main, rows);
}

/// y[out][rows] = rectify(W^T x[in][rows] + c). rows: a multiple of the lanes. Without a bias the sums start from y.
template <class T>
void dense_tile(const Dense<T>& d, const T* x, T* y, int64_t rows, Act act) {
  switch (act) {
    case Act::relu:
      return dense_tile_act<T, Act::relu>(d, x, y, rows);
    case Act::leaky_relu:
      return dense_tile_act<T, Act::leaky_relu>(d, x, y, rows);
    default:
      return dense_tile_act<T, Act::none>(d, x, y, rows);
  }
}

}  // namespace
}  // namespace nvpflow::cpu
