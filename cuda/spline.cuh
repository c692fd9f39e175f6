// KERNEL PART: rational-quadratic splines, those of a coupling, whose network says what they are, and those that are
// the same for all rows. The formulas and their order are those of cpp/src/cpu/spline_point.inl. `walk` is the walk of
// a tile (transform.cu, gradient.cu).
//
// A thread owns an element, a feature of a row. Its numbers lie in an array of activations (SplinePlaces) and are read
// three times: for the largest sizes, for their exponentials, which take their places, and for the bin. The lanes of a
// warp are 32 rows of one feature, so that pairs of numbers come from shared memory without bank conflicts. Bound:
// issue, 2 K exponentials and the search (instructions: design/cuda.md), beside the products of the head.
//
// The tape keeps what came in, and the exponentials in the places of the sizes, where their cotangents then go.
#pragma once

#include "elementary.cuh"
#include "networks.cuh"
#include "tape.hpp"
#include "tile.cuh"

namespace nvpflow::cuda {

// ---- one element ---------------------------------------------------------------------------------------------------

/// Raw sizes further below the largest count as that: products of two sizes and their quotients stay normal numbers.
template <class T>
inline constexpr T kLeastSize = sizeof(T) == 4 ? T(-40) : T(-340);
/// The same for slopes, which are squared.
template <class T>
inline constexpr T kLeastSlope = sizeof(T) == 4 ? T(1e-18) : T(1e-150);
template <class T>
inline constexpr T kMostSlope = sizeof(T) == 4 ? T(1e18) : T(1e150);

/// e^x for x in [kLeastSize, 0].
template <class T>
NVPFLOW_DEVICE T exp_of_size(T x) {
  using Int = typename Real<T>::Int;
  const T magic = Real<T>::kRoundMagic;
  const T shifted = multiply_add(x, static_cast<T>(1.4426950408889634074), magic);
  const T n = shifted - magic;
  const T r = multiply_add(n, -Real<T>::kLn2Low, multiply_add(n, -Real<T>::kLn2High, x));
  const T p = multiply_add(r * r, evaluate<Series::expm1_tail>(r), r);
  const T scale = power_of_two<T>(static_cast<Int>(to_bits(shifted)) - static_cast<Int>(to_bits(magic)));
  return multiply_add(p, scale, scale);
}

/// The numbers of one element by their places (SplinePlaces), in an array of activations. Rows: MemoryRows of a tile.
template <class Rows>
struct SplineNumbers {
  const Rows& rows;
  int first, flip;  // place(), taken apart

  /// blocks: of a row.
  NVPFLOW_DEVICE SplineNumbers(const Rows& array, const SplinePlaces& at, int blocks, int r, int j)
      : rows(array),
        first(((r >> 4) * blocks + j * (at.stride / 8)) * kBlock + 16 * (r & 7) + 2 * ((r >> 3) & 1)),
        flip((r & 7) >> 1) {}
  NVPFLOW_DEVICE auto* pair(int i) const { return rows.at(first + (i >> 2) * kBlock + 4 * ((i & 3) ^ flip)); }
  NVPFLOW_DEVICE auto& operator[](int i) const { return pair(i >> 1)[i & 1]; }

  /// visit(k, number) for k < count, of those from an even place on.
  template <class Visit>
  NVPFLOW_DEVICE void each(int begin, int count, Visit visit) const {
    for (int k = 0; k < count; k += 2) {
      const auto v = load2(pair((begin + k) >> 1));
      visit(k, v.x);
      if (k + 1 < count) visit(k + 1, v.y);
    }
  }
  /// The same; change() says what each number becomes.
  template <class Change>
  NVPFLOW_DEVICE void change(int begin, int count, Change change) const {
    for (int k = 0; k < count; k += 2) {
      auto* at = pair((begin + k) >> 1);
      auto v = load2(at);
      v.x = change(k, v.x);
      v.y = k + 1 < count ? change(k + 1, v.y) : 0;
      store2(at, v);
    }
  }
};

/// Sizes of the bins on one axis, not normalized: bin k has e_k + floor of norm.
template <class T>
struct SplineSizes {
  T sum, floor, norm;  // sum of the e_k

