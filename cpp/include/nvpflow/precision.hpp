/// @file
/// How products are rounded on a CUDA device. The kernels include it, so it includes nothing.
#pragma once

namespace nvpflow {

/// How products of float32 values are formed on a CUDA device. float32 keeps the budget of the CPU; tf32 and bfloat16
/// round the factors to 11 and 8 significant bits, sums are float32. A float64 flow takes only float32, the default,
/// and computes in float64.
enum class Precision { float32, tf32, bfloat16 };

}  // namespace nvpflow
