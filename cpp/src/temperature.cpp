// Calls at a temperature: those of the flow whose base is N(0, T I). Outside of the kernels, in chunks of rows, so that
// calls without one are as they were.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <sstream>
#include <string>
#include <vector>

#include <nvpflow/base.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/execution.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/spec.hpp>

#include "float_mode.hpp"
#include "flow_access.hpp"
#include "layers/layer.hpp"
#include "parallel.hpp"

namespace nvpflow {
namespace {

/// Latents that are kept at a time, and rows that are worth a thread of their own.
constexpr std::int64_t kElements = std::int64_t{1} << 20, kGrain = 1 << 12;

void check(const Flow& flow, double temperature, const Execution& how) {
  constexpr double kLeast = 1e-12, kMost = 1e12;  // beyond, latents or their squares leave float32
  std::ostringstream text;
  text << "temperature is " << temperature << ", ";
  if (!(temperature >= kLeast && temperature <= kMost)) {
    throw Error(ErrorCode::invalid_argument, text.str() + "expected a number from 1e-12 to 1e12");
  }
  if (!layers::facts_of(flow.spec().base).has_temperature) {
    throw Error(ErrorCode::invalid_argument,
                text.str() + "expected 1: only a normal base has a temperature, and this flow's is another one");
  }
  if (const Bounds* bounds = flow.spec().bounds(); bounds != nullptr && !bounds->discrete.empty()) {
    throw Error(ErrorCode::invalid_argument,
                text.str() + "expected 1: the flow has discrete columns, whose samples are rounded");
  }
  if (how.device_arrays) {
    throw Error(ErrorCode::invalid_argument,
                text.str() +
                    "expected 1 for arrays of a device; pass arrays of the host, or scale the latents of "
                    "forward and inverse yourself");
  }
}

/// Arrays of one call from a row on.
class Cursor {
 public:
  Cursor(const FlowSpec& spec, const Execution& how)
      : data_row_(spec.input_size * (how.float64_rows ? 8 : size_of(spec.dtype))),
        number_(size_of(spec.dtype)),
        context_row_(spec.context_size * number_) {}

  const void* data(const void* x, std::int64_t row) const { return at(x, row * data_row_); }
  void* data(void* x, std::int64_t row) const { return at(x, row * data_row_); }
  void* number(void* values, std::int64_t row) const { return at(values, row * number_); }
  /// How many rows from `first` on a call can take that goes by one ContextRows, at most `count`.
  static std::int64_t together(const ContextRows& context, std::int64_t first, std::int64_t count) {
    if (context.repeat == 1 || context.repeat == ContextRows::kForAll) return count;
    const std::int64_t left = context.repeat - first % context.repeat;
    const bool whole = left == context.repeat && count > left;
    return whole ? count / context.repeat * context.repeat : std::min(count, left);
  }
  /// Of the rows from `first` on, as many as together() says.
  ContextRows context(const ContextRows& whole, std::int64_t first) const {
    ContextRows part = whole;
    if (whole.repeat == ContextRows::kForAll) return part;
    part.rows = at(whole.rows, first / whole.repeat * context_row_);
    if (first % whole.repeat != 0) part.repeat = ContextRows::kForAll;  // the rest of one context's rows
    return part;
  }

 private:
  static const void* at(const void* p, std::int64_t bytes) {
    return p == nullptr ? nullptr : static_cast<const unsigned char*>(p) + bytes;
  }
  static void* at(void* p, std::int64_t bytes) {
    return p == nullptr ? nullptr : static_cast<unsigned char*>(p) + bytes;
  }

  std::int64_t data_row_, number_, context_row_;
};

/// log N(z; 0, T I) of rows z [., D], in float64.
template <class T>
class TemperedNormal {
 public:
  TemperedNormal(double temperature, std::int64_t features)
      : features_(features),
        factor_(-0.5 / temperature),
        constant_(-0.5 * static_cast<double>(features) * std::log(2 * std::numbers::pi * temperature)) {}

  double operator()(const T* z) const {
    double square = 0;
    for (std::int64_t j = 0; j < features_; ++j) square += static_cast<double>(z[j]) * static_cast<double>(z[j]);
    return constant_ + factor_ * square;
  }

