// KERNEL: a dense layer on fewer rows than a vector has lanes, row-major, with vectors of outputs.
//
// One block takes all the rows, so that each weight is read once. What hides the latency of the sums is, where the
// outputs are many, several vectors of them; where they are few, all S segments at once.
#pragma once

#include <stdint.h>

#include "activations.inl"
#include "blocks.hpp"
#include "dense_rows.inl"
#include "kernels.hpp"
#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

/// Rows that the row path takes at once, at most.
template <class T>
constexpr int64_t kMaxFewRows = kLanes<T> - 1;

/// Vectors of outputs of a wide block: its sums, a vector of weights for each and one of inputs stay in registers.
constexpr int few_vectors(int rows) {
  const int fitting = (kRegisters - 1) / (rows + 1);
  return rows == 1 ? 8 : fitting > 4 ? 4 : fitting;
}

/// The weights of a layer as few rows read them, with the sums over a segment or a step of several segments.
/// fetch_ahead: pays where the rows are so many that a block reads one stream of weights.
template <class T, bool fetch_ahead = false>
struct FullWeights {
  static constexpr bool kCanFetchAhead = true;
  const Dense<T>& d;

  const T* block(int64_t o) const { return d.weights + o * d.in; }
  int64_t stride() const { return d.in * kLanes<T>; }

  /// sum[m][n] += x[m][i] W[i][n] for the inputs i of segment s, in order.
  template <int MR, int NV>
  NVPFLOW_INLINE void segment(const T* w, int64_t s, const T* x, int64_t x_stride, Vec<T> (&sum)[MR][NV]) const {
    const int64_t begin = s * d.segment;
    accumulate_rows<T, MR, NV, fetch_ahead>(w, stride(), x, x_stride, begin, smaller(begin + d.segment, d.in), sum);
  }

  static constexpr int64_t kStep = 1;
  /// The same for inputs i, ..., i + kStep - 1 of segment s.
  template <int MR, int NV>
  NVPFLOW_INLINE void step(const T* w, int64_t s, int64_t i, const T* x, int64_t x_stride,
                           Vec<T> (&sum)[MR][NV]) const {
    accumulate_rows<T, MR, NV>(w, stride(), x, x_stride, s * d.segment + i, s * d.segment + i + 1, sum);
  }
  template <int MR, int NV>
  NVPFLOW_INLINE void one(const T* w, int64_t s, int64_t i, const T* x, int64_t x_stride, Vec<T> (&sum)[MR][NV]) const {
    step<MR, NV>(w, s, i, x, x_stride, sum);
  }
};

/// Dense::narrow.
struct NarrowWeights {
  static constexpr bool kCanFetchAhead = false;
  using T = float;
  const Dense<T>& d;

  const uint32_t* block(int64_t o) const { return d.narrow + o * d.narrow_words; }
  int64_t stride() const { return d.narrow_words * kLanes<T>; }
  const uint32_t* words(const uint32_t* w, int64_t s, int64_t i) const {
    return w + (s * ((d.segment + 1) / 2) + i / 2) * kLanes<T>;
  }

  template <int MR, int NV>
  NVPFLOW_INLINE void segment(const uint32_t* w, int64_t s, const T* x, int64_t x_stride, Vec<T> (&sum)[MR][NV]) const {
    const int64_t count = smaller(d.segment, d.in - s * d.segment);
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) step<MR, NV>(w, s, i, x, x_stride, sum);
    if (i < count) one<MR, NV>(w, s, i, x, x_stride, sum);
  }

  static constexpr int64_t kStep = 2;
  /// i: even.
  template <int MR, int NV>
  NVPFLOW_INLINE void step(const uint32_t* w, int64_t s, int64_t i, const T* x, int64_t x_stride,
                           Vec<T> (&sum)[MR][NV]) const {
    Vec<T> first[NV], second[NV];
    for (int n = 0; n < NV; ++n) load_pairs(words(w, s, i) + n * stride(), first[n], second[n]);
    x += s * d.segment + i;
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const Vec<T> input0 = set1(x[m * x_stride]), input1 = set1(x[m * x_stride + 1]);
      for (int n = 0; n < NV; ++n) sum[m][n] = fma(second[n], input1, fma(first[n], input0, sum[m][n]));
    }
  }
  /// Any one input.
  template <int MR, int NV>
  NVPFLOW_INLINE void one(const uint32_t* w, int64_t s, int64_t i, const T* x, int64_t x_stride,
                          Vec<T> (&sum)[MR][NV]) const {
    for (int n = 0; n < NV; ++n) {
      Vec<T> first, second;
      load_pairs(words(w, s, i) + n * stride(), first, second);
      const Vec<T> weight = i % 2 == 0 ? first : second;
      for (int m = 0; m < MR; ++m) sum[m][n] = fma(weight, set1(x[m * x_stride + s * d.segment + i]), sum[m][n]);
    }
  }
};

