// The numbers of a spline, as the kernels of both backends read them. Like kinds.hpp it includes nothing that could
// emit a function.
#pragma once

#include <stdint.h>

namespace nvpflow {

/// Spline of <nvpflow/layers.hpp>. Where something lies in the interval is said in units of its span.
template <class T>
struct SplineMap {
  int32_t num_bins = 1;
  int32_t num_slopes = 0;    // num_bins - 1, or num_bins + 1 where the ends are free
  bool free_ends = false;    // slopes at the ends are the network's, else 1
  bool exp_slopes = false;   // slopes from exp, else from softplus
  bool slope_tails = false;  // outside: with the slope at the end, else the identity; the ends are free then
  bool squashed = false;     // sizes are u / (1 + |u| size_factor) before the softmax
  T lower = 0, upper = 1, span = 1, inverse_span = 1;
  T width_share = 1, height_share = 1;  // 1 - num_bins m: what the softmax shares out
  T width_floor = 0, height_floor = 0;  // m / (1 - num_bins m)
  T min_slope = 0, gain = 1, offset = 0;
  T slope_factor = 1;  // 1 / bound of exp slopes
  T size_factor = 0;   // 1 / size_bound
};

}  // namespace nvpflow
