// KERNEL: the rational-quadratic spline of one element: forward, inverse, and what the way back needs (Gregory and
// Delbourgo 1982; Durkan et al., Neural Spline Flows, 2019). Lanes are elements, of whatever feature and row.
//
// Every formula is one of the papers', arranged so that all its terms have one sign and nothing cancels. With xi in
// [0, 1] the place in the bin, B = 1 - xi, s = h / w its mean slope and d0, d1 the slopes at its knots:
//
//   N1 = s xi^2 + d0 xi B,  N2 = s B^2 + d1 xi B,  Den = N1 + N2,  eta = N1 / Den,  y = y_k + h eta
//   M = d1 xi^2 + 2 s xi B + d0 B^2,  dy / dx = M (s / Den)^2
//
// The inverse is the root of (1 - eta) N1 = eta N2, in xi and B. Its discriminant is a sum of squares, and of the two
// forms of the root each lane takes the one that adds:
//
//   p = d0 (1 - eta) - d1 eta,  q = 2 s eta,  r = 2 s (1 - eta),  m = sqrt(p^2 + q r) + |p|
//   p >= 0: xi : B = q : m;  p < 0: xi : B = m : r
//
// Sizes are not normalized: e_k = exp(u_k - max) + c sum, of which the bins' sizes are a share each. So there is one
// division for all of them, and knots are compared with the place times the sum.
#pragma once

#include <stdint.h>

#include "elementary.hpp"
#include "kernels.hpp"
#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

constexpr int kMaxBins = 256;  // of Spline

/// Raw sizes further below the largest count as that: products of two sizes and their quotients stay normal numbers.
template <class T>
constexpr T kLeastSize = sizeof(T) == 4 ? T(-40) : T(-340);
/// The same for slopes, which are squared.
template <class T>
constexpr T kLeastSlope = sizeof(T) == 4 ? T(1e-18) : T(1e-150);
template <class T>
constexpr T kMostSlope = sizeof(T) == 4 ? T(1e18) : T(1e150);

#if defined(__AVX512F__)
/// exp_of_size by the nearest sixteenth of a power of two. Where x is far below 0, its last digits do not count: e^x is
/// a small share of a sum then.
NVPFLOW_INLINE Vec<float> table_exp_of_size(Vec<float> x) {
  constexpr float kSixteenths = 23.083120654223414f, kSixteenth = 0.043321698784996582f;  // 16 / ln 2, ln 2 / 16
  constexpr float kSeries[] = {1.0f, 1.0f, 1.0f / 2, 1.0f / 6};
  const Vec<float> magic = set1(Simd<float>::kRoundMagic);
  const Vec<float> shifted = fma(x, set1(kSixteenths), magic);
  const Vec<float> k = shifted - magic;
  const Vec<float> r = fma(k, set1(-kSixteenth), x);
  const Vec<float> power = _mm512_maskz_permutexvar_ps(0xffff, (__m512i)shifted, load<float>(kPowerTable[0]));
  return _mm512_maskz_scalef_ps(0xffff, polynomial(r, kSeries) * power, k * (1.0f / 16));
}
#endif

/// e^x for x in [kLeastSize, 0].
template <class T>
NVPFLOW_INLINE Vec<T> exp_of_size(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return table_exp_of_size(x);
#endif
  const Vec<T> magic = set1(Simd<T>::kRoundMagic);
  const Vec<T> shifted = fma(x, set1(static_cast<T>(1.4426950408889634074)), magic);
  const Vec<T> n = shifted - magic;
  const Vec<T> r = fma(n, set1(-Simd<T>::kLn2Low), fma(n, set1(-Simd<T>::kLn2High), x));
  const Vec<T> p = fma(r * r, NVPFLOW_COEFFICIENTS(T, kExpm1Tail, r), r);
  const Vec<T> scale = power_of_two<T>(integer_of<T>(shifted));
  return fma(p, scale, scale);
}

/// At least one, which the compiler does not know.
template <class T>
NVPFLOW_INLINE int bins_of(const SplineMap<T>& map) {
  if (map.num_bins < 1 || map.num_bins > kMaxBins) __builtin_unreachable();
  return map.num_bins;
}

