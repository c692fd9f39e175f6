// The matrix of an lu_linear layer from its factors, and the gradients of the factors from the matrix's: what does not
// depend on the rows. In float64 for flows of either type, the same bits on every instruction set and for any number of
// threads.
#pragma once

#include <cstdint>
#include <vector>

#include "../lower.hpp"
#include "../memory.hpp"
#include "kernels.hpp"

namespace nvpflow::cpu {

/// One layer's packed matrices. It stays where it is: linear() points into it.
template <class T>
class LuMatrix {
 public:
  /// segment: Dense::segment of both matrices.
  LuMatrix(const LoweredLinear& from, std::int64_t features, std::int64_t lanes, std::int64_t segment);
  LuMatrix(const LuMatrix&) = delete;
  LuMatrix& operator=(const LuMatrix&) = delete;

  Linear<T>& linear() { return linear_; }
  const Linear<T>& linear() const { return linear_; }
  /// sum(log_diagonal).
  T log_det() const { return log_det_; }

  /// parameters: the flat buffer. forward, inverse: the matrices that are formed.
  void pack(const T* parameters, bool forward, bool inverse, int threads);

 private:
  void copy_factors(const T* parameters);

  const std::int64_t lanes_;
  const LoweredLinear from_;
  Linear<T> linear_;
  AlignedVector<T> weights_;
  std::vector<T> lower_, upper_;  // as the tensors
  std::vector<double> diagonal_;  // of U
  T log_det_ = 0;
};

/// Adds to the flat gradient, or writes, what the products of a call on all its rows come to. inverse: the layer ran
/// backwards. products: GradientCall::products.
template <class T>
void add_lu_gradient(const Linear<T>& linear, bool inverse, const T* products, T* gradient, bool add, int threads);

}  // namespace nvpflow::cpu