 private:
  std::int64_t features_;
  double factor_, constant_;
};

/// log p of rows from their latents, replacing log_det: sign * log_det is that of data -> latent. A row whose
/// log-determinant is NaN had NaN or inf; of any other one log p is never NaN.
template <class T>
void replace_log_det(const TemperedNormal<T>& density, const T* z, std::int64_t features, double sign, T* log_det,
                     std::int64_t rows, int threads) {
  parallel_for(rows, kGrain, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      if (std::isnan(log_det[r])) continue;
      const double log_p = density(z + r * features) + sign * static_cast<double>(log_det[r]);
      log_det[r] = static_cast<T>(std::isnan(log_p) ? -HUGE_VAL : log_p);
    }
  });
}

/// Calls f(first, rows, latents, execution) for the rows in chunks, which share a buffer of latents.
template <class T, class F>
void each_chunk(const Flow& flow, std::int64_t rows, const Execution& how, F&& f) {
  const std::int64_t features = flow.spec().input_size;
  const std::int64_t most = std::clamp<std::int64_t>(kElements / features, 1, std::max<std::int64_t>(1, rows));
  std::vector<T> latents(static_cast<std::size_t>(most * features));
  const Cursor cursor(flow.spec(), how);
  for (std::int64_t first = 0, count = 0; first < rows; first += count) {
    count = Cursor::together(how.context, first, std::min(most, rows - first));
    Execution part = how;
    part.context = cursor.context(how.context, first);
    if (part.threads == 0) part.threads = FlowAccess::threads(flow);
    f(first, count, latents.data(), part, cursor);
  }
}

template <class T>
void log_prob_of(const Flow& flow, double temperature, const void* x, std::int64_t rows, void* out,
                 const Execution& how) {
  const std::int64_t features = flow.spec().input_size;
  const TemperedNormal<T> density(temperature, features);
  each_chunk<T>(flow, rows, how,
                [&](std::int64_t first, std::int64_t count, T* z, const Execution& part, const Cursor& cursor) {
                  auto* log_p = static_cast<T*>(cursor.number(out, first));
                  flow.transform_unchecked(Direction::forward, cursor.data(x, first), count, z, log_p, part);
                  replace_log_det(density, z, features, 1, log_p, count, part.threads);
                });
}

template <class T>
void sample_of(const Flow& flow, double temperature, std::uint64_t seed, std::uint64_t first_row, std::int64_t rows,
               void* x, void* log_prob, const Execution& how) {
  const std::int64_t features = flow.spec().input_size;
  const TemperedNormal<T> density(temperature, features);
  const auto deviation = static_cast<T>(std::sqrt(temperature));
  each_chunk<T>(
      flow, rows, how, [&](std::int64_t first, std::int64_t count, T* z, const Execution& part, const Cursor& cursor) {
        flow.noise_unchecked(seed, first_row + static_cast<std::uint64_t>(first), count, z, Execution(part.threads));
        for (std::int64_t i = 0; i < count * features; ++i) z[i] *= deviation;
        auto* log_p = static_cast<T*>(cursor.number(log_prob, first));
        flow.transform_unchecked(Direction::inverse, z, count, cursor.data(x, first), log_p, part);
        if (log_p != nullptr) replace_log_det(density, z, features, -1, log_p, count, part.threads);
      });
}

}  // namespace

void Flow::tempered_log_prob_unchecked(double temperature, const void* x, std::int64_t rows, void* out,
                                       const Execution& how) const {
  if (temperature == 1) return log_prob_unchecked(x, rows, out, how);
  check(*this, temperature, how);
  const FloatMode mode;
  if (spec().dtype == DType::float32) return log_prob_of<float>(*this, temperature, x, rows, out, how);
  log_prob_of<double>(*this, temperature, x, rows, out, how);
}

void Flow::tempered_sample_unchecked(double temperature, std::uint64_t seed, std::uint64_t first_row, std::int64_t rows,
                                     void* x, void* log_prob, const Execution& how) const {
  if (temperature == 1) return sample_unchecked(seed, first_row, rows, x, log_prob, how);
  check(*this, temperature, how);
  const FloatMode mode;
  if (spec().dtype == DType::float32) {
    return sample_of<float>(*this, temperature, seed, first_row, rows, x, log_prob, how);
  }
  sample_of<double>(*this, temperature, seed, first_row, rows, x, log_prob, how);
}

}  // namespace nvpflow