/// The widths, or the heights, of an element's bins.
template <class T>
struct BinSizes {
  Vec<T> e[kMaxBins];  // exp(u_k - max)
  Vec<T> sum;          // of them
  Vec<T> floor;        // what each of them is raised by
  Vec<T> norm;         // sum of the raised ones
};

/// From raw numbers u, `distance` apart.
template <class T>
NVPFLOW_INLINE void find_sizes(const SplineMap<T>& map, T floor, const T* u, int64_t distance, BinSizes<T>& sizes) {
  const int K = bins_of(map);
  if (map.squashed) {
    for (int k = 0; k < K; ++k) {
      const Vec<T> raw = load<T>(u + k * distance);
      sizes.e[k] = raw / fma(absolute<T>(raw), set1(map.size_factor), set1(T(1)));
    }
  } else {
    for (int k = 0; k < K; ++k) sizes.e[k] = load<T>(u + k * distance);
  }
  Vec<T> most = sizes.e[0];
  for (int k = 1; k < K; ++k) most = larger(sizes.e[k], most);
  Vec<T> sum = {};
  for (int k = 0; k < K; ++k) {
    sizes.e[k] = exp_of_size<T>(at_least(sizes.e[k] - most, kLeastSize<T>));
    sum = sum + sizes.e[k];
  }
  sizes.sum = sum;
  sizes.floor = sum * floor;
  sizes.norm = fma(sizes.floor, set1(static_cast<T>(K)), sum);
}

/// The bin that an element lies in. Sizes and lefts are not normalized.
template <class T>
struct Bin {
  Vec<T> index;
  Vec<T> left, size;              // of what comes in
  Vec<T> other_left, other_size;  // of what goes out
  Vec<T> raw0, raw1;              // what the network says of the slopes at its knots
};

/// The last bin whose left knot is at or before t, by comparing with all of them: there is nothing to gather. The floor
/// of the sizes comes on top of the sums, of so many floors as there are bins before.
template <class T>
NVPFLOW_INLINE Bin<T> find_bin(const SplineMap<T>& map, const BinSizes<T>& in, const BinSizes<T>& out,
                               const T* raw_slopes, int64_t distance, Vec<T> t) {
  const int K = bins_of(map), inner = map.free_ends ? 1 : 0;  // slopes before the one at the first inner knot
  const T* next_slope = raw_slopes + inner * distance;
  Vec<T> slope = inner < map.num_slopes ? load<T>(next_slope) : Vec<T>{};
  Bin<T> bin = {{}, {}, in.e[0], {}, out.e[0], map.free_ends ? load<T>(raw_slopes) : Vec<T>{}, slope};
  Vec<T> sum = in.e[0];
  for (int k = 1; k < K; ++k) {
    next_slope += distance;
    const Vec<T> index = set1(static_cast<T>(k));
    const auto beyond = t >= fma(in.floor, index, sum);
    bin.index = beyond ? index : bin.index;
    bin.left = beyond ? sum : bin.left;
    bin.size = beyond ? in.e[k] : bin.size;
    bin.other_left = beyond ? bin.other_left + out.e[k - 1] : bin.other_left;
    bin.other_size = beyond ? out.e[k] : bin.other_size;
    bin.raw0 = beyond ? slope : bin.raw0;
    slope = k + inner < map.num_slopes ? load<T>(next_slope) : slope;
    bin.raw1 = beyond ? slope : bin.raw1;
    sum = sum + in.e[k];
  }
  bin.left = fma(in.floor, bin.index, bin.left);
  bin.other_left = fma(out.floor, bin.index, bin.other_left);
  bin.size = bin.size + in.floor;
  bin.other_size = bin.other_size + out.floor;
  return bin;
}

