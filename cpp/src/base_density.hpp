// The numbers of a base density, as the kernels of both backends read them. Like kinds.hpp it includes nothing that
// could emit a function.
#pragma once

#include "host_device.hpp"
#include "kinds.hpp"

namespace nvpflow {

/// Numbers of a feature of a student_t base, nu its degrees of freedom.
enum StudentNumber : int32_t {
  kInverseRoot,  // 1 / sqrt(nu)
  kPower,        // (nu + 1) / 2
  kSlope,        // (nu + 1) / sqrt(nu)
  kHalf,         // nu / 2
  kNormSlope,    // nu times the derivative by nu of the logarithm of what the density is normalized by
  kRoot,         // sqrt(nu)
  kInverseHalf,  // 2 / nu
  kStudentNumbers
};

/// Base of <nvpflow/base.hpp>.
template <class T>
struct BaseDensity {
  BaseKind kind = BaseKind::normal;
  T low = 0, high = 0, range = 0;  // uniform; range = high - low
  T log_density = 0;               // uniform: of a row inside; student_t: of the latents 0
  // student_t: [kStudentNumbers][stride], by feature; zero from D on to whole vectors.
  const T* student = nullptr;
  int64_t stride = 0;
  // mixture, by component
  int64_t components = 0;
  bool full = false;
  const T* weights = nullptr;    // [M]
  const T* cumulated = nullptr;  // [M]: sums of the weights up to and with this one
  const T* log_peaks = nullptr;  // [M]: the logarithm of the weighted density at the mean
  const T* means = nullptr;      // [M][D]
  // F and F^-1, [M][mixture_factor_size]: the diagonals, or with `full` the rows of the lower triangles.
  const T* factors = nullptr;
  const T* inverses = nullptr;
  // Of the base's tensors in the flat parameters: log_df, or logits, means, log_scales and lower.
  int64_t offset = 0, means_offset = 0, log_scales_offset = 0, lower_offset = 0;
};

/// Numbers of F of a component.
NVPFLOW_HOST_DEVICE constexpr int64_t mixture_factor_size(int64_t features, bool full) {
  return full ? features * (features + 1) / 2 : features;
}

}  // namespace nvpflow
