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
enum class BaseKind : int32_t { normal, uniform, student_t, mixture };

/// How a coupling's network is made: the order of Network::Kind.
enum class NetworkKind : int32_t { mlp, residual };

/// Whether h goes through blocks of two dense layers, which add to it: it is kept while they are computed. A new kind
/// answers here, or does not compile.
NVPFLOW_HOST_DEVICE constexpr bool has_blocks(NetworkKind kind) {
  switch (kind) {
    case NetworkKind::mlp:
      return false;
    case NetworkKind::residual:
      return true;
  }
  return false;
}

/// What the kernels do at one layer of a program: the order of LoweredLayer.
enum class Kind : int32_t { coupling, diagonal, linear, spline };

/// What the walks through a flow ask of a kind, beside its own code.
struct KindFacts {
  bool has_networks;   ///< its dense layers are those of networks
  bool has_matrices;   ///< they are a matrix and its inverse, formed from LU factors; rows give sums of products
  bool has_splines;    ///< it takes the numbers of a spline for each transformed feature
  bool beyond_affine;  ///< CUDA: only the kernels that know every kind have it (Reach::all)
};

/// A new kind answers here, or does not compile.
NVPFLOW_HOST_DEVICE constexpr KindFacts facts_of(Kind kind) {
  switch (kind) {
    case Kind::coupling:
      return {.has_networks = true, .has_matrices = false, .has_splines = false, .beyond_affine = false};
    case Kind::diagonal:
      return {.has_networks = false, .has_matrices = false, .has_splines = false, .beyond_affine = false};
    case Kind::linear:
      return {.has_networks = false, .has_matrices = true, .has_splines = false, .beyond_affine = true};
    case Kind::spline:
      return {.has_networks = true, .has_matrices = false, .has_splines = true, .beyond_affine = true};
  }
  return {};
}

}  // namespace nvpflow