/// A slope at a knot, and its derivative by the raw number.
template <class T, bool with_derivative>
NVPFLOW_INLINE void find_slope(const SplineMap<T>& map, Vec<T> raw, Vec<T>& slope, Vec<T>& derivative) {
  if (map.exp_slopes) {
    const Vec<T> r = T(1) / fma(absolute<T>(raw), set1(map.slope_factor), set1(T(1)));
    const Vec<T> e = exp<T>(raw * r);
    slope = e + set1(map.min_slope);
    if constexpr (with_derivative) derivative = e * r * r;
  } else {
    const Vec<T> x = raw + set1(map.offset);
    const Vec<T> e = exp_of_size<T>(at_least(-absolute<T>(x), kLeastSize<T>));
    const Vec<T> softplus = (x > T(0) ? x : Vec<T>{}) + log1p_unit<T>(e);
    slope = fma(softplus, set1(map.gain), set1(map.min_slope));
    if constexpr (with_derivative) derivative = set1(map.gain) * (x < T(0) ? e : set1(T(1))) / (e + T(1));
  }
  slope = at_most(at_least(slope, kLeastSlope<T>), kMostSlope<T>);
}

/// What the way back needs of elements, from the place of an array's first one; with the e of their sizes in place of
/// the raw ones. Sizes are shares of the interval here.
template <class T>
struct SplineTape {
  static constexpr int kArrays = 11;
  T* index;  // of the bin; -1: before the first, num_bins: behind the last
  T *xi, *b, *width, *height, *slope0, *slope1;
  T *by_raw0, *by_raw1;                 // derivatives of the slopes by what the network says
  T *inverse_widths, *inverse_heights;  // 1 / the sums of e
  T* squash;  // derivatives of the squashed sizes, [2 num_bins], `distance` apart; where sizes are squashed

  /// arrays [kArrays][elements], then that of squash.
  SplineTape(T* arrays, int64_t elements)
      : index(arrays),
        xi(arrays + elements),
        b(arrays + 2 * elements),
        width(arrays + 3 * elements),
        height(arrays + 4 * elements),
        slope0(arrays + 5 * elements),
        slope1(arrays + 6 * elements),
        by_raw0(arrays + 7 * elements),
        by_raw1(arrays + 8 * elements),
        inverse_widths(arrays + 9 * elements),
        inverse_heights(arrays + 10 * elements),
        squash(arrays + kArrays * elements) {}
};

/// Where the sizes of an element came from, and where their e go: num_bins of them at u, `distance` apart.
template <class T>
NVPFLOW_INLINE void keep_sizes(const SplineMap<T>& map, const BinSizes<T>& sizes, T* u, int64_t distance, T* squash) {
  const int K = bins_of(map);
  for (int k = 0; k < K; ++k) {
    if (map.squashed) {
      const Vec<T> r = T(1) / fma(absolute<T>(load<T>(u + k * distance)), set1(map.size_factor), set1(T(1)));
      store<T>(squash + k * distance, r * r);
    }
    store<T>(u + k * distance, sizes.e[k]);
  }
}

/// What becomes of an element.
template <class T>
struct SplineValue {
  Vec<T> out, log_slope;  // log of d out / d in
};

/// The numbers of an element's bin: the place in it, and what says the map there.
template <class T>
struct SplinePlace {
  Vec<T> xi, b, s, d0, d1;
};

/// M (s / Den)^2, and eta.
template <class T>
NVPFLOW_INLINE Vec<T> slope_at(const SplinePlace<T>& at, Vec<T>& eta) {
  const Vec<T> both = at.xi * at.b;
  const Vec<T> n1 = fma(at.s * at.xi, at.xi, at.d0 * both), n2 = fma(at.s * at.b, at.b, at.d1 * both);
  const Vec<T> r = T(1) / (n1 + n2), share = at.s * r;
  eta = n1 * r;
  const Vec<T> m = fma(at.d1 * at.xi, at.xi, fma(at.s * T(2), both, at.d0 * at.b * at.b));
  return m * share * share;
}

/// xi and B of the place where eta is this much, and 1 - eta that.
template <class T>
NVPFLOW_INLINE void solve(Vec<T> eta, Vec<T> rest, SplinePlace<T>& at) {
  const Vec<T> p = at.d0 * rest - at.d1 * eta;
  const Vec<T> q = at.s * eta * T(2), r = at.s * rest * T(2);
  const Vec<T> m = sqrt(fma(p, p, q * r)) + absolute<T>(p);
  const auto positive = p >= T(0);
  const Vec<T> first = positive ? q : m, second = positive ? m : r;
  const Vec<T> inverse = T(1) / (first + second);
  at.xi = first * inverse;
  at.b = second * inverse;
}

