// What a spline costs: nanoseconds per transformed feature and row of run_splines and spline_back, each checked before
// it is timed. One thread; the best of many short runs. One program for each instruction set, with the library's own
// flags:
//
//   cmake -S . -B build -DNVPFLOW_TESTS=ON && cmake --build build --target spline_speed
//   build/tests/spline_speed_avx512 && build/tests/spline_speed_avx2 && build/tests/spline_speed_baseline

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "cpu/kernels.hpp"
#include "cpu/spline.inl"
#include "spline_map.hpp"

namespace {

using namespace nvpflow::cpu;
using nvpflow::SplineMap;
using Clock = std::chrono::steady_clock;

constexpr std::int64_t kElements = 3 * 48;  // three features of a tile's rows; whole vectors on every instruction set

/// Seconds of one call: the best of 40 runs of about a millisecond.
template <class F>
double seconds(F&& f) {
  double best = 1e9;
  for (int run = 0; run < 40; ++run) {
    const auto start = Clock::now();
    double passed = 0;
    int calls = 0;
    for (; passed < 1e-3; calls += 8) {
      for (int i = 0; i < 8; ++i) f();
      passed = std::chrono::duration<double>(Clock::now() - start).count();
    }
    best = std::min(best, passed / calls);
  }
  return best;
}

/// 64-byte aligned numbers, NaN at first.
template <class T>
class Numbers {
 public:
  explicit Numbers(std::int64_t count)
      : count_(count),
        data_(static_cast<T*>(std::aligned_alloc(64, (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64))) {
    std::fill_n(data_, count_, static_cast<T>(std::nan("")));
  }
  ~Numbers() { std::free(data_); }
  Numbers(const Numbers&) = delete;
  Numbers& operator=(const Numbers&) = delete;
  operator T*() { return data_; }

  void draw(std::mt19937& generator, double scale) {
    std::normal_distribution<double> normal(0, scale);
    std::generate_n(data_, count_, [&] { return static_cast<T>(normal(generator)); });
  }
  void take(Numbers& other) { std::copy_n(other.data_, count_, data_); }
  void clear() { std::fill_n(data_, count_, T(0)); }

 private:
  std::int64_t count_;
  T* data_;
};

/// Spline of <nvpflow/layers.hpp> with all its defaults but the number of bins.
template <class T>
SplineMap<T> map_of(int bins) {
  SplineMap<T> map;
  map.num_bins = bins;
  map.num_slopes = bins - 1;
  map.lower = -3;
  map.upper = 3;
  map.span = 6;
  map.inverse_span = T(1) / 6;
  const double least = 1e-3, share = 1 - bins * least;
  map.width_share = map.height_share = static_cast<T>(share);
  map.width_floor = map.height_floor = static_cast<T>(least / share);
  map.min_slope = static_cast<T>(least);
  map.offset = static_cast<T>(std::log(std::expm1(1 - least)));
  return map;
}

/// Splines of so many bins with random numbers, and the room that the kernels want.
template <class T>
class Splines {
 public:
  explicit Splines(int bins)
      : map_(map_of<T>(bins)),
        raw_((3 * bins - 1) * kElements),
        u_((3 * bins - 1) * kElements),
        head_((3 * bins - 1) * kElements),
        given_(kElements),
        x_(kElements),
        log_det_(kElements),
        arrays_(SplineTape<T>::kArrays * kElements),
        tape_(arrays_, kElements) {
    std::mt19937 generator(1);
    raw_.draw(generator, 0.3);  // few bins are narrow: all digits that are asked for can be had
    given_.draw(generator, 1);
    restart();
  }

  void restart() {
    u_.take(raw_);
    x_.take(given_);
    log_det_.clear();
  }
  void forward() { run_splines<T, false, false>(map_, elements(), nullptr, 0); }
  void inverse() { run_splines<T, true, false>(map_, elements(), nullptr, 0); }
  void taped() { run_splines<T, false, true>(map_, elements(), &tape_, 0); }
  /// From cotangents of 1 of what comes out, and of 0 of its log-slopes, to x.
  void back() {
    for (std::int64_t i = 0; i < kElements; i += kLanes<T>) {
      store<T>(x_ + i, spline_back<T, false>(map_, u_ + i, kElements, tape_, i, set1(T(1)), Vec<T>{}, head_ + i));
    }
  }

  /// The inverse finds what the forward map was given; the tape changes no bit; the gradient is the slope.
  bool right() {
    const double limit = sizeof(T) == 4 ? 2e-5 : 1e-13;
    restart(), forward();
    Numbers<T> out(kElements), log_slopes(kElements);
    out.take(x_), log_slopes.take(log_det_);
    inverse();
    const bool found = within(limit, [&](std::int64_t i) { return x_[i] - given_[i]; });
    restart(), taped();
    const bool same = std::memcmp(x_, out, sizeof(T) * kElements) == 0;
    back();
    return found && same && within(limit, [&](std::int64_t i) { return std::log(x_[i]) - log_slopes[i]; });
  }

 private:
  SplineElements<T> elements() { return {u_, x_, log_det_, kElements, kElements}; }
  template <class Difference>
  static bool within(double limit, Difference&& difference) {
    for (std::int64_t i = 0; i < kElements; ++i) {
      if (!(std::abs(static_cast<double>(difference(i))) <= limit)) return false;
    }
    return true;
  }

  SplineMap<T> map_;
  Numbers<T> raw_, u_, head_, given_, x_, log_det_, arrays_;
  SplineTape<T> tape_;
};

/// Times are the same whatever the numbers are: nothing is put back between calls.
template <class T>
bool row(int bins) {
  Splines<T> splines(bins);
  const bool good = splines.right();
  const auto time = [](auto&& f) { return seconds(f) * 1e9 / kElements; };
  const double forward = time([&] { splines.forward(); }), inverse = time([&] { splines.inverse(); });
  const double taped = time([&] { splines.taped(); }), back = time([&] { splines.back(); });
  std::printf("%-7s %4d %8.2f %8.2f %8.2f %8.2f%s\n", sizeof(T) == 4 ? "float32" : "float64", bins, forward, inverse,
              taped, back, good ? "" : "  WRONG");
  return good;
}

}  // namespace

int main() {
  std::printf("ns per feature and row, vectors of %d floats\n", kLanes<float>);
  std::printf("%-7s %4s %8s %8s %8s %8s\n", "", "bins", "forward", "inverse", "taped", "back");
  bool good = true;
  for (const int bins : {8, 10}) {
    good = row<float>(bins) && good;
    good = row<double>(bins) && good;
  }
  return good ? 0 : 1;
}