/// All S segments at once; total holds the first segment's start and ends with the sum of all.
template <class T, int MR, int NV, int S, class W>
NVPFLOW_INLINE void accumulate_segments(const W& weights, int64_t o, const T* x, int64_t x_stride,
                                        Vec<T> (&total)[MR][NV]) {
  const Dense<T>& d = weights.d;
  const auto* w = weights.block(o);
  Vec<T> sum[S][MR][NV];
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NV; ++n) {
      sum[0][m][n] = total[m][n];
      for (int s = 1; s < S; ++s) sum[s][m][n] = Vec<T>{};
    }
  }
  const int64_t last = d.in - (S - 1) * d.segment;  // the last segment may be shorter
  int64_t i = 0;
  for (; i + W::kStep <= last; i += W::kStep) {
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) weights.template step<MR, NV>(w, s, i, x, x_stride, sum[s]);
  }
  for (; i < d.segment; ++i) {
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      if (s + 1 < S || i < last) weights.template one<MR, NV>(w, s, i, x, x_stride, sum[s]);
    }
  }
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NV; ++n) {
      for (int s = 1; s < S; ++s) sum[0][m][n] = sum[0][m][n] + sum[s][m][n];
      total[m][n] = sum[0][m][n];
    }
  }
}

/// Where the sums of few rows begin: at the bias, one for all of them, or without one at y.
template <class T>
struct FewStart {
  const T* first;
  int64_t stride;

  FewStart(const Dense<T>& d, const T* y, int64_t y_stride)
      : first(d.bias == nullptr ? y : d.bias), stride(d.bias == nullptr ? y_stride : 0) {}
};

/// MR rows x NV vectors of outputs from o. S: segments at once, all or (1) one after the other.
template <class T, int MR, int NV, int S, class W>
NVPFLOW_INLINE void few_block(const W& weights, const FewStart<T>& start, int64_t o, const T* x, int64_t x_stride, T* y,
                              int64_t y_stride, Act act) {
  constexpr int L = kLanes<T>;
  const Dense<T>& d = weights.d;
  Vec<T> total[MR][NV];
  if (MR == 1 || start.stride == 0) {  // one load for all rows
    for (int n = 0; n < NV; ++n) {
      const Vec<T> first = load<T>(start.first + o + n * L);
      for (int m = 0; m < MR; ++m) total[m][n] = first;
    }
  } else {
    for (int n = 0; n < NV; ++n) {
      for (int m = 0; m < MR; ++m) total[m][n] = load<T>(start.first + m * start.stride + o + n * L);
    }
  }
  if constexpr (S == 1) {
    const auto* w = weights.block(o);
    weights.template segment<MR, NV>(w, 0, x, x_stride, total);
    for (int64_t s = 1; s * d.segment < d.in; ++s) {
      Vec<T> sum[MR][NV] = {};
      weights.template segment<MR, NV>(w, s, x, x_stride, sum);
      for (int m = 0; m < MR; ++m) {
        for (int n = 0; n < NV; ++n) total[m][n] = total[m][n] + sum[m][n];
      }
    }
  } else {
    accumulate_segments<T, MR, NV, S>(weights, o, x, x_stride, total);
  }
  const auto put = [&](auto&& finish) __attribute__((always_inline)) {
    for (int m = 0; m < MR; ++m) {
      for (int n = 0; n < NV; ++n) store<T>(y + m * y_stride + o + n * L, finish(total[m][n]));
    }
  };
  if (act == Act::relu) return put([](Vec<T> v) __attribute__((always_inline)) { return rectify<T>(v, Act::relu); });
  put([=](Vec<T> v) __attribute__((always_inline)) { return rectify<T>(v, act); });
}