/// The straight lines outside the interval, in place of what the spline says there. inverse: from y to x.
template <class T>
NVPFLOW_INLINE void follow_tails(const SplineMap<T>& map, bool inverse, Vec<T> in, Vec<T> slope,
                                 SplineValue<T>& value) {
  const auto high = in > set1(map.upper);
  const auto outside = high | (in < set1(map.lower));
  const Vec<T> edge = high ? set1(map.upper) : set1(map.lower);
  const Vec<T> distance = in - edge, log_slope = log<T>(slope);
  value.out = outside ? edge + (inverse ? distance / slope : distance * slope) : value.out;
  value.log_slope = outside ? (inverse ? -log_slope : log_slope) : value.log_slope;
}

/// Of kLanes elements from `at` on: raw numbers u, parameter p `p distance` further. taped: leaves what the way back
/// needs, and e in place of the raw sizes.
template <class T, bool inverse, bool taped>
NVPFLOW_INLINE SplineValue<T> spline_value(const SplineMap<T>& map, T* u, int64_t distance, Vec<T> in,
                                           const SplineTape<T>* tape, int64_t at) {
  const int64_t K = bins_of(map);
  BinSizes<T> widths, heights;
  find_sizes<T>(map, map.width_floor, u, distance, widths);
  find_sizes<T>(map, map.height_floor, u + K * distance, distance, heights);
  const Vec<T> inverse_width = T(1) / widths.norm, inverse_height = T(1) / heights.norm;
  const Vec<T> clipped = at_least(at_most(in, map.upper), map.lower);
  const Vec<T> t = (clipped - set1(map.lower)) * ((inverse ? heights : widths).norm * set1(map.inverse_span));
  const Bin<T> bin =
      find_bin<T>(map, inverse ? heights : widths, inverse ? widths : heights, u + 2 * K * distance, distance, t);
  SplinePlace<T> place;
  Vec<T> by_raw0 = {}, by_raw1 = {};
  find_slope<T, taped>(map, bin.raw0, place.d0, by_raw0);
  find_slope<T, taped>(map, bin.raw1, place.d1, by_raw1);
  if (!map.free_ends) {
    place.d0 = bin.index == T(0) ? set1(T(1)) : place.d0;
    place.d1 = bin.index == static_cast<T>(K - 1) ? set1(T(1)) : place.d1;
  }
  const Vec<T> of_sizes = T(1) / (bin.size * bin.other_size);
  const Vec<T> inverse_size = bin.other_size * of_sizes;
  const Vec<T> within = at_most(at_least((t - bin.left) * inverse_size, T(0)), T(1));
  const auto inside = (in >= set1(map.lower)) & (in <= set1(map.upper));
  SplineValue<T> value;
  Vec<T> eta;
  if constexpr (inverse) {
    place.s = bin.size * inverse_height * (widths.norm * (bin.size * of_sizes));
    solve<T>(within, T(1) - within, place);
    const Vec<T> slope = slope_at<T>(place, eta);
    value.out = fma(fma(bin.other_size, place.xi, bin.other_left) * inverse_width, set1(map.span), set1(map.lower));
    value.log_slope = -log<T>(slope);
  } else {
    place.s = bin.other_size * inverse_height * (inverse_size * widths.norm);
    place.xi = within;
    place.b = T(1) - within;
    const Vec<T> slope = slope_at<T>(place, eta);
    value.out = fma(fma(bin.other_size, eta, bin.other_left) * inverse_height, set1(map.span), set1(map.lower));
    value.log_slope = log<T>(slope);
  }
  // A rounding beyond the end there is another map, or no density. Below the other end none can take it.
  value.out = inside ? at_most(value.out, map.upper) : in;
  value.log_slope = inside ? value.log_slope : in * T(0);  // NaN where that came in
  const auto high = in > set1(map.upper), low = in < set1(map.lower);
  if (map.slope_tails) {
    follow_tails<T>(map, inverse, in, high ? place.d1 : place.d0, value);
  } else {
    value.log_slope = (high | low) ? Vec<T>{} : value.log_slope;  // also at infinity
  }
  if constexpr (taped) {
    keep_sizes<T>(map, widths, u, distance, tape->squash + at);
    keep_sizes<T>(map, heights, u + K * distance, distance, tape->squash + K * distance + at);
    const Vec<T> from_edge = (inverse ? value.out : in) - (high ? set1(map.upper) : set1(map.lower));
    store<T>(tape->index + at, low ? set1(T(-1)) : high ? set1(static_cast<T>(K)) : bin.index);
    store<T>(tape->xi + at, (high | low) ? from_edge : place.xi);
    store<T>(tape->b + at, place.b);
    store<T>(tape->width + at, (inverse ? bin.other_size : bin.size) * inverse_width);
    store<T>(tape->height + at, (inverse ? bin.size : bin.other_size) * inverse_height);
    store<T>(tape->slope0 + at, high ? place.d1 : place.d0);  // outside both are the one at the end
    store<T>(tape->slope1 + at, low ? place.d0 : place.d1);
    store<T>(tape->by_raw0 + at, high ? by_raw1 : by_raw0);
    store<T>(tape->by_raw1 + at, low ? by_raw0 : by_raw1);
    store<T>(tape->inverse_widths + at, T(1) / widths.sum);
    store<T>(tape->inverse_heights + at, T(1) / heights.sum);
  }
  return value;
}

