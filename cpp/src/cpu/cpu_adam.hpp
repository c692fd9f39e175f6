// Adam on arrays of the host: the moments of one set of parameters, and the update.
#pragma once

#include <nvpflow/spec.hpp>

#include "../memory.hpp"
#include "../training.hpp"
#include "kernels.hpp"

namespace nvpflow::cpu {

template <class T>
class CpuAdam {
 public:
  /// Of parameters that have made no step.
  CpuAdam(const ParamLayout& layout, int threads);

  /// Updates kernels and biases by the gradient, scaled down to clip_norm where it is longer (0: never). Returns its
  /// norm before that, in float64; where that is not finite nothing has changed.
  double update(const AdamStep& step, double clip_norm, const T* gradient, T* parameters);

  T* first_moment() { return first_moment_.data(); }
  T* second_moment() { return second_moment_.data(); }

 private:
  double sum_of_squares(const T* values, std::int64_t count) const;

  const ParamLayout layout_;
  const Kernels<T>& kernels_;
  int threads_;
  AlignedVector<T> first_moment_, second_moment_;
};

}  // namespace nvpflow::cpu
