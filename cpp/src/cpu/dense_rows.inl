// KERNEL: a dense layer on many rows, row-major: what the gradients of a tile need in both directions.
#pragma once

#include <stdint.h>

#include "activations.inl"
#include "blocks.hpp"
#include "kernels.hpp"
#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

/// sum[m][n] += x[m][i] W[i][n] for inputs i in [begin, end), in order. w: first of the blocks, `stride` apart.
template <class T, int MR, int NV, bool fetch_ahead = false>
NVPFLOW_INLINE void accumulate_rows(const T* w, int64_t stride, const T* x, int64_t x_stride, int64_t begin,
                                    int64_t end, Vec<T> (&sum)[MR][NV]) {
  constexpr int L = kLanes<T>;
  const T* wi = w + begin * L;
  const T* xi = x + begin;
  for (int64_t i = begin; i < end; ++i, wi += L, ++xi) {
    Vec<T> weight[NV];
    for (int n = 0; n < NV; ++n) {
      weight[n] = load<T>(wi + n * stride);
      if constexpr (fetch_ahead) __builtin_prefetch(wi + n * stride + kAhead * L);
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const Vec<T> input = set1(xi[m * x_stride]);
      for (int n = 0; n < NV; ++n) sum[m][n] = fma(weight[n], input, sum[m][n]);
    }
  }
}

/// MR rows x NV vectors of outputs, the first of which is `o`. finish(row, output, sum): what is stored.
template <class T, int MR, int NV, class Finish>
NVPFLOW_INLINE void rows_block(const Dense<T>& d, int64_t o, const T* x, int64_t x_stride, T* y, int64_t y_stride,
                               int64_t row, Finish finish) {
  constexpr int L = kLanes<T>;
  const T* w = d.weights + o * d.in;
  const int64_t stride = d.in * L;
  x += row * x_stride;
  Vec<T> total[MR][NV];
  for (int n = 0; n < NV; ++n) {
    const Vec<T> bias = d.bias == nullptr ? Vec<T>{} : load<T>(d.bias + o + n * L);
    for (int m = 0; m < MR; ++m) total[m][n] = bias;
  }
  if (d.adds) {
    for (int m = 0; m < MR; ++m) {
      for (int n = 0; n < NV; ++n) total[m][n] = load<T>(y + (row + m) * y_stride + o + n * L);
    }
  }
  accumulate_rows<T, MR, NV>(w, stride, x, x_stride, 0, d.segment, total);
  for (int64_t begin = d.segment; begin < d.in; begin += d.segment) {
    Vec<T> sum[MR][NV] = {};
    accumulate_rows<T, MR, NV>(w, stride, x, x_stride, begin, smaller(begin + d.segment, d.in), sum);
    for (int m = 0; m < MR; ++m) {
      for (int n = 0; n < NV; ++n) total[m][n] = total[m][n] + sum[m][n];
    }
  }
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NV; ++n) {
      store<T>(y + (row + m) * y_stride + o + n * L, finish(row + m, o + n * L, total[m][n]));
    }
  }
}

/// All rows for NV vectors of outputs.
template <class T, int NV, class Finish>
void rows_strip(const Dense<T>& d, int64_t o, const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t rows,
                Finish finish) {
  int64_t r = 0;
  for (; r + kRowsBlock <= rows; r += kRowsBlock) {
    rows_block<T, kRowsBlock, NV>(d, o, x, x_stride, y, y_stride, r, finish);
  }
  if constexpr (kRowsBlock > 4) {
    if (r + 4 <= rows) {
      rows_block<T, 4, NV>(d, o, x, x_stride, y, y_stride, r, finish);
      r += 4;
    }
  }
  if (r + 2 <= rows) {
    rows_block<T, 2, NV>(d, o, x, x_stride, y, y_stride, r, finish);
    r += 2;
  }
  if (r < rows) rows_block<T, 1, NV>(d, o, x, x_stride, y, y_stride, r, finish);
}

