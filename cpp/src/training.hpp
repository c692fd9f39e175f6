// The optimiser's side of a training run: what a backend offers to the training loop.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

#include "adam_coefficients.hpp"
#include "row_order.hpp"

namespace nvpflow {

/// Adam with decoupled weight decay (Kingma and Ba 2015; Loshchilov and Hutter 2019).
struct AdamStep {
  double learning_rate = 1e-3;   ///< the schedule's, at this step
  double beta1 = 0.9;            ///< decay of the first moment
  double beta2 = 0.999;          ///< decay of the second moment
  double epsilon = 1e-8;         ///< added to the root of the second moment
  double weight_decay = 0.0;     ///< share of each kernel that is taken off, times learning_rate
  std::int64_t step = 1;         ///< 1 for the first update: bias correction
  double gradient_factor = 1.0;  ///< multiplies every gradient first (norm clipping)
};

inline AdamCoefficients coefficients(const AdamStep& step) {
  const auto t = static_cast<double>(step.step);
  return {step.beta1,
          step.beta2,
          step.epsilon,
          step.gradient_factor,
          step.learning_rate / (1 - std::pow(step.beta1, t)),
          1 / std::sqrt(1 - std::pow(step.beta2, t)),
          step.learning_rate * step.weight_decay};
}

/// Half a cosine from `rate` at progress 0 to 0 at 1.
inline double cosine(double rate, double progress) { return rate * 0.5 * (1 + std::cos(std::numbers::pi * progress)); }

/// Rows of a training run, in the host's memory; they outlive it.
struct TrainingData {
  const void* x = nullptr;                     ///< [rows, D]
  std::int64_t rows = 0;                       ///< of x
  const void* validation = nullptr;            ///< null: none of its own
  std::int64_t validation_rows = 0;            ///< of validation
  const void* context = nullptr;               ///< [rows, C], of the flow's dtype; null: the flow has none
  const void* validation_context = nullptr;    ///< [validation_rows, C]
  const double* weights = nullptr;             ///< [rows], above 0, of mean 1 over those trained on; null: all are 1
  const double* validation_weights = nullptr;  ///< [validation_rows]
};

/// What the work since the last report came to.
struct TrainingReport {
  double sum_log_prob = 0;    ///< by weight, over all rows since then, float64
  double gradient_norm = 0;   ///< of the last update, before clipping
  std::int64_t bad_step = 0;  ///< AdamStep::step of the first update that was refused; 0: none
  bool bad_loss = false;      ///< because of its loss, else of its gradient's norm
  double bad_value = 0;       ///< what that was: NaN or infinite
};

/// A training run's data, parameters, gradient and moments, kept where the backend wants them, and packed parameters of
/// its own, so that calls on the flow meanwhile see the old ones. One thread at a time, in the mode of float_mode.hpp.
class Training {
 public:
  virtual ~Training() = default;

  /// Forms the gradient of -(1 / total_rows) times the sum by weight of log p over rows order(first), ...,
  /// order(first + count - 1) of x; with `accumulate` adds to the one before: a batch may come in slices.
  virtual void gradient(const RowOrder& order, std::int64_t first, std::int64_t count, std::int64_t total_rows,
                        bool accumulate) = 0;
  /// What the calls of gradient() since the last that did not accumulate came to: an array [ParamLayout::size()] of the
  /// host, valid until the next call, and the sum by weight of log p.
  struct HostGradient {
    void* values;
    double sum_log_prob;
  };
  virtual HostGradient read_gradient() = 0;
  /// Takes over what the array of the last read_gradient() was changed to, and the sum over a batch of so many rows.
  virtual void write_gradient(double sum_log_prob, std::int64_t total_rows) = 0;
  /// One Adam update of kernels and biases by that gradient, scaled down to clip_norm where it is longer (0: never);
  /// weight_decay acts on kernels only. Where the batch's loss or the gradient's norm is not finite it is refused, as
  /// is every later one.
  virtual void update(const AdamStep& step, double clip_norm) = 0;
  /// Adds log p by weight of rows of x, or of the validation rows, to the report's sum.
  virtual void add_log_prob(bool validation, const RowOrder& order, std::int64_t first, std::int64_t count) = 0;

  /// Waits for all of the above.
  virtual TrainingReport report() = 0;
  /// Updates worth queueing between two reports; 1: work is done when its call returns, a report costs nothing.
  virtual std::int64_t steps_per_report() const = 0;

  /// Flat arrays in the host's memory, valid until the next call. Changes of them count after write().
  struct Arrays {
    void* parameters;     ///< [ParamLayout::size()]
    void* first_moment;   ///< the same; of no meaning where moments were not asked for
    void* second_moment;  ///< the same
  };
  /// The parameters, with `moments` also what Adam remembers.
  virtual Arrays read(bool moments) = 0;
  /// Takes over what was changed in the arrays of the last read().
  virtual void write() = 0;
};

}  // namespace nvpflow