  NVPFLOW_DEVICE SplineSizes(T sum_of_e, T floor_share, int num_bins)
      : sum(sum_of_e), floor(sum_of_e * floor_share), norm(multiply_add(floor, static_cast<T>(num_bins), sum_of_e)) {}
};

/// Puts e_k = exp(u_k - largest) in the places of the raw sizes u; their sum. keep(k, derivative) is told that of the
/// squashed sizes, where they are squashed.
template <class T, class Rows, class Keep>
NVPFLOW_DEVICE T exponentiate(const SplineMap<T>& map, const SplineNumbers<Rows>& numbers, int begin, Keep keep) {
  if (map.squashed) {
    numbers.change(begin, map.num_bins, [&](int k, T u) {
      const T r = T(1) / multiply_add(absolute(u), map.size_factor, T(1));
      keep(k, r * r);
      return u * r;
    });
  }
  T most = -infinity<T>();
  numbers.each(begin, map.num_bins, [&](int, T u) { most = u > most ? u : most; });
  T sum = 0;
  numbers.change(begin, map.num_bins, [&](int, T u) {
    const T e = exp_of_size(at_least(u - most, kLeastSize<T>));
    sum += e;
    return e;
  });
  return sum;
}

/// A bin by comparing with all knots: its index, and the sums of e before it.
template <class T>
struct SplineBin {
  int index = 0;
  T before = 0, other_before = 0;
};

/// The last bin whose left knot is at or before t, on the axis whose sizes begin at `begin`.
template <class T, class Rows>
NVPFLOW_DEVICE SplineBin<T> find_bin(const SplineNumbers<Rows>& numbers, int begin, int other_begin, int num_bins,
                                     T floor, T t) {
  SplineBin<T> bin;
  T sum = 0, other_sum = 0, bins = 0;
  const auto step = [&](int next, T e, T other) {
    sum += e;
    other_sum += other;
    bins += T(1);
    if (next < num_bins && t >= multiply_add(bins, floor, sum)) bin = {next, sum, other_sum};
  };
  for (int k = 0; k + 1 < num_bins; k += 2) {
    const auto e = load2(numbers.pair((begin + k) >> 1)), other = load2(numbers.pair((other_begin + k) >> 1));
    step(k + 1, e.x, other.x);
    step(k + 2, e.y, other.y);
  }
  return bin;
}

template <class T>
struct KnotSlopeAt {
  T slope = 1, derivative = 0;  // by the raw number
};

/// At knot k of num_bins + 1: that of the numbers, or 1 at ends that are not free.
template <bool with_derivative, class T, class Rows>
NVPFLOW_DEVICE KnotSlopeAt<T> slope_of_knot(const SplineMap<T>& map, const SplineNumbers<Rows>& numbers, int begin,
                                            int k) {
  const int i = map.free_ends ? k : k - 1;
  if (i < 0 || i >= map.num_slopes) return {};
  const T raw = numbers[begin + i];
  KnotSlopeAt<T> at;
  if (map.exp_slopes) {
    const T r = T(1) / multiply_add(absolute(raw), map.slope_factor, T(1)), e = exponential(raw * r);
    at.slope = e + map.min_slope;
    if constexpr (with_derivative) at.derivative = e * r * r;
  } else {
    const T x = raw + map.offset;
    at.slope = multiply_add(softplus(x), map.gain, map.min_slope);
    if constexpr (with_derivative) at.derivative = sigmoid(x) * map.gain;
  }
  at.slope = at_most(at_least(at.slope, kLeastSlope<T>), kMostSlope<T>);
  return at;
}

/// An element in its bin. Outside of the interval only the slope at the end counts, which is `first` then.
template <class T>
struct SplineSpot {
  bool low, high;                     // outside
  int index;                          // of the bin
  T widths_before, heights_before;    // sums of e
  T width, height;                    // of the bin, not normalized
  T inverse_widths, inverse_heights;  // 1 / norm
  KnotSlopeAt<T> first, second;       // at its knots
  T xi, b, s;                         // place in the bin, 1 - xi, mean slope
};

/// xi and b of the place where eta is this much, and 1 - eta that.
template <class T>
NVPFLOW_DEVICE void solve(T eta, T rest, SplineSpot<T>& at) {
  const T d0 = at.first.slope, d1 = at.second.slope;
  const T p = d0 * rest - d1 * eta, q = at.s * eta * T(2), r = at.s * rest * T(2);
  const T m = square_root(multiply_add(p, p, q * r)) + absolute(p);
  const T first = p >= T(0) ? q : m, second = p >= T(0) ? m : r;
  const T inverse = T(1) / (first + second);
  at.xi = first * inverse;
  at.b = second * inverse;
}

/// Where `in` lies, after exponentiate().
template <bool with_derivative, class T, class Rows>
NVPFLOW_DEVICE SplineSpot<T> find_spot(const SplineMap<T>& map, const SplineNumbers<Rows>& numbers,
                                       const SplineSizes<T>& widths, const SplineSizes<T>& heights, bool inverse,
                                       T in) {
  const SplinePlaces at(map);
  // Chosen number by number: a reference to one of the two would put both in memory.
  const T norm = inverse ? heights.norm : widths.norm, floor = inverse ? heights.floor : widths.floor;
  const T t = (at_least(at_most(in, map.upper), map.lower) - map.lower) * (norm * map.inverse_span);
  const SplineBin<T> bin =
      find_bin(numbers, inverse ? at.heights : at.widths, inverse ? at.widths : at.heights, map.num_bins, floor, t);
  SplineSpot<T> spot;
  spot.low = in < map.lower;
  spot.high = in > map.upper;
  spot.index = bin.index;
  spot.widths_before = inverse ? bin.other_before : bin.before;
  spot.heights_before = inverse ? bin.before : bin.other_before;
  spot.width = numbers[at.widths + bin.index] + widths.floor;
  spot.height = numbers[at.heights + bin.index] + heights.floor;
  spot.inverse_widths = T(1) / widths.norm;
  spot.inverse_heights = T(1) / heights.norm;
  const int knot = spot.low ? 0 : spot.high ? map.num_bins : bin.index;
  spot.first = slope_of_knot<with_derivative>(map, numbers, at.slopes, knot);
  spot.second = slope_of_knot<with_derivative>(map, numbers, at.slopes, bin.index + 1);
  spot.s = spot.height * spot.inverse_heights * (widths.norm / spot.width);
  const T left = multiply_add(static_cast<T>(bin.index), floor, bin.before);
  const T within = at_most(at_least((t - left) / (inverse ? spot.height : spot.width), T(0)), T(1));
  if (inverse) {
    solve(within, T(1) - within, spot);
  } else {
    spot.xi = within;
    spot.b = T(1) - within;
  }
  return spot;
}

/// What becomes of an element, and the logarithm of the derivative of that.
template <class T>
struct SplineValue {
  T out, log_slope;
};

/// In the bin.
template <class T>
NVPFLOW_DEVICE SplineValue<T> value_inside(const SplineMap<T>& map, const SplineSpot<T>& at,
                                           const SplineSizes<T>& widths, const SplineSizes<T>& heights, bool inverse) {
  const T d0 = at.first.slope, d1 = at.second.slope, both = at.xi * at.b;
  const T n1 = multiply_add(at.s * at.xi, at.xi, d0 * both), n2 = multiply_add(at.s * at.b, at.b, d1 * both);
  const T r = T(1) / (n1 + n2), share = at.s * r;
  const T m = multiply_add(d1 * at.xi, at.xi, multiply_add(at.s * T(2), both, d0 * at.b * at.b));
  const T slope = m * share * share;
  const T log_slope = slope < infinity<T>() ? logarithm(slope) : slope;  // NaN and infinity stay
  const auto out = [&](T size, T place, T floor, T before, T inverse_norm) {
    const T left = multiply_add(static_cast<T>(at.index), floor, before);
    // A rounding beyond the end there is another map, or no density. Below the other end none can take it.
    return at_most(multiply_add(multiply_add(size, place, left) * inverse_norm, map.span, map.lower), map.upper);
  };
  if (inverse) return {out(at.width, at.xi, widths.floor, at.widths_before, at.inverse_widths), -log_slope};
  return {out(at.height, n1 * r, heights.floor, at.heights_before, at.inverse_heights), log_slope};
}

/// Outside: the identity, or a straight line with the slope at the end.
template <class T>
NVPFLOW_DEVICE SplineValue<T> value_outside(const SplineMap<T>& map, const SplineSpot<T>& at, bool inverse, T in) {
  if (!map.slope_tails) return {in, T(0)};
  const T edge = at.high ? map.upper : map.lower, d = at.first.slope;
  const T log_slope = d < infinity<T>() ? logarithm(d) : d;
  if (inverse) return {edge + (in - edge) / d, -log_slope};
  return {multiply_add(in - edge, d, edge), log_slope};
}

/// keep: of exponentiate(), told which of the axes it is.
template <class T, class Rows, class Keep>
NVPFLOW_DEVICE SplineValue<T> spline_value(const SplineMap<T>& map, const SplineNumbers<Rows>& numbers, bool inverse,
                                           T in, Keep keep) {
  const SplinePlaces at(map);
  const int bins = map.num_bins;
  const SplineSizes<T> widths(exponentiate(map, numbers, at.widths, [&](int k, T d) { keep(k, d); }), map.width_floor,
                              bins);
  const SplineSizes<T> heights(exponentiate(map, numbers, at.heights, [&](int k, T d) { keep(bins + k, d); }),
                               map.height_floor, bins);
  const SplineSpot<T> spot = find_spot<false>(map, numbers, widths, heights, inverse, in);
  if (spot.low || spot.high) return value_outside(map, spot, inverse, in);
  if (in != in) return {in, in};
  return value_inside(map, spot, widths, heights, inverse);
}

// ---- the way back of one element -----------------------------------------------------------------------------------

/// Cotangents of what the map of a bin is made of, of widths and heights as shares of the interval.
template <class T>
struct BinCotangents {
  T left = 0, width = 0, lower = 0, height = 0, first_slope = 0, second_slope = 0, in = 0;
};

/// From the cotangents of what went out and of its log-slope. A formula v' below is dv / d(xi, s, d0, d1); the inverse
/// follows from the implicit function, dx = (dy - f_theta dtheta) / f'.
template <class T>
NVPFLOW_DEVICE BinCotangents<T> back_inside(const SplineMap<T>& map, const SplineSpot<T>& at, bool inverse, T g_out,
                                            T g_log) {
  const T xi = at.xi, b = at.b, s = at.s, d0 = at.first.slope, d1 = at.second.slope;
  const T width = at.width * at.inverse_widths, height = at.height * at.inverse_heights;
  const T both = xi * b, xi2 = xi * xi, b2 = b * b, apart = b - xi;
  const T n1 = multiply_add(s, xi2, d0 * both), n2 = multiply_add(s, b2, d1 * both);
  const T r = T(1) / (n1 + n2);
  const T m = multiply_add(d1, xi2, multiply_add(s * T(2), both, d0 * b2)), by_m = T(1) / m;
  const T inverse_width = T(1) / width;
  const T log_xi =
      T(2) * (multiply_add(d1, xi, multiply_add(s, apart, -(d0 * b))) * by_m - apart * (d0 + d1 - T(2) * s) * r);
  const T share = s * r, slope = m * share * share;
  BinCotangents<T> g;
  if (inverse) {
    g_log = -g_log;  // of the forward map's log-slope
    g.in = multiply_add(g_log, log_xi * inverse_width * map.inverse_span, g_out) / slope;
    g_out = -g.in;
  }
  const T g_y = g_out * map.span, g_eta = g_y * height * r, twice = T(2) * both * r;
  const T g_xi = multiply_add(g_eta, m * share, g_log * log_xi);
  const T log_s = T(2) * (T(1) / s + both * by_m - (xi2 + b2) * r);
  const T g_s = multiply_add(g_eta, both * multiply_add(d1, xi2, -(d0 * b2)) * r, g_log * log_s);
  g.first_slope = multiply_add(g_eta, both * n2 * r, g_log * multiply_add(b2, by_m, -twice));
  g.second_slope = multiply_add(-g_eta, both * n1 * r, g_log * multiply_add(xi2, by_m, -twice));
  g.left = -g_xi * inverse_width;
  g.width = -multiply_add(g_s, s, g_xi * xi) * inverse_width;
  g.lower = g_y;
  g.height = multiply_add(g_y, n1 * r, g_s * inverse_width);
  if (!inverse) g.in = g_xi * inverse_width * map.inverse_span;
  return g;
}

template <class T>
NVPFLOW_DEVICE BinCotangents<T> back_outside(const SplineMap<T>& map, const SplineSpot<T>& at, bool inverse, T in,
                                             T g_out, T g_log) {
  BinCotangents<T> g;
  g.in = g_out;
  if (!map.slope_tails) return g;
  const T d = at.first.slope, distance = in - (at.high ? map.upper : map.lower);
  g.in = inverse ? g_out / d : g_out * d;
  g.first_slope = inverse ? -(g.in * (distance / d) + g_log / d) : multiply_add(g_out, distance, g_log / d);
  return g;
}

/// The cotangents of raw sizes in the places of their e, back through the softmax: from those of what lies before bin
/// `index`, and of its own size. before: the sum of e there; derivative(k): of the squashed sizes.
template <class T, class Rows, class Derivative>
NVPFLOW_DEVICE void sizes_back(const SplineMap<T>& map, const SplineNumbers<Rows>& numbers, int begin, T share,
                               T inverse_sum, int index, T before, T left, T own, Derivative derivative) {
  const T dot = inverse_sum * multiply_add(left, before, own * numbers[begin + index]);
  numbers.change(begin, map.num_bins, [&](int k, T e) {
    const T g = e * inverse_sum * share * ((k < index ? left : k == index ? own : T(0)) - dot);
    return map.squashed ? g * derivative(k) : g;
  });
}

/// g: the cotangent of what went out of an element, to that of `in`, which came in; those of its numbers take the
/// places of what spline_value() left there. derivative(k): what that kept.
template <class T, class Rows, class Derivative>
NVPFLOW_DEVICE T spline_back(const SplineMap<T>& map, const SplineNumbers<Rows>& numbers, bool inverse, T in, T g_out,
                             T g_log, Derivative derivative) {
  const SplinePlaces at(map);
  const int bins = map.num_bins;
  T width_sum = 0, height_sum = 0;
  numbers.each(at.widths, bins, [&](int, T e) { width_sum += e; });
  numbers.each(at.heights, bins, [&](int, T e) { height_sum += e; });
  const SplineSizes<T> widths(width_sum, map.width_floor, bins), heights(height_sum, map.height_floor, bins);
  const SplineSpot<T> spot = find_spot<true>(map, numbers, widths, heights, inverse, in);
  const bool outside = spot.low || spot.high;
  const BinCotangents<T> g =
      outside ? back_outside(map, spot, inverse, in, g_out, g_log) : back_inside(map, spot, inverse, g_out, g_log);
  sizes_back(map, numbers, at.widths, map.width_share, T(1) / width_sum, spot.index, spot.widths_before, g.left,
             g.width, derivative);
  sizes_back(map, numbers, at.heights, map.height_share, T(1) / height_sum, spot.index, spot.heights_before, g.lower,
             g.height, [&](int k) { return derivative(bins + k); });
  const int first = spot.low ? 0 : spot.high ? bins : spot.index, knots_before = map.free_ends ? 0 : 1;
  const T of_first = g.first_slope * spot.first.derivative, of_second = g.second_slope * spot.second.derivative;
  numbers.change(at.slopes, map.num_slopes, [&](int i, T) {
    const int knot = i + knots_before;
    return knot == first ? of_first : knot == spot.index + 1 && !outside ? of_second : T(0);
  });
  return g.in;
}

// ---- the elements of a tile ----------------------------------------------------------------------------------------

/// visit(r, j) for the elements that fall to the thread: transformed feature j of row r.
template <class Walk, class T, class Visit>
NVPFLOW_DEVICE void each_element(const Walk& walk, const Layer<T>& layer, Visit visit) {
  const int rows = walk.tile.rows, count = rows * layer.num_outputs;
  const Team team = walk.team();
  for (int e = team.index; e < count; e += team.size) {
    const int j = e / rows;
    visit(e - j * rows, j);
  }
}

/// run(r, j, numbers) for each element, whose numbers lie in `array`.
template <class Walk, class T, class Run>
NVPFLOW_DEVICE void each_spline(const Walk& walk, const Layer<T>& layer, T* array, Run run) {
  const SplinePlaces at(layer.spline);
  const typename Walk::Rows rows(array, 0);
  const int blocks = layer.num_outputs * (at.stride / 8);
  each_element(walk, layer, [&](int r, int j) { run(r, j, SplineNumbers(rows, at, blocks, r, j)); });
}

/// The numbers that are the same for all rows, where a network would leave its own.
template <class Walk, class T>
NVPFLOW_DEVICE void spread_constants(const Walk& walk, const Layer<T>& layer, T* to) {
  const Dense& d = walk.program.dense[numbers_dense(layer)];
  const T* from = walk.packed + d.bias;
  const int rows = walk.tile.rows, blocks = blocks_of(d.out);
  const Team team = walk.team();
  for (int e = team.index; e < rows * d.out; e += team.size) {
    const int f = e / rows;
    to[place(e - f * rows, f, blocks)] = from[f];
  }
}

/// Adds what at(r, j) says of the elements to the lane's log-determinants.
template <class Walk, class T, class At>
NVPFLOW_DEVICE void add_log_slopes(Walk& walk, const Layer<T>& layer, At at) {
  for (int j = 4 * walk.across + walk.lane.t; j < layer.num_outputs; j += 4 * walk.plan.warps_across) {
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) {
      NVPFLOW_UNROLL
      for (int low = 0; low < 2; ++low) {
        walk.log_det[rb][low] += at(16 * (walk.row_block + rb) + walk.lane.g + 8 * low, j);
      }
    }
  }
}