/// y[rows][out] = finish(W^T x[rows][in] + c), row-major; whole vectors of y are written.
template <class T, class Finish>
void dense_rows_finish(const Dense<T>& d, const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t rows,
                       Finish finish) {
  constexpr int L = kLanes<T>;
  int64_t o = 0;
  if constexpr (kCanBeWide) {
    constexpr int64_t kWide = int64_t{kRowsVectors + 1} * L;
    // Not down to one vector, whose strip reads twice as much for each multiply-add.
    const auto fits = [&] { return o + kWide - L < d.out && (o + kWide >= d.out || o + kWide + L < d.out); };
    for (; d.wide_blocks && d.in >= kWideFrom && fits(); o += kWide) {
      rows_strip<T, kRowsVectors + 1>(d, o, x, x_stride, y, y_stride, rows, finish);
    }
  }
  for (; o + (kRowsVectors - 1) * L < d.out; o += kRowsVectors * L) {
    rows_strip<T, kRowsVectors>(d, o, x, x_stride, y, y_stride, rows, finish);
  }
  if constexpr (kRowsVectors > 2) {
    if (o + L < d.out) {
      rows_strip<T, 2>(d, o, x, x_stride, y, y_stride, rows, finish);
      o += 2 * L;
    }
  }
  for (; o < d.out; o += L) rows_strip<T, 1>(d, o, x, x_stride, y, y_stride, rows, finish);
}

template <class T, Act act>
void dense_rows_act(const Dense<T>& d, const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t rows) {
  dense_rows_finish<T>(d, x, x_stride, y, y_stride, rows,
                       [](int64_t, int64_t, Vec<T> v) __attribute__((always_inline)) { return rectify<T>(v, act); });
}

/// y[rows][out] = rectify(W^T x[rows][in] + c).
template <class T>
void dense_rows(const Dense<T>& d, const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t rows, Act act) {
  switch (act) {
    case Act::relu:
      return dense_rows_act<T, Act::relu>(d, x, x_stride, y, y_stride, rows);
    case Act::leaky_relu:
      return dense_rows_act<T, Act::leaky_relu>(d, x, x_stride, y, y_stride, rows);
    default:
      return dense_rows_act<T, Act::none>(d, x, x_stride, y, y_stride, rows);
  }
}

/// MR rows of g_in[rows][lanes] = W g_out[rows][out] in two parts each (Dense::paired): lane 2 i + q has that of input
/// i and of the outputs 2 o + q.
template <class T, int MR>
NVPFLOW_INLINE void paired_block(const Dense<T>& d, const T* g_out, int64_t stride, T* g_in) {
  Vec<T> sum[MR] = {};
  const T* w = d.transposed;
  int64_t o = 0;
  for (; o + 2 <= d.out; o += 2, w += kLanes<T>) {
    const Vec<T> weight = load<T>(w);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) sum[m] = fma(weight, set_pairs(g_out + m * stride + o), sum[m]);
  }
  for (int m = 0; m < MR; ++m) {
    if (o < d.out) {
      const T last[2] = {g_out[m * stride + o], T(0)};
      sum[m] = fma(load<T>(w), set_pairs(last), sum[m]);
    }
    store<T>(g_in + m * kLanes<T>, sum[m]);
  }
}

template <class T>
void dense_rows_paired(const Dense<T>& d, const T* g_out, int64_t stride, T* g_in, int64_t rows) {
  int64_t r = 0;
  const auto blocks = [&](auto count) __attribute__((always_inline)) {
    constexpr int n = decltype(count)::value;
    for (; r + n <= rows; r += n) paired_block<T, n>(d, g_out + r * stride, stride, g_in + r * kLanes<T>);
  };
  blocks(Count<kPairedRows>{});
  blocks(Count<1>{});
}

}  // namespace
}  // namespace nvpflow::cpu
