// What the kernels read of a base that has parameters: formed in double whenever these change, and rounded once.
#pragma once

#include <cstdint>

#include "base_density.hpp"
#include "lower.hpp"
#include "memory.hpp"

namespace nvpflow {

template <class T>
class BaseNumbers {
 public:
  /// lanes: of a vector; arrays by feature end with whole ones.
  BaseNumbers(const LoweredBase& base, std::int64_t features, std::int64_t lanes);
  BaseNumbers(const BaseNumbers&) = delete;
  BaseNumbers& operator=(const BaseNumbers&) = delete;

  /// parameters: the flat buffer.
  void pack(const T* parameters);
  /// Its pointers stay as they are.
  const BaseDensity<T>& density() const { return density_; }

 private:
  void pack_student(const T* log_df);
  void pack_mixture(const T* parameters);
  void pack_component(std::int64_t component, const T* log_scales, const T* lower);

  const std::int64_t features_;
  BaseDensity<T> density_;
  AlignedVector<T> numbers_;
};

}  // namespace nvpflow
