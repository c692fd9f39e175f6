// The order of the rows: 8 B written and some 60 integer operations a row, bound by arithmetic, microseconds for a
// batch. The judgement of a step: one thread, a launch's latency.

#include "training_steps.hpp"

#include "elementary.cuh"

namespace nvpflow::cuda {
namespace {

constexpr int kOrderThreads = 256;

NVPFLOW_KERNEL(kOrderThreads)
row_order_kernel(RowOrder order, std::int64_t first, std::int64_t count, std::int64_t* index) {
  const std::int64_t step = static_cast<std::int64_t>(num_blocks()) * num_threads();
  for (std::int64_t i = static_cast<std::int64_t>(block_index()) * num_threads() + thread_index(); i < count; i += step)
    index[i] = order(first + i);
}

NVPFLOW_KERNEL(kWarp)
judge_kernel(StepState* state, const double* slice_sums, std::int64_t slices, std::int64_t rows, std::int64_t step) {
  if (thread_index() != 0) return;
  double sum = 0;
  for (std::int64_t i = 0; i < slices; ++i) sum += slice_sums[i];
  const double loss = -sum / static_cast<double>(rows);
  const double norm = square_root(state->norm_squared);
  const bool refused_before = state->bad_step != 0;
  if (!refused_before && is_finite(loss)) state->gradient_norm = norm;
  if (!refused_before && is_finite(loss) && is_finite(norm)) {
    state->sum_log_prob += sum;
    return;
  }
  if (!refused_before) {
    state->bad_step = step;
    state->bad_loss = is_finite(loss) ? 0 : 1;
    state->bad_value = is_finite(loss) ? norm : loss;
  }
  state->norm_squared = not_a_number<double>();
}

}  // namespace

Status launch_row_order(const RowOrder& order, std::int64_t first, std::int64_t count, std::int64_t* index,
                        Stream stream) {
  const std::int64_t blocks = count < 1024 * kOrderThreads ? ceil_div(count, kOrderThreads) : 1024;
  return launch(row_order_kernel, blocks, kOrderThreads, 0, stream, order, first, count, index);
}

Status launch_judge(StepState* state, const double* slice_sums, std::int64_t slices, std::int64_t rows,
                    std::int64_t step, Stream stream) {
  return launch(judge_kernel, 1, kWarp, 0, stream, state, slice_sums, slices, rows, step);
}

Status probe_kernels() {
#if defined(NVPFLOW_SIMT)
  return 0;
#else
  cudaFuncAttributes attributes;
  return static_cast<Status>(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(row_order_kernel)));
#endif
}

}  // namespace nvpflow::cuda
