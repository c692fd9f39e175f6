// The base densities, and the one switch over them.
//
// Each base is a struct in a file of its own, with the same functions:
//
//   log_prob_tile    log p of the rows of a tile, from their latents and log-determinants
//   log_prob_row     the same for one row, row-major, with the same bits
//   noise_tile       latents of a tile from counters
//   tape             what the next two keep on the tape
//   backward         the cotangents of the latents of a tile from those of log p; leaves on the tape what
//                    weight_gradient needs
//   part             how the gradient of its parameters is shared out; nothing where it has none
//   weight_gradient  [first, last) of it, of the rows on the tapes
#pragma once

#include "kernels.hpp"
#include "mixture_base.inl"
#include "normal_base.inl"
#include "simd.hpp"
#include "student_base.inl"
#include "uniform_base.inl"

namespace nvpflow::cpu {
namespace {

/// f(an object of the struct for base.kind), which tells f its type. No default: the compiler names a base that is
/// missing here.
template <class T, class F>
NVPFLOW_INLINE decltype(auto) visit_base(const BaseDensity<T>& base, F&& f) {
  switch (base.kind) {
    case BaseKind::normal:
      return f(NormalDensity<T>{});
    case BaseKind::uniform:
      return f(UniformDensity<T>{});
    case BaseKind::student_t:
      return f(StudentDensity<T>{});
    case BaseKind::mixture:
      return f(MixtureDensity<T>{});
  }
  __builtin_unreachable();
}

}  // namespace
}  // namespace nvpflow::cpu
