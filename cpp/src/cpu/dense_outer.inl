// KERNEL: the gradient of a dense layer's weights: the products of its inputs and of its outputs' cotangents, summed
// over the rows of a tile. A register block is kGradientIn inputs x kGradientOut vectors of outputs and reads
// kGradientIn + kGradientOut values a row for kGradientIn * kGradientOut multiply-adds; where the outputs fill one
// vector only, inputs and outputs change places, or, of few inputs, kNarrowIn inputs x 1.
#pragma once

#include <stdint.h>

#include "blocks.hpp"
#include "kernels.hpp"
#include "simd.hpp"
#include "tile.inl"

namespace nvpflow::cpu {
namespace {

// Rows of the tape from the one that is multiplied to those that are fetched meanwhile: each row of a block lies in a
// page of its own where layers are wide, and the processor's own prefetching ends with the page.
constexpr int64_t kRowsAhead = 16;
// Columns of a kernel's gradient from which on a block's rows are fetched also where they are only written: fewer lie
// near each other, and the processor fetches them by itself.
constexpr int64_t kWideGradient = 256;
// Where kSavesSecondCache: inputs of a band, in whole register blocks; inputs from which on a copy of the cotangents
// pays; bytes from row to row that, as their multiples do, leave few places of the first cache to a column.
constexpr int64_t kInputBand = 120, kCopyInputs = 32, kFewPlaces = 1024;
constexpr int kLineBytes = 64;
// Use outer_exchanged from this many vectors of inputs on: below, its transposition costs more than it brings.
constexpr int64_t kManyInputs = 2;

/// A dense layer's part of the flat gradient. Its columns may lie in several tensors, one after the other: the heads'.
template <class T>
struct Columns {
  T* to[kMaxHeads];      // element 0 of each
  int64_t n[kMaxHeads];  // columns of each; the others may be 0
  bool add;              // to what is there; else what is there is replaced

  /// Fetches what put() will write: MI rows from i, NO vectors from column o. A block's rows lie a page or so apart,
  /// where the processor fetches nothing by itself.
  template <int MI, int NO>
  NVPFLOW_INLINE void fetch(int64_t i, int64_t o) const {
    for (int k = 0; k < NO; ++k, o += kLanes<T>) {
      const int part = part_of(o);
      const int64_t width = n[part];
      const T* p = to[part] + i * width + (o - begin_of(part));
      for (int m = 0; m < MI; ++m) __builtin_prefetch(p + m * width, 1);
    }
  }

  /// v[m][k] to NO vectors of columns from o of row i + m; of the last ones those columns that there are.
  template <int MI, int NO>
  NVPFLOW_INLINE void put(int64_t i, int64_t o, const Vec<T> (&v)[MI][NO]) const {
    constexpr int64_t kColumns = NO * kLanes<T>;
    if (o + kColumns <= n[0]) return put_whole(to[0] + i * n[0] + o, n[0], v);
    const int part = part_of(o);
    const int64_t within = o - begin_of(part);
    if (within + kColumns <= n[part]) return put_whole(to[part] + i * n[part] + within, n[part], v);
    Vec<T> waiting[MI][NO];  // a copy, or the sums would have to be in memory all the time
#pragma GCC unroll 16
    for (int m = 0; m < MI; ++m) {
      for (int k = 0; k < NO; ++k) waiting[m][k] = v[m][k];
    }
    for (int k = 0; k < NO; ++k, o += kLanes<T>) put_column(i, o, &waiting[0][k], MI, NO);
  }

 private:
  template <int MI, int NO>
  NVPFLOW_INLINE void put_whole(T* p, int64_t stride, const Vec<T> (&v)[MI][NO]) const {
#pragma GCC unroll 16
    for (int m = 0; m < MI; ++m) {
      for (int k = 0; k < NO; ++k) {
        T* at = p + m * stride + k * kLanes<T>;
        store<T>(at, add ? load<T>(at) + v[m][k] : v[m][k]);
      }
    }
  }

  /// The tensor of column o, and the first column of a tensor.
  NVPFLOW_INLINE int part_of(int64_t o) const { return o < n[0] ? 0 : o < n[0] + n[1] ? 1 : 2; }
  NVPFLOW_INLINE int64_t begin_of(int part) const { return (part > 0 ? n[0] : 0) + (part > 1 ? n[1] : 0); }

