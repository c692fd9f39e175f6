// KERNEL: sums over rows or parameters in float64: 4 bytes read a float, bound by memory.
//
// A sum adds kSumValues values a block in a fixed tree, then the blocks' sums in another: its bits depend on the values
// and their number only.

#include "device.cuh"

namespace nvpflow::cuda {
namespace {

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
sum_kernel(const T* values, const RowWeights weights, const std::int64_t count, double* sums) {
  const std::int64_t first = static_cast<std::int64_t>(block_index()) * kSumValues;
  double sum = 0;
  for (int i = thread_index(); i < kSumValues; i += kThreads) {
    if (first + i >= count) break;
    const double v = static_cast<double>(values[first + i]);
    sum = kSquares ? multiply_add(v, v, sum) : multiply_add(weights(first + i), v, sum);
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
Status launch_sum_of(const T* values, const RowWeights& weights, std::int64_t count, bool accumulate, double* result,
                     void* workspace, Stream stream) {
  constexpr std::int64_t kShared = kThreads * sizeof(double);
  const std::int64_t blocks = ceil_div(count, kSumValues);
  auto* sums = static_cast<double*>(workspace);
  if (const Status s = launch(sum_kernel<T, kSquares>, blocks, kThreads, kShared, stream, values, weights, count, sums))
    return s;
  const double* partial = sums;
  return launch(total_kernel, 1, kThreads, kShared, stream, partial, blocks, accumulate, result);
}

}  // namespace

template <class T>
Status launch_sum(const T* values, const RowWeights& weights, std::int64_t count, bool accumulate, double* result,
                  void* workspace, Stream stream) {
  return launch_sum_of<T, false>(values, weights, count, accumulate, result, workspace, stream);
}

template <class T>
Status launch_sum_of_squares(const T* values, std::int64_t count, bool accumulate, double* result, void* workspace,
                             Stream stream) {
  return launch_sum_of<T, true>(values, {}, count, accumulate, result, workspace, stream);
}

#define NVPFLOW_INSTANTIATE(T)                                                                         \
  template Status launch_sum(const T*, const RowWeights&, std::int64_t, bool, double*, void*, Stream); \
  template Status launch_sum_of_squares(const T*, std::int64_t, bool, double*, void*, Stream);
NVPFLOW_INSTANTIATE(float)
NVPFLOW_INSTANTIATE(double)
#undef NVPFLOW_INSTANTIATE

}  // namespace nvpflow::cuda