/// A spline layer, after its network. Whoever wrote the tile, or the numbers, need not have met the others of the
/// block.
template <class Walk, class T>
NVPFLOW_DEVICE void splines(Walk& walk, const Layer<T>& layer) {
  const bool inverse = is_backwards(walk, layer);
  const Dense& d = walk.program.dense[numbers_dense(layer)];
  T* array = numbers_of(walk);
  walk.barrier();
  if (layer.num_dense == 0) {
    spread_constants(walk, layer, array);
    walk.barrier();
  }
  each_spline(walk, layer, array, [&](int r, int j, const auto& numbers) {
    T& x = walk.tile.template transformed<true>(walk.program, layer, j).at(r);
    const SplineValue<T> value = spline_value(layer.spline, numbers, inverse, x, [](int, T) {});
    x = value.out;
    numbers[0] = value.log_slope;  // they are not read any more
  });
  walk.barrier();
  const int blocks = blocks_of(d.out), stride = SplinePlaces(layer.spline).stride;
  add_log_slopes(walk, layer, [&](int r, int j) { return array[place(r, j * stride, blocks)]; });
}

/// The derivatives of an element's squashed sizes, on the tape.
template <class Walk, class T>
struct SquashDerivatives {
  T* first;
  int rows;

  NVPFLOW_DEVICE SquashDerivatives(const Walk& walk, const Layer<T>& layer, T* array, int r, int j)
      : first(array + static_cast<std::int64_t>(j) * 2 * layer.spline.num_bins * walk.tile.rows + r),
        rows(walk.tile.rows) {}
  NVPFLOW_DEVICE T& operator[](int k) const { return first[k * rows]; }
};

