// What one Adam update computes with. Kernels include it, also those built with instruction-set flags and by nvcc: no
// function, no header of the standard library.
#pragma once

namespace nvpflow {

/// What an Adam update needs besides the arrays; coefficients() in training.hpp makes it.
struct AdamCoefficients {
  double beta1 = 0, beta2 = 0, epsilon = 0, gradient_factor = 1;
  double step_size = 0;        // learning_rate / (1 - beta1^t)
  double root_correction = 0;  // 1 / sqrt(1 - beta2^t)
  double decay = 0;            // learning_rate * weight_decay
};

}  // namespace nvpflow
