// The enums that the kernels of both backends branch on. Files built with instruction-set flags and CUDA code include
// this header, so it includes nothing but integers.
#pragma once

#include <stdint.h>

#include "host_device.hpp"

namespace nvpflow {

/// What follows a dense layer: the order of Activation, then `none` for the heads.
enum class Act : int32_t { relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus, none };

/// The log-scale of a coupling: the order of LogScale::Function, then `none` for an additive one.
enum class ScaleFunction : int32_t { tanh, softsign, atan, identity, sigmoid, softplus, none };

/// What latents are: the order of Base.
enum class BaseKind : int32_t { normal, uniform };

/// What the kernels do at one layer of a program: the order of LoweredLayer.
enum class Kind : int32_t { coupling, diagonal, linear, spline };

/// What the walks through a flow ask of a kind, beside its own code.
struct KindFacts {
  bool has_networks;   ///< its dense layers are those of networks
  bool has_matrices;   ///< they are a matrix and its inverse, formed from the parameters; rows give sums of products
  bool has_numbers;    ///< for each transformed feature it takes more numbers than a scale and a shift
  bool beyond_affine;  ///< CUDA: only the kernels that know every kind have it (Reach::all)
};

/// A new kind answers here, or does not compile.
NVPFLOW_HOST_DEVICE constexpr KindFacts facts_of(Kind kind) {
  switch (kind) {
    case Kind::coupling:
      return {.has_networks = true, .has_matrices = false, .has_numbers = false, .beyond_affine = false};
    case Kind::diagonal:
      return {.has_networks = false, .has_matrices = false, .has_numbers = false, .beyond_affine = false};
    case Kind::linear:
      return {.has_networks = false, .has_matrices = true, .has_numbers = false, .beyond_affine = true};
    case Kind::spline:
      return {.has_networks = true, .has_matrices = false, .has_numbers = true, .beyond_affine = true};
  }
  return {};
}

}  // namespace nvpflow
