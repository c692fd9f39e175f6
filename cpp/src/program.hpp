// The enums that the kernels of both backends branch on. Files built with instruction-set flags and CUDA code include
// this header, so it includes nothing but integers.
#pragma once

#include <stdint.h>

namespace nvpflow {

/// What follows a dense layer: the order of Activation, then `none` for the heads.
enum class Act : int32_t { relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus, none };

/// The log-scale of a coupling: the order of LogScale::Function, then `none` for an additive one.
enum class ScaleFunction : int32_t { tanh, softsign, atan, identity, sigmoid, softplus, none };

/// What latents are: the order of Base.
enum class BaseKind : int32_t { normal, uniform };

/// What the kernels do at one layer of a program: the order of LoweredLayer.
enum class Kind : int32_t { coupling, diagonal, linear, spline };

}  // namespace nvpflow