// ---- the way back ------------------------------------------------------------------------------------------------

/// Cotangents of what a bin's map is made of, as shares of the interval.
template <class T>
struct BinCotangents {
  Vec<T> left, width, other_left, height, slope0, slope1;
};

/// The cotangent of the raw sizes from that of the bin's left knot (of every size before it) and of its own size: back
/// through the softmax. e: on the tape, in place of the raw sizes; to: `distance` apart, as they are.
template <class T>
NVPFLOW_INLINE void sizes_back(const SplineMap<T>& map, T share, const T* e, int64_t distance, Vec<T> inverse_sum,
                               Vec<T> index, Vec<T> left, Vec<T> own, const T* squash, T* to) {
  const int K = bins_of(map);
  const auto cotangent = [&](int k) __attribute__((always_inline)) {
    const Vec<T> here = index == static_cast<T>(k) ? own : Vec<T>{};
    return index > static_cast<T>(k) ? left : here;
  };
  Vec<T> dot = {};
  for (int k = 0; k < K; ++k) dot = fma(load<T>(e + k * distance) * inverse_sum, cotangent(k), dot);
  for (int k = 0; k < K; ++k) {
    Vec<T> g = load<T>(e + k * distance) * inverse_sum * set1(share) * (cotangent(k) - dot);
    if (map.squashed) g = g * load<T>(squash + k * distance);
    store<T>(to + k * distance, g);
  }
}

/// The cotangent of the raw slopes: those of the bin's two knots.
template <class T>
NVPFLOW_INLINE void slopes_back(const SplineMap<T>& map, Vec<T> index, Vec<T> first, Vec<T> second, int64_t distance,
                                T* to) {
  const int begin = map.free_ends ? 0 : 1;
  for (int j = 0; j < map.num_slopes; ++j) {
    const Vec<T> of_second = index == static_cast<T>(j + begin - 1) ? second : Vec<T>{};
    store<T>(to + j * distance, index == static_cast<T>(j + begin) ? first : of_second);
  }
}