/// The same, with what the way back needs.
template <class Walk, class T>
NVPFLOW_DEVICE void splines_taped(Walk& walk, const Layer<T>& layer, T* part) {
  const NetworksTape<T> keep(walk.program, layer, walk.plan.tile_rows);
  const bool inverse = is_backwards(walk, layer);
  const int blocks = blocks_of(layer.num_outputs);
  if (layer.num_dense == 0) spread_constants(walk, layer, part + keep.numbers());
  walk.barrier();
  each_spline(walk, layer, part + keep.numbers(), [&](int r, int j, const auto& numbers) {
    T& x = walk.tile.template transformed<true>(walk.program, layer, j).at(r);
    const SquashDerivatives<Walk, T> squash(walk, layer, part + keep.squash(), r, j);
    part[keep.in() + place(r, j, blocks)] = x;
    const SplineValue<T> value =
        spline_value(layer.spline, numbers, inverse, x, [&](int k, T derivative) { squash[k] = derivative; });
    x = value.out;
    part[keep.log_slope() + place(r, j, blocks)] = value.log_slope;
  });
  walk.barrier();
  add_log_slopes(walk, layer, [&](int r, int j) { return part[keep.log_slope() + place(r, j, blocks)]; });
}

/// From the cotangent of the layer's output to that of its input, in place, and to that of the numbers.
template <class Walk, class T>
NVPFLOW_DEVICE void splines_backward(Walk& walk, const Layer<T>& layer, T* part) {
  const NetworksTape<T> keep(walk.program, layer, walk.plan.tile_rows);
  const bool inverse = is_backwards(walk, layer);
  const int blocks = blocks_of(layer.num_outputs);
  each_spline(walk, layer, part + keep.numbers(), [&](int r, int j, const auto& numbers) {
    T& g = walk.cotangents.template transformed<true>(walk.program, layer, j).at(r);
    const SquashDerivatives<Walk, T> squash(walk, layer, part + keep.squash(), r, j);
    g = spline_back(layer.spline, numbers, inverse, part[keep.in() + place(r, j, blocks)], g, walk.log_det_cotangent[r],
                    [&](int k) { return squash[k]; });
  });
}

}  // namespace nvpflow::cuda
