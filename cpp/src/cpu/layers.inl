// The kinds of layers, and the one switch over them.
//
// Each kind is a struct in a file of its own, with the same functions:
//
//   tile             rows of a tile through the layer, in place, with their log-determinant
//   few_rows         the same for a few rows, row-major
//   tape             what the next two keep on the tape
//   taped            tile, leaving on the tape what the way back needs
//   backward         the cotangents of a tile back through the layer, in place; leaves on the tape what weight_gradient
//                    needs. !input_wanted: the cotangents after it are not read
//   parts, part      the parts of the layer's gradient, and how one is shared out
//   weight_gradient  [first, last) of one part, of the rows on the tapes of this layer
#pragma once

#include "affine.inl"
#include "diagonal.inl"
#include "kernels.hpp"
#include "linear.inl"
#include "simd.hpp"
#include "spline.inl"

namespace nvpflow::cpu {
namespace {

/// f(an object of the struct for layer.kind), which tells f its type. No default: the compiler names a kind that is
/// missing here.
template <class T, class F>
NVPFLOW_INLINE decltype(auto) visit(const Layer<T>& layer, F&& f) {
  switch (layer.kind) {
    case Kind::coupling:
      return f(AffineLayer<T>{});
    case Kind::diagonal:
      return f(DiagonalLayer<T>{});
    case Kind::linear:
      return f(LinearLayer<T>{});
    case Kind::spline:
      return f(SplineLayer<T>{});
  }
  __builtin_unreachable();
}

}  // namespace
}  // namespace nvpflow::cpu