/// The cotangents of a bin's numbers and of what came in, from those of what went out and of its log-slope. A formula
/// v' below is dv / d(xi, s, d0, d1); the inverse follows from the implicit function, dx = (dy - f_theta dtheta) / f'.
template <class T, bool inverse>
NVPFLOW_INLINE BinCotangents<T> bin_back(const SplineMap<T>& map, const SplinePlace<T>& at, Vec<T> width, Vec<T> height,
                                         Vec<T> g_out, Vec<T> g_log, Vec<T>& g_in) {
  const Vec<T> xi = at.xi, b = at.b, s = at.s, d0 = at.d0, d1 = at.d1;
  const Vec<T> both = xi * b, xi2 = xi * xi, b2 = b * b, apart = b - xi;
  const Vec<T> n1 = fma(s, xi2, d0 * both), n2 = fma(s, b2, d1 * both);
  const Vec<T> r = T(1) / (n1 + n2);
  const Vec<T> m = fma(d1, xi2, fma(s * T(2), both, d0 * b2)), by_m = T(1) / m;
  const Vec<T> inverse_width = T(1) / width;
  const Vec<T> log_xi = T(2) * (fma(d1, xi, fma(s, apart, -(d0 * b))) * by_m - apart * (d0 + d1 - T(2) * s) * r);
  const Vec<T> share = s * r, slope = m * share * share;
  if constexpr (inverse) {
    g_log = -g_log;  // of the forward map's log-slope
    g_in = fma(g_log, log_xi * inverse_width * set1(map.inverse_span), g_out) / slope;
    g_out = -g_in;
  }
  const Vec<T> g_y = g_out * set1(map.span), g_eta = g_y * height * r;
  const Vec<T> twice = T(2) * both * r;
  const Vec<T> g_xi = fma(g_eta, m * share, g_log * log_xi);
  const Vec<T> log_s = T(2) * (T(1) / s + both * by_m - (xi2 + b2) * r);
  const Vec<T> g_s = fma(g_eta, both * fma(d1, xi2, -(d0 * b2)) * r, g_log * log_s);
  BinCotangents<T> g;
  g.slope0 = fma(g_eta, both * n2 * r, g_log * fma(b2, by_m, -twice));
  g.slope1 = fma(-g_eta, both * n1 * r, g_log * fma(xi2, by_m, -twice));
  g.left = -g_xi * inverse_width;
  g.width = -fma(g_s, s, g_xi * xi) * inverse_width;
  g.other_left = g_y;
  g.height = fma(g_y, n1 * r, g_s * inverse_width);
  if constexpr (!inverse) g_in = g_xi * inverse_width * set1(map.inverse_span);
  return g;
}

/// Of kLanes elements: g_out, g_log to the cotangent of what came in, which is returned, and of all raw numbers, at
/// `to`. e: on the tape.
template <class T, bool inverse>
NVPFLOW_INLINE Vec<T> spline_back(const SplineMap<T>& map, const T* e, int64_t distance, const SplineTape<T>& tape,
                                  int64_t i, Vec<T> g_out, Vec<T> g_log, T* to) {
  const int64_t K = bins_of(map);
  const Vec<T> index = load<T>(tape.index + i), width = load<T>(tape.width + i), height = load<T>(tape.height + i);
  const SplinePlace<T> at = {load<T>(tape.xi + i), load<T>(tape.b + i), height / width, load<T>(tape.slope0 + i),
                             load<T>(tape.slope1 + i)};
  Vec<T> g_in;
  BinCotangents<T> g = bin_back<T, inverse>(map, at, width, height, g_out, g_log, g_in);
  const auto outside = (index < T(0)) | (index >= static_cast<T>(K));
  const Vec<T> zero = {};
  Vec<T> g_slope = zero, in_tail = g_out;
  if (map.slope_tails) {
    in_tail = inverse ? g_out / at.d0 : g_out * at.d0;
    g_slope = inverse ? -(in_tail * at.xi + g_log / at.d0) : fma(g_out, at.xi, g_log / at.d0);
  }
  g_in = outside ? in_tail : g_in;
  g.slope0 = outside ? g_slope : g.slope0;
  g.slope1 = outside ? g_slope : g.slope1;
  g.left = outside ? zero : g.left;
  g.width = outside ? zero : g.width;
  g.other_left = outside ? zero : g.other_left;
  g.height = outside ? zero : g.height;
  sizes_back<T>(map, map.width_share, e, distance, load<T>(tape.inverse_widths + i), index, g.left, g.width,
                tape.squash + i, to);
  sizes_back<T>(map, map.height_share, e + K * distance, distance, load<T>(tape.inverse_heights + i), index,
                g.other_left, g.height, tape.squash + K * distance + i, to + K * distance);
  slopes_back<T>(map, index, g.slope0 * load<T>(tape.by_raw0 + i), g.slope1 * load<T>(tape.by_raw1 + i), distance,
                 to + 2 * K * distance);
  return g_in;
}

}  // namespace
}  // namespace nvpflow::cpu
