#include "cpu_adam.hpp"

#include <cmath>
#include <cstddef>
#include <cstdint>

#include <nvpflow/spec.hpp>

#include "../parallel.hpp"
#include "../training.hpp"
#include "cpu_flow.hpp"
#include "kernels.hpp"

namespace nvpflow::cpu {
namespace {

/// Parameters that one thread updates at a time.
constexpr std::int64_t kUpdateSize = 1 << 14;

}  // namespace

template <class T>
CpuAdam<T>::CpuAdam(const ParamLayout& layout, int threads)
    : layout_(layout),
      kernels_(chosen_kernels<T>()),
      threads_(threads),
      first_moment_(static_cast<std::size_t>(layout.size())),
      second_moment_(static_cast<std::size_t>(layout.size())) {}

/// In float64, in a fixed order.
template <class T>
double CpuAdam<T>::sum_of_squares(const T* values, std::int64_t count) const {
  return sum_of_parts<kUpdateSize>(count, threads_, [&](std::int64_t begin, std::int64_t end) {
    return kernels_.sum_of_squares(values + begin, end - begin);
  });
}

template <class T>
double CpuAdam<T>::update(const AdamStep& step, double clip_norm, const T* gradient, T* parameters) {
  double square = 0;
  for (const TensorInfo& t : layout_.tensors()) {
    if (t.trained) square += sum_of_squares(gradient + t.offset, t.size);
  }
  const double norm = std::sqrt(square);
  if (!std::isfinite(norm)) return norm;
  AdamStep adam = step;
  if (clip_norm > 0 && norm > clip_norm) adam.gradient_factor = clip_norm / norm;
  for (const TensorInfo& t : layout_.tensors()) {
    if (!t.trained) continue;
    adam.weight_decay = t.decayed ? step.weight_decay : 0.0;
    const AdamCoefficients with = coefficients(adam);
    parallel_for(t.size, kUpdateSize, threads_, [&](std::int64_t begin, std::int64_t end) {
      const std::int64_t at = t.offset + begin;
      kernels_.adam(with, end - begin, gradient + at, first_moment_.data() + at, second_moment_.data() + at,
                    parameters + at);
    });
  }
  return norm;
}

template class CpuAdam<float>;
template class CpuAdam<double>;

}  // namespace nvpflow::cpu