/// MR rows; S: the layer's segments. Not inlined: in one large function gcc leaves the blocks' sums in memory.
template <class T, int MR, int S, class W>
NVPFLOW_NOINLINE void few_rows(const W& weights, const T* x, int64_t x_stride, T* y, int64_t y_stride, Act act) {
  const Dense<T>& d = weights.d;
  constexpr int L = kLanes<T>, kWide = few_vectors(MR);
  constexpr int kParallel = MR * S <= kFewSums ? S : 1;
  constexpr int kFitting = kFewSums / (MR * S);  // vectors of which all segments can be under way
  constexpr int kMiddle = kFitting < kWide / 2 ? kFitting : kWide / 2;
  const FewStart<T> start(d, y, y_stride);
  int64_t o = 0;
  for (; o + (kWide - 1) * L < d.out; o += kWide * L) {
    few_block<T, MR, kWide, 1>(weights, start, o, x, x_stride, y, y_stride, act);
  }
  if constexpr (kMiddle > 1) {
    for (; o + (kMiddle - 1) * L < d.out; o += kMiddle * L) {
      few_block<T, MR, kMiddle, kParallel>(weights, start, o, x, x_stride, y, y_stride, act);
    }
  }
  for (; o < d.out; o += L) few_block<T, MR, 1, kParallel>(weights, start, o, x, x_stride, y, y_stride, act);
}

/// MR rows.
template <class T, int MR, class W>
NVPFLOW_INLINE void dense_so_many_rows(const W& weights, const T* x, int64_t x_stride, T* y, int64_t y_stride,
                                       Act act) {
  const Dense<T>& d = weights.d;
  if constexpr (W::kCanFetchAhead && MR >= kFewSums / 2) {
    if (d.far) return few_rows<T, MR, 1>(FullWeights<T, true>{d}, x, x_stride, y, y_stride, act);
  }
  if constexpr (MR <= kFewSums / 2) {
    if (2 * d.segment < d.in) return few_rows<T, MR, 4>(weights, x, x_stride, y, y_stride, act);
    if (d.segment < d.in) return few_rows<T, MR, 2>(weights, x, x_stride, y, y_stride, act);
  }
  few_rows<T, MR, 1>(weights, x, x_stride, y, y_stride, act);
}

/// y[rows][out] = rectify(W^T x[rows][in] + c), row-major, for MR <= rows <= kMaxFewRows; whole vectors of y are
/// written. Without a bias the sums start from y.
template <class T, int MR = 1, class W>
void dense_few_rows(const W& weights, const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t rows, Act act) {
  if constexpr (MR < kMaxFewRows<T>) {
    if (rows > MR) return dense_few_rows<T, MR + 1>(weights, x, x_stride, y, y_stride, rows, act);
  }
  dense_so_many_rows<T, MR>(weights, x, x_stride, y, y_stride, act);
}

/// The same of either kind of weights, where every instruction of one row counts.
template <class T>
NVPFLOW_INLINE void dense_few_inlined(const Dense<T>& d, const T* x, int64_t x_stride, T* y, int64_t y_stride,
                                      int64_t rows, Act act) {
  if (d.narrow == nullptr && rows == 1) {
    return dense_so_many_rows<T, 1>(FullWeights<T>{d}, x, x_stride, y, y_stride, act);
  }
  if (d.narrow == nullptr) return dense_few_rows<T>(FullWeights<T>{d}, x, x_stride, y, y_stride, rows, act);
  if constexpr (sizeof(T) == 4) dense_few_rows<T>(NarrowWeights{d}, x, x_stride, y, y_stride, rows, act);
}

/// The same, one copy for all others.
template <class T>
NVPFLOW_NOINLINE void dense_few(const Dense<T>& d, const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t rows,
                                Act act) {
  dense_few_inlined<T>(d, x, x_stride, y, y_stride, rows, act);
}

}  // namespace
}  // namespace nvpflow::cpu
