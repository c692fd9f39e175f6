// KERNEL: standard normal noise, sums over rows in float64, elementary functions for the tests.
//
// Noise: one Philox call gives 4 float or 2 double normals; about 30 integer and 40 floating-point operations a pair,
// 4 bytes written a float: bound by arithmetic on recent devices, near the memory's rate. Sums: 4 bytes read a float,
// bound by memory. A sum adds 4,096 values a block in a fixed tree, then the blocks' sums in another: its bits depend
// only on the values and their number.

#include "gaussian.cuh"

#include <algorithm>

namespace nvpflow::cuda {
namespace {

constexpr int kSumValues = 4096;  // of one block

template <class T>
NVPFLOW_KERNEL(kThreads)
noise_kernel(const std::int64_t features, const std::uint64_t seed, const std::uint64_t first_row,
             const std::int64_t rows, T* z) {
  constexpr int kColumns = kNoiseColumns<T>;
  const std::int64_t width = ceil_div(features, kColumns), size = rows * width;
  for (std::int64_t e = first_element(); e < size; e += element_step()) {
    const std::int64_t r = e / width, block = e - r * width;
    T normals[kColumns];
    noise_block(seed, first_row + static_cast<std::uint64_t>(r), static_cast<unsigned>(block), normals);
    NVPFLOW_UNROLL
    for (int i = 0; i < kColumns; ++i) {
      const std::int64_t f = block * kColumns + i;
      if (f < features) z[r * features + f] = normals[i];
    }
  }
}

/// Sum over the block's threads, in a fixed tree; in thread 0: only that thread may read it without another barrier.
NVPFLOW_DEVICE double sum_over_block(double value) {
  double* partial = reinterpret_cast<double*>(shared_memory());
  partial[thread_index()] = value;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    block_barrier();
    if (thread_index() < width) partial[thread_index()] += partial[thread_index() + width];
  }
  return thread_index() == 0 ? partial[0] : 0.0;
}

template <class T, bool kSquares>
NVPFLOW_KERNEL(kThreads)
sum_kernel(const T* values, const std::int64_t count, double* sums) {
  const std::int64_t first = static_cast<std::int64_t>(block_index()) * kSumValues;
  double sum = 0;
  for (int i = thread_index(); i < kSumValues; i += kThreads) {
    if (first + i >= count) break;
    const double v = static_cast<double>(values[first + i]);
    sum = kSquares ? multiply_add(v, v, sum) : sum + v;
  }
  sum = sum_over_block(sum);
  if (thread_index() == 0) sums[block_index()] = sum;
}

NVPFLOW_KERNEL(kThreads)
total_kernel(const double* sums, const std::int64_t count, const bool accumulate, double* result) {
  double sum = 0;
  for (std::int64_t i = thread_index(); i < count; i += kThreads) sum += sums[i];
  sum = sum_over_block(sum);
  if (thread_index() == 0) *result = accumulate ? *result + sum : sum;
}

template <class T, bool kSquares>
Status launch_sum_of(const T* values, std::int64_t count, bool accumulate, double* result, void* workspace,
                     Stream stream) {
  constexpr std::int64_t kShared = kThreads * sizeof(double);
  const std::int64_t blocks = ceil_div(count, kSumValues);
  auto* sums = static_cast<double*>(workspace);
  if (const Status s = launch(sum_kernel<T, kSquares>, blocks, kThreads, kShared, stream, values, count, sums))
    return s;
  const double* partial = sums;
  return launch(total_kernel, 1, kThreads, kShared, stream, partial, blocks, accumulate, result);
}

template <class T>
NVPFLOW_DEVICE T evaluate_function(Function function, T x) {
  switch (function) {
    case Function::exp:
      return exponential(x);
    case Function::tanh:
      return hyperbolic_tangent(x);
    case Function::sigmoid:
      return sigmoid(x);
    case Function::softplus:
      return softplus(x);
    case Function::gelu:
      return gelu(x);
    case Function::silu:
      return silu(x);
    case Function::elu:
      return elu(x);
    case Function::log:
      return logarithm(x);
    case Function::sin_quarter:
      return sin_quarter(x);
    default:
      return cos_quarter(x);
  }
}

template <class T>
NVPFLOW_KERNEL(kThreads)
elementary_kernel(const Function function, const T* in, T* out, const std::int64_t count) {
  for (std::int64_t i = first_element(); i < count; i += element_step()) {
    out[i] = evaluate_function(function, in[i]);
  }
}

}  // namespace

template <class T>
Status launch_noise(std::int64_t input_size, std::uint64_t seed, std::uint64_t first_row, std::int64_t rows, T* z,
                    Stream stream) {
  const std::int64_t calls = rows * ceil_div(input_size, kNoiseColumns<T>);
  return launch(noise_kernel<T>, element_blocks(calls), kThreads, 0, stream, input_size, seed, first_row, rows, z);
}

std::int64_t sum_workspace_bytes(std::int64_t count) {
  return static_cast<std::int64_t>(sizeof(double)) *
         std::max<std::int64_t>(2, round_up(ceil_div(count, kSumValues), 2));
}

template <class T>
Status launch_sum(const T* values, std::int64_t count, bool accumulate, double* result, void* workspace,
                  Stream stream) {
  return launch_sum_of<T, false>(values, count, accumulate, result, workspace, stream);
}

template <class T>
Status launch_sum_of_squares(const T* values, std::int64_t count, bool accumulate, double* result, void* workspace,
                             Stream stream) {
  return launch_sum_of<T, true>(values, count, accumulate, result, workspace, stream);
}

template <class T>
Status launch_elementary(Function function, const T* in, T* out, std::int64_t count, Stream stream) {
  return launch(elementary_kernel<T>, element_blocks(count), kThreads, 0, stream, function, in, out, count);
}

#define NVPFLOW_INSTANTIATE(T)                                                                        \
  template Status launch_noise(std::int64_t, std::uint64_t, std::uint64_t, std::int64_t, T*, Stream); \
  template Status launch_sum(const T*, std::int64_t, bool, double*, void*, Stream);                   \
  template Status launch_sum_of_squares(const T*, std::int64_t, bool, double*, void*, Stream);        \
  template Status launch_elementary(Function, const T*, T*, std::int64_t, Stream);
NVPFLOW_INSTANTIATE(float)
NVPFLOW_INSTANTIATE(double)
#undef NVPFLOW_INSTANTIATE

}  // namespace nvpflow::cuda