  /// One vector of columns from o of `count` rows from i: v[0], v[distance], and so on.
  NVPFLOW_NOINLINE void put_column(int64_t i, int64_t o, const Vec<T>* v, int count, int distance) const {
    const int part = part_of(o);
    const int64_t width = n[part], within = o - begin_of(part);
    if (within + kLanes<T> <= width) {
      T* at = to[part] + i * width + within;
      for (int m = 0; m < count; ++m, at += width, v += distance) store<T>(at, add ? load<T>(at) + *v : *v);
    } else {
      for (int m = 0; m < count; ++m, v += distance) put_lanes(i + m, o, *v);
    }
  }

  void put_lanes(int64_t i, int64_t o, Vec<T> v) const {
    int64_t begin = 0;
    for (int part = 0; part < kMaxHeads; begin += n[part], ++part) {
      const int64_t first = o > begin ? 0 : begin - o;  // lanes that belong to the tensor
      const int64_t last = smaller(kLanes<T>, begin + n[part] - o);
      if (first < last) put_part(to[part] + i * n[part] + (o - begin), v, first, last);
    }
  }
  void put_part(T* p, Vec<T> v, int64_t begin, int64_t end) const {
    store_lanes<T>(p, add ? load_lanes<T>(p, begin, end) + v : v, begin, end);
  }
};

/// Rows x and g of a tile: x [count][in] and g [count][out], row-major; every `rows` of them lie on a tape of their
/// own, a distance from the one before.
template <class T>
struct OuterProduct {
  const T* x;
  int64_t x_stride;
  const T* g;
  int64_t g_stride;
  int64_t count, rows, x_tape_stride, g_tape_stride;
  int64_t out;
};

/// Where a dense layer's two gradients go.
template <class T>
struct DenseColumns {
  Columns<T> kernel, bias;
};

/// sum[m][n] = the sum over the rows of x g for inputs i + m and vector n of outputs from o; each(n, g): every vector
/// of cotangents on the way.
template <class T, int MI, int NO, class Each>
NVPFLOW_INLINE void outer_sums(const OuterProduct<T>& p, int64_t i, int64_t o, Vec<T> (&sum)[MI][NO], Each each) {
  constexpr int L = kLanes<T>;
  const T *x_tape = p.x + i, *g_tape = p.g + o;
  for (int64_t first = 0; first < p.count; first += p.rows, x_tape += p.x_tape_stride, g_tape += p.g_tape_stride) {
    const T *x = x_tape, *g = g_tape;
    const int64_t here = smaller(p.rows, p.count - first);
    for (int64_t r = 0; r < here; ++r, x += p.x_stride, g += p.g_stride) {
      Vec<T> cotangent[NO];
      __builtin_prefetch(x + kRowsAhead * p.x_stride);
      for (int n = 0; n < NO; ++n) {
        if (n * kVectorBytes % kLineBytes == 0) __builtin_prefetch(g + kRowsAhead * p.g_stride + n * L);
        cotangent[n] = load<T>(g + n * L);
        each(n, cotangent[n]);
      }
#pragma GCC unroll 16
      for (int m = 0; m < MI; ++m) {
        const Vec<T> input = set1(x[m]);
        for (int n = 0; n < NO; ++n) sum[m][n] = fma(input, cotangent[n], sum[m][n]);
      }
    }
  }
}

/// Inputs i .. i + MI x NO vectors of outputs from o: the sum over the rows of x g. With `bias`, also that of g.
template <class T, int MI, int NO, bool bias>
NVPFLOW_NOINLINE void outer_block(const OuterProduct<T>& p, int64_t i, int64_t o, const DenseColumns<T>& to) {
  if (to.kernel.add || to.kernel.n[0] > kWideGradient) to.kernel.template fetch<MI, NO>(i, o);
  Vec<T> sum[MI][NO] = {}, bias_sum[1][NO] = {};
  outer_sums<T, MI, NO>(p, i, o, sum, [&](int n, Vec<T> g) __attribute__((always_inline)) {
    if constexpr (bias) bias_sum[0][n] = bias_sum[0][n] + g;
  });
  to.kernel.put(i, o, sum);
  if constexpr (bias) to.bias.put(0, o, bias_sum);
}

/// Only the sum of g, of one vector of outputs from o.
template <class T>
void sum_cotangents(const OuterProduct<T>& p, int64_t o, const Columns<T>& to) {
  Vec<T> sum[1][1] = {};
  Vec<T> none[1][1] = {};
  outer_sums<T, 1, 1>(p, 0, o, none, [&](int, Vec<T> g) __attribute__((always_inline)) { sum[0][0] = sum[0][0] + g; });
  to.put(0, o, sum);
}

template <class T, int MI, int NO>
NVPFLOW_INLINE void outer_inputs(const OuterProduct<T>& p, int64_t i, int64_t o, const DenseColumns<T>& to) {
  if (i == 0) return outer_block<T, MI, NO, true>(p, i, o, to);
  outer_block<T, MI, NO, false>(p, i, o, to);
}

/// Inputs first .. last, NO vectors of outputs from o; they stay in the first cache while the inputs go on.
template <class T, int MI, int NO>
void outer_columns(const OuterProduct<T>& p, int64_t first, int64_t last, int64_t o, const DenseColumns<T>& to) {
  // A block of six does not leave one, two or five inputs, of which fours and threes take more at once.
  const auto fits = [&](int64_t left) __attribute__((always_inline)) {
    return left >= 0 && (MI != 6 || (left != 1 && left != 2 && left != 5));
  };
  int64_t i = first;
  for (; fits(last - i - MI); i += MI) outer_inputs<T, MI, NO>(p, i, o, to);
  if constexpr (MI > 4) {
    for (; i + 4 <= last; i += 4) outer_inputs<T, 4, NO>(p, i, o, to);
  }
  if constexpr (MI == 6) {
    for (; i + 3 <= last; i += 3) outer_inputs<T, 3, NO>(p, i, o, to);
  }
  for (; i < last; ++i) outer_inputs<T, 1, NO>(p, i, o, to);
}

/// outer_columns that reads a copy of the cotangents, one row behind the other.
template <class T, int MI, int NO>
void outer_columns_of_copy(const OuterProduct<T>& p, int64_t first, int64_t last, int64_t o,
                           const DenseColumns<T>& to) {
  constexpr int64_t L = kLanes<T>, kWidth = NO * L;
  alignas(kLineBytes) T copy[kMaxGradientUnits * kGradientUnit * kWidth];
  T* at = copy;
  const T* tape = p.g + o;
  for (int64_t begin = 0; begin < p.count; begin += p.rows, tape += p.g_tape_stride) {
    const T* g = tape;
    const int64_t here = smaller(p.rows, p.count - begin);
    for (int64_t r = 0; r < here; ++r, g += p.g_stride, at += kWidth) {
      for (int n = 0; n < NO; ++n) store<T>(at + n * L, load<T>(g + n * L));
    }
  }
  OuterProduct<T> copied = p;
  copied.g = copy - o;
  copied.g_stride = kWidth;
  copied.g_tape_stride = p.rows * kWidth;
  outer_columns<T, MI, NO>(copied, first, last, o, to);
}

/// to[output][stride]: the sums for NI vectors of inputs from i; p: with inputs and outputs exchanged.
template <class T, int NI>
void outer_by_output(const OuterProduct<T>& p, int64_t outputs, int64_t i, T* to, int64_t stride) {
  constexpr int L = kLanes<T>;
  int64_t o = 0;
  const auto block = [&](auto count) __attribute__((always_inline)) {
    constexpr int n = decltype(count)::value;
    Vec<T> sum[n][NI] = {};
    outer_sums<T, n, NI>(p, o, i, sum, [](int, Vec<T>) __attribute__((always_inline)) {});
#pragma GCC unroll 16
    for (int m = 0; m < n; ++m) {
      for (int k = 0; k < NI; ++k) store<T>(to + (o + m) * stride + k * L, sum[m][k]);
    }
    o += n;
  };
  // The last block may go beyond the outputs, but not beyond their vector.
  constexpr int kMost = kExchangedOut < L ? kExchangedOut : L;
  while (outputs - o > kMost / 2) block(Count<kMost>{});
  if (o < outputs) block(Count<kMost / 2>{});
}

/// Inputs i .. i + inputs of columns [o, o + outputs), whose sums lie by output, `stride` apart, to where they belong.
/// In runs as long as there are: the rows of a narrow kernel follow each other.
template <class T>
void put_by_input(const T* by_output, int64_t stride, int64_t outputs, int64_t i, int64_t inputs, int64_t o,
                  const Columns<T>& to) {
  constexpr int L = kLanes<T>;
  alignas(64) T by_input[kExchangedIn * L * L];
  int64_t begin = 0;
  for (int part = 0; part < kMaxHeads; begin += to.n[part], ++part) {
    const int64_t width = to.n[part], first = o > begin ? o : begin;
    const int64_t columns = smaller(o + outputs, begin + width) - first;
    if (columns <= 0) continue;
    gather_tile<T>([&](int64_t n) { return by_output + (first - o + n) * stride; }, columns, inputs, by_input, columns);
    const int64_t rows = columns == width ? 1 : inputs, run = inputs / rows * columns;
    T* at = to.to[part] + i * width + (first - begin);
    for (int64_t r = 0; r < rows; ++r, at += width) {
      for (int64_t n = 0; n < run; n += L) {
        const Vec<T> sum = load_upto<T>(by_input + r * run + n, run - n);
        store_upto<T>(at + n, to.add ? load_upto<T>(at + n, run - n) + sum : sum, run - n);
      }
    }
  }
}

/// The last vector of outputs, from o, where the inputs are many: vectors of inputs times single outputs, of which each
/// serves several multiply-adds, while a single vector of outputs serves one for each input that is read. Lanes without
/// an output are not computed either. The sums are the same ones, in the same order.
template <class T>
void outer_exchanged(const OuterProduct<T>& p, int64_t first, int64_t last, int64_t o, const DenseColumns<T>& to) {
  constexpr int L = kLanes<T>;
  constexpr int64_t kStride = int64_t{kExchangedIn} * L;
  const OuterProduct<T> exchanged = {p.g + o,         p.g_stride,      p.x, p.x_stride, p.count, p.rows,
                                     p.g_tape_stride, p.x_tape_stride, last};
  const int64_t outputs = p.out - o;
  alignas(64) T by_output[L * kStride];
  for (int64_t i = first, inputs = 0; i < last; i += inputs) {
    const int64_t vectors = (last - i + L - 1) / L;
    const int64_t now = vectors >= kExchangedIn && vectors != kExchangedIn + 1 ? kExchangedIn : smaller(2, vectors);
    inputs = smaller(now * L, last - i);
    if (now > 2) {
      outer_by_output<T, kExchangedIn>(exchanged, outputs, i, by_output, kStride);
    } else if (now == 2) {
      outer_by_output<T, 2>(exchanged, outputs, i, by_output, kStride);
    } else {
      outer_by_output<T, 1>(exchanged, outputs, i, by_output, kStride);
    }
    put_by_input<T>(by_output, kStride, outputs, i, inputs, o, to.kernel);
  }
  if (first == 0) sum_cotangents<T>(p, o, to.bias);
}

/// Of inputs that are all taken before the next outputs.
template <class T>
void outer_band(const OuterProduct<T>& p, int64_t first, int64_t last, const DenseColumns<T>& to) {
  constexpr int L = kLanes<T>;
  int64_t o = 0;
  if constexpr (kSavesSecondCache) {
    const bool fights = p.g_stride * static_cast<int64_t>(sizeof(T)) % kFewPlaces == 0;
    for (; fights && last - first >= kCopyInputs && o + (kGradientOut - 1) * L < p.out; o += kGradientOut * L) {
      outer_columns_of_copy<T, kGradientIn, kGradientOut>(p, first, last, o, to);
    }
  }
  for (; o + (kGradientOut - 1) * L < p.out; o += kGradientOut * L) {
    outer_columns<T, kGradientIn, kGradientOut>(p, first, last, o, to);
  }
  if constexpr (kGradientOut > 2) {
    if (o + L < p.out) {
      outer_columns<T, kGradientIn, 2>(p, first, last, o, to);
      o += 2 * L;
    }
  }
  if (o >= p.out) return;
  if (last - first >= kManyInputs * L) return outer_exchanged<T>(p, first, last, o, to);
  outer_columns<T, kNarrowIn, 1>(p, first, last, o, to);
}

/// The bias goes with input 0.
template <class T>
void outer_product(const OuterProduct<T>& p, int64_t first, int64_t last, const DenseColumns<T>& to) {
  int64_t i = first;
  if constexpr (kSavesSecondCache) {
    for (; last - i >= kInputBand + kInputBand / 2; i += kInputBand) outer_band<T>(p, i, i + kInputBand, to);
  }
  outer_band<T>(p, i, last, to);
}

}  // namespace
}  // namespace nvpflow::cpu
