/// @file
/// Adam's updates, for training loops of one's own.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include <nvpflow/export.h>
#include <nvpflow/flow.hpp>
#include <nvpflow/train.hpp>

namespace nvpflow {

/// What an update goes by, as in FitOptions.
struct NVPFLOW_API AdamOptions {
  /// The step size of this update.
  double learning_rate = 3e-3;
  /// Decoupled (AdamW), on kernels only.
  double weight_decay = 0;
  /// Largest Euclidean norm of the whole gradient; a longer one is scaled down to it. 0: no clipping.
  double clip_norm = 5.0;

  /// Calls visit(name, member, range) for every field.
  template <class Visit>
  static constexpr void fields(Visit&& visit) {
    visit("learning_rate", &AdamOptions::learning_rate, &SharedRanges::learning_rate);
    visit("weight_decay", &AdamOptions::weight_decay, &SharedRanges::weight_decay);
    visit("clip_norm", &AdamOptions::clip_norm, &SharedRanges::clip_norm);
  }

  /// Throws Error(invalid_argument) naming the field.
  void validate() const;
};

/// Adam for flows of one spec, whose steps are those of fit(). With fit()'s gradients a flow on the CPU gets fit()'s
/// weights, bit for bit. Steps are made on the host. Not for several threads at once.
class NVPFLOW_API Adam {
 public:
  /// That has made no step.
  explicit Adam(const Flow& flow);
  ~Adam();
  /// @{
  /// The other one is left without a state: it can only be assigned to or destroyed.
  Adam(Adam&&) noexcept;
  Adam& operator=(Adam&&) noexcept;
  /// @}
  Adam(const Adam&) = delete;
  Adam& operator=(const Adam&) = delete;

  /// Updates the flow's kernels and biases by a gradient of num_parameters() elements. What is not trained stays, and
  /// so does mean_low(); the threshold goes. Returns the gradient's norm before clipping. Throws
  /// Error(invalid_argument) for another size, Error(type_mismatch) for another dtype, and Error(not_finite) where the
  /// norm is not finite. Nothing has changed then.
  template <class T>
  double step(Flow& flow, std::span<const T> gradient, const AdamOptions& options = {});

  /// A copy of what fit() goes on from. Passes are counted by fit() alone.
  AdamState state() const;
  /// Goes on from a state; Error(invalid_argument) where it is of other parameters.
  void set_state(const AdamState& state);

 private:
  struct Steps;
  std::unique_ptr<Steps> steps_;
};

}  // namespace nvpflow
