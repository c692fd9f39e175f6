// What the files of kernels share on the host's side.
#pragma once

#include "kernels.cuh"

namespace nvpflow::cuda {

Multiply choose_multiply(bool float64, const Device& device, Precision precision, bool force_fma);

Status prepare_transform(const Device& device);
Status prepare_gradient(const Device& device);

}  // namespace nvpflow::cuda
