// Kernels of the training loop that are no part of the model: the order of the rows, and what a step came to.
#pragma once

#include <cstdint>

#include "../cpp/src/row_order.hpp"
#include "kernels.hpp"

namespace nvpflow::cuda {

/// Numbers of a training run that stay on the device between two reports.
struct StepState {
  double sum_log_prob = 0;    // since the last report
  double norm_squared = 0;    // of the last gradient; NaN once a step has been refused, so that Adam does nothing
  double gradient_norm = 0;   // of the last step that was judged
  std::int64_t bad_step = 0;  // the first that was refused; 0: none
  std::int32_t bad_loss = 0;
  double bad_value = 0;
};

/// index[i] = order(first + i) for i < count.
Status launch_row_order(const RowOrder& order, std::int64_t first, std::int64_t count, std::int64_t* index,
                        Stream stream);

/// Ends the gradient of a batch: the sum of its slices' log-densities counts where it and state->norm_squared are
/// finite; else step `step` is refused.
Status launch_judge(StepState* state, const double* slice_sums, std::int64_t slices, std::int64_t rows,
                    std::int64_t step, Stream stream);

}  // namespace nvpflow::cuda
