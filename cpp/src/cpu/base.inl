// The base densities, and the one switch over them.
//
// Each base is a struct in a file of its own, with the same functions:
//
//   log_prob_tile  log p of the rows of a tile, from their latents and log-determinants
//   log_prob_row   the same for one row, row-major, with the same bits
//   backward       the cotangents of the latents of a tile from those of log p
//   noise_tile     latents of a tile from counters
#pragma once

#include "kernels.hpp"
#include "normal_base.inl"
#include "simd.hpp"
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
  }
  __builtin_unreachable();
}

}  // namespace
}  // namespace nvpflow::cpu
