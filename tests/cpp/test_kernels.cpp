// nvpflow::Flow against the naive oracle: values, both directions, gradients, threads, sampling, bad spans.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <type_traits>
#include <variant>
#include <vector>

#include <nvpflow/flow.hpp>
#include <nvpflow/train.hpp>

#include "cpu/isa.hpp"
#include "cpu/kernels.hpp"
#include "cpu/packed.hpp"
#include "memory.hpp"
#include "mixed_spec.hpp"
#include "oracle.hpp"

namespace {

namespace cpu = nvpflow::cpu;
using nvpflow::Activation;
using nvpflow::AlignedBuffer;
using nvpflow::Direction;
using nvpflow::DType;
using nvpflow::ErrorCode;
using nvpflow::Flow;
using nvpflow::FlowSpec;
using nvpflow::mixed_spec;
using nvpflow::ParamLayout;
using nvpflow::Weights;

template <class T>
constexpr DType dtype_of = std::is_same_v<T, float> ? DType::float32 : DType::float64;
/// |result - oracle| <= kBudget (1 + |oracle|)
template <class T>
constexpr double kBudget = std::is_same_v<T, float> ? 1e-5 : 1e-12;
template <class T>
constexpr T kPoison = std::numeric_limits<T>::quiet_NaN();

struct Shape {
  std::int64_t input_size, num_flows;
  std::vector<std::int64_t> hidden_sizes;
  Activation activation;
  double scale_bound = 1.0;
  bool standardize = false;
};

const std::vector<Shape> kShapes = {
    {2, 1, {}, Activation::relu},
    {2, 3, {1}, Activation::relu},
    {3, 2, {3}, Activation::leaky_relu},
    {3, 8, {7, 5}, Activation::silu},
    {5, 4, {16, 17, 18}, Activation::elu, 2.0, true},
    {6, 1, {64}, Activation::gelu},
    {7, 3, {7, 5}, Activation::tanh, 0.5},
    {16, 4, {128}, Activation::relu},
    {17, 2, {100, 100}, Activation::softplus, 1.0, true},
    {31, 3, {33}, Activation::sigmoid},
    {64, 2, {}, Activation::tanh, 1.5},
    {101, 2, {65}, Activation::gelu, 1.0, true},
    {257, 1, {1025}, Activation::leaky_relu},
    {64, 2, {512, 512}, Activation::relu},  // in float32 already beyond the second-level cache
};
const std::vector<std::int64_t> kBatches = {0,  1,  2,  3,  5,  7,  8,  15, 16, 17, 31,
                                            32, 33, 47, 48, 49, 63, 64, 65, 97, 129};

template <class T>
FlowSpec spec_of(const Shape& shape) {
  return FlowSpec::real_nvp(shape.input_size, shape.num_flows, shape.hidden_sizes, shape.activation, shape.scale_bound,
                            shape.standardize, dtype_of<T>);
}

/// Far from the identity: kernels N(0, 1/in), signs 1 and -1, everything else 0.1 N(0, 1).
template <class T>
std::vector<T> random_parameters(const nvpflow::ParamLayout& layout, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  std::vector<T> parameters(static_cast<std::size_t>(layout.size()));
  for (const nvpflow::TensorInfo& tensor : layout.tensors()) {
    const double scale = tensor.shape.size() == 2 ? 1 / std::sqrt(static_cast<double>(tensor.shape[0])) : 0.1;
    const bool sign = tensor.name.ends_with(".sign");
    for (std::int64_t i = 0; i < tensor.size; ++i) {
      const double value = normal(engine);
      parameters[static_cast<std::size_t>(tensor.offset + i)] =
          static_cast<T>(sign ? std::copysign(1.0, value) : scale * value);
    }
  }
  return parameters;
}

template <class T>
std::vector<T> random_values(std::int64_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  std::vector<T> values(static_cast<std::size_t>(count));
  for (T& value : values) value = static_cast<T>(normal(engine));
  return values;
}

template <class T>
std::vector<double> widened(std::span<const T> values) {
  return {values.begin(), values.end()};
}

template <class T>
std::vector<double> row_of(const std::vector<T>& values, std::int64_t row, std::int64_t width) {
  return widened(
      std::span<const T>(values).subspan(static_cast<std::size_t>(row * width), static_cast<std::size_t>(width)));
}

/// A flow with random parameters and the oracle that holds the same ones.
template <class T>
struct Pair {
  explicit Pair(const Shape& shape, unsigned seed = 1)
      : flow(spec_of<T>(shape)), oracle(make(seed)), width(shape.input_size) {}

  oracle::Flow make(unsigned seed) {
    const std::vector<T> parameters = random_parameters<T>(flow.layout(), static_cast<unsigned>(seed));
    flow.template set_parameters<T>(parameters);
    return {flow.spec(), widened<T>(parameters)};
  }

  Flow flow;
  oracle::Flow oracle;
  std::int64_t width;
};

bool within(double actual, double expected, double budget) {
  return std::fabs(actual - expected) <= budget * (1 + std::fabs(expected));  // false for NaN
}

template <class T>
bool same_bits(std::span<const T> left, std::span<const T> right) {
  if (left.size() != right.size()) return false;
  return left.empty() || std::memcmp(left.data(), right.data(), left.size_bytes()) == 0;
}

template <class Function>
void check_throws_code(ErrorCode code, const std::string& mentions, Function&& function) {
  try {
    function();
  } catch (const nvpflow::Error& error) {
    CHECK(error.code() == code);
    CHECK_MESSAGE(std::string(error.what()).find(mentions) != std::string::npos,
                  "'" << error.what() << "' does not mention '" << mentions << "'");
    return;
  }
  FAIL("no nvpflow::Error");
}

}  // namespace

TEST_CASE_TEMPLATE("forward, inverse and log_prob agree with the oracle", T, float, double) {
  for (const Shape& shape : kShapes) {
    CAPTURE(shape.input_size);
    CAPTURE(shape.num_flows);
    CAPTURE(nvpflow::name_of(shape.activation));
    Pair<T> pair(shape);
    const std::int64_t most = kBatches.back(), width = pair.width;
    const std::vector<T> x = random_values<T>(most * width, 2);
    std::vector<oracle::Flow::Result> forward, inverse;
    for (std::int64_t row = 0; row < most; ++row) {
      forward.push_back(pair.oracle.forward(row_of(x, row, width)));
      inverse.push_back(pair.oracle.inverse(row_of(x, row, width)));
    }
    for (const std::int64_t batch : kBatches) {
      CAPTURE(batch);
      const std::span<const T> in(x.data(), static_cast<std::size_t>(batch * width));
      std::vector<T> z(in.size(), kPoison<T>), back(in.size(), kPoison<T>);
      std::vector<T> log_det(static_cast<std::size_t>(batch), kPoison<T>), inverse_log_det = log_det,
                                                                           log_prob = log_det;
      pair.flow.template forward<T>(in, z, log_det);
      pair.flow.template inverse<T>(in, back, inverse_log_det);
      pair.flow.template log_prob<T>(in, log_prob);
      std::int64_t wrong = 0;
      for (std::int64_t row = 0; row < batch; ++row) {
        const auto r = static_cast<std::size_t>(row);
        for (std::int64_t d = 0; d < width; ++d) {
          const auto at = static_cast<std::size_t>(row * width + d);
          const auto column = static_cast<std::size_t>(d);
          wrong += !within(z[at], forward[r].values[column], kBudget<T>);
          wrong += !within(back[at], inverse[r].values[column], kBudget<T>);
        }
        wrong += !within(log_det[r], forward[r].log_det, kBudget<T>);
        wrong += !within(inverse_log_det[r], inverse[r].log_det, kBudget<T>);
        wrong += !within(log_prob[r], pair.oracle.log_prob(row_of(x, row, width)), kBudget<T>);
      }
      CHECK(wrong == 0);

      // Not asking for log_det must not change the values.
      std::vector<T> alone(in.size(), kPoison<T>);
      pair.flow.template forward<T>(in, alone);
      CHECK(same_bits<T>(alone, z));
    }
  }
}

TEST_CASE_TEMPLATE("round_trip_error is the largest relative error of any element", T, float, double) {
  for (const Shape& shape : {kShapes[3], kShapes[4], kShapes[11]}) {
    Pair<T> pair(shape);
    const auto width = static_cast<std::size_t>(pair.width);
    // More rows than one block of it holds for the widest shape.
    const std::int64_t rows = 3000;
    std::vector<T> x = random_values<T>(rows * pair.width, 21), z(x.size()), back(x.size());
    pair.flow.template forward<T>(x, z);
    pair.flow.template inverse<T>(z, back);
    const nvpflow::TensorInfo* log_std = pair.flow.layout().find("standardize_0.log_std");
    double expected = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double scale =
          log_std == nullptr
              ? 1
              : std::exp(static_cast<double>(
                    pair.flow.template parameters<T>()[static_cast<std::size_t>(log_std->offset) + i % width]));
      const double from = static_cast<double>(x[i]);
      expected = std::max(expected, std::fabs(static_cast<double>(back[i]) - from) / (scale + std::fabs(from)));
    }
    CHECK(expected > 0);
    CHECK(pair.flow.template round_trip_error<T>(x) == expected);

    // Rows that are not finite do not count; rows that do not come back do.
    std::vector<T> holed = x;
    holed.insert(holed.begin(), x.begin(), x.begin() + pair.width);
    holed[0] = std::numeric_limits<T>::quiet_NaN();
    CHECK(pair.flow.template round_trip_error<T>(holed) == expected);
    holed[0] = std::numeric_limits<T>::max();
    holed[width - 1] = std::numeric_limits<T>::max();
    CHECK(std::isinf(pair.flow.template round_trip_error<T>(holed)));
    CHECK(pair.flow.template round_trip_error<T>({}) == 0);
    check_throws_code(ErrorCode::invalid_argument, "multiple of input_size",
                      [&] { pair.flow.template round_trip_error<T>(std::span<const T>(x).first(width + 1)); });
  }
}

TEST_CASE("fit keeps no epoch outside max_round_trip") {
  const std::vector<float> x = random_values<float>(600 * 5, 22);
  const Flow start(FlowSpec::real_nvp(5, 4, {16}, Activation::tanh), 1);
  nvpflow::FitOptions options;
  options.epochs = 3;
  options.batch_size = 60;
  Flow free = start, bounded = start, refused = start;
  const nvpflow::History unmeasured = nvpflow::fit<float>(free, x, {}, options);
  CHECK(std::isnan(unmeasured.epochs[0].round_trip));
  options.max_round_trip = 1e-5;
  const nvpflow::History history = nvpflow::fit<float>(bounded, x, {}, options);
  CHECK(same_bits(free.parameters<float>(), bounded.parameters<float>()));
  CHECK(history.epochs[2].round_trip > 0);
  CHECK(history.epochs[2].round_trip <= 1e-5);
  options.max_round_trip = 1e-12;  // no float32 flow comes back so well
  check_throws_code(ErrorCode::none_kept, "max_round_trip 1e-12",
                    [&] { nvpflow::fit<float>(refused, x, {}, options); });
  CHECK(same_bits(refused.parameters<float>(), start.parameters<float>()));
  options.max_round_trip = -1;
  check_throws_code(ErrorCode::invalid_argument, "max_round_trip is -1",
                    [&] { nvpflow::fit<float>(refused, x, {}, options); });
}

TEST_CASE_TEMPLATE("conditioner gives the log-scale and shift of one layer", T, float, double) {
  for (const Shape& shape : {kShapes[3], kShapes[4], kShapes[8]}) {
    Pair<T> pair(shape);
    const std::int64_t rows = 19;
    const std::vector<T> x = random_values<T>(rows * pair.width, 3);
    for (std::size_t layer = 0; layer < pair.flow.spec().layers.size(); ++layer) {
      const auto* coupling = std::get_if<nvpflow::Coupling>(&pair.flow.spec().layers[layer]);
      if (coupling == nullptr) continue;
      const std::int64_t count = coupling->transformed.count(pair.width);
      std::vector<T> s(static_cast<std::size_t>(rows * count), kPoison<T>), t = s;
      pair.flow.template conditioner<T>(static_cast<std::int64_t>(layer), x, s, t);
      std::int64_t wrong = 0;
      for (std::int64_t row = 0; row < rows; ++row) {
        const auto expected = pair.oracle.conditioner(layer, row_of(x, row, pair.width));
        for (std::int64_t i = 0; i < count; ++i) {
          const auto at = static_cast<std::size_t>(row * count + i);
          wrong += !within(s[at], expected.log_scale[static_cast<std::size_t>(i)], kBudget<T>);
          wrong += !within(t[at], expected.shift[static_cast<std::size_t>(i)], kBudget<T>);
        }
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE_TEMPLATE("a layer list need not alternate", T, float, double) {
  FlowSpec spec = FlowSpec::real_nvp(5, 4, {6}, Activation::silu, 1.0, true, dtype_of<T>);
  // Two couplings of the same parity in a row.
  std::get<nvpflow::Coupling>(spec.layers[2]).transformed.name = nvpflow::FeatureSet::Name::second_half;
  auto& own = std::get<nvpflow::Coupling>(spec.layers[3]).network;  // widths and activations of its own
  own.hidden_sizes = {3, 9};
  own.activation = Activation::elu;
  spec.layers.push_back(spec.layers.front());  // a standardize layer at the latent end
  Flow flow(spec);
  const std::vector<T> parameters = random_parameters<T>(flow.layout(), 4);
  flow.template set_parameters<T>(parameters);
  const oracle::Flow oracle(spec, widened<T>(parameters));
  const std::vector<T> x = random_values<T>(23 * 5, 5);
  std::vector<T> z(x.size(), kPoison<T>), log_det(23, kPoison<T>);
  flow.template forward<T>(x, z, log_det);
  for (std::int64_t row = 0; row < 23; ++row) {
    const auto expected = oracle.forward(row_of(x, row, 5));
    for (std::int64_t d = 0; d < 5; ++d)
      CHECK(within(z[static_cast<std::size_t>(row * 5 + d)], expected.values[static_cast<std::size_t>(d)], kBudget<T>));
    CHECK(within(log_det[static_cast<std::size_t>(row)], expected.log_det, kBudget<T>));
  }
}

/// Transforms of the flow agree with the oracle's, and those of single rows with those of many, bit for bit.
template <class T>
void check_layers(const FlowSpec& spec, std::uint64_t seed, double budget) {
  const std::int64_t features = spec.input_size;
  Flow flow(spec);
  const std::vector<T> parameters = random_parameters<T>(flow.layout(), static_cast<unsigned>(seed));
  flow.template set_parameters<T>(parameters);
  const oracle::Flow oracle(spec, widened<T>(parameters));
  for (const std::int64_t rows : {1, 3, 16, 37}) {
    const std::vector<T> x = random_values<T>(rows * features, 5);
    std::vector<T> z(x.size(), kPoison<T>), log_det(static_cast<std::size_t>(rows), kPoison<T>), log_prob = log_det;
    std::vector<T> back(x.size(), kPoison<T>), back_log_det = log_det;
    flow.template forward<T>(x, z, log_det);
    flow.template log_prob<T>(x, log_prob);
    flow.template inverse<T>(x, back, back_log_det);
    std::int64_t wrong = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
      const auto at = static_cast<std::size_t>(row);
      const auto expected = oracle.forward(row_of(x, row, features)),
                 inverse = oracle.inverse(row_of(x, row, features));
      for (std::int64_t d = 0; d < features; ++d) {
        const auto i = static_cast<std::size_t>(row * features + d), j = static_cast<std::size_t>(d);
        wrong += !within(z[i], expected.values[j], 4 * budget);
        wrong += !within(back[i], inverse.values[j], 4 * budget);
      }
      wrong += !within(log_det[at], expected.log_det, budget);
      wrong += !within(back_log_det[at], inverse.log_det, budget);
      wrong += !within(log_prob[at], oracle.log_prob(row_of(x, row, features)), 4 * budget);
      std::vector<T> one(static_cast<std::size_t>(features), kPoison<T>), one_back = one;
      const auto given = std::span<const T>(x).subspan(static_cast<std::size_t>(row * features), one.size());
      flow.template forward<T>(given, one);
      flow.template inverse<T>(given, one_back);
      wrong += std::memcmp(one.data(), z.data() + row * features, one.size() * sizeof(T)) != 0;
      wrong += std::memcmp(one_back.data(), back.data() + row * features, one.size() * sizeof(T)) != 0;
    }
    CHECK(wrong == 0);
  }
}

/// The gradients of the flow, in both directions, agree with finite differences of the oracle. of_scale: what these err
/// by as a share of the sum that they are of, where it is large.
void check_layer_gradients(const FlowSpec& spec, std::uint64_t seed, double budget, double of_scale = 0) {
  const std::int64_t features = spec.input_size;
  Flow flow(spec);
  const std::vector<double> parameters = random_parameters<double>(flow.layout(), static_cast<unsigned>(seed));
  flow.set_parameters<double>(parameters);
  oracle::Flow oracle(spec, parameters);
  const std::int64_t rows = 35;
  std::vector<double> x = random_values<double>(rows * features, 6);
  std::vector<double> gradient(parameters.size(), kPoison<double>), grad_in(x.size(), kPoison<double>);
  for (const bool forward : {true, false}) {
    const std::vector<double> grad_out = random_values<double>(rows * features, 7);
    const std::vector<double> grad_log_det = random_values<double>(rows, 8);
    double scale = 0;
    const auto loss = [&] {
      double sum = 0;
      scale = 0;
      for (std::int64_t row = 0; row < rows; ++row) {
        const auto in = row_of(x, row, features);
        const auto result = forward ? oracle.forward(in) : oracle.inverse(in);
        for (std::int64_t d = 0; d < features; ++d) {
          const double term =
              grad_out[static_cast<std::size_t>(row * features + d)] * result.values[static_cast<std::size_t>(d)];
          sum += term, scale += std::fabs(term);
        }
        sum += grad_log_det[static_cast<std::size_t>(row)] * result.log_det;
      }
      return sum;
    };
    const auto agrees = [&](double actual, double expected) {
      return within(actual, expected, budget) || std::fabs(actual - expected) <= of_scale * scale;
    };
    flow.vjp<double>(forward ? nvpflow::Direction::forward : nvpflow::Direction::inverse, x, grad_out, grad_log_det,
                     grad_in, gradient);
    std::vector<double>& values = oracle.parameters();
    std::int64_t wrong = 0;
    for (std::size_t i = 0; i < values.size(); i += 3) {
      const double expected = oracle::central_difference(values[i], loss);
      wrong += !agrees(gradient[i], expected);
    }
    for (std::size_t i = 0; i < x.size(); i += 11) {
      const double expected = oracle::central_difference(x[i], loss);
      wrong += !agrees(grad_in[i], expected);
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE_TEMPLATE("layers of all features, directions and places agree with the oracle", T, float, double) {
  for (const std::int64_t features : {2, 3, 5, 8, 17, 33}) {
    for (std::uint64_t seed = 0; seed < 8; ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      check_layers<T>(mixed_spec(features, seed, dtype_of<T>), seed, kBudget<T>);
    }
  }
}

TEST_CASE_TEMPLATE("bounds agree with the oracle", T, float, double) {
  for (const std::int64_t features : {2, 3, 5, 8, 17, 33}) {
    for (std::uint64_t seed = 0; seed < 8; ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      check_layers<T>(nvpflow::bounded_spec(features, seed, dtype_of<T>), seed, kBudget<T>);
    }
  }
}

TEST_CASE("gradients behind bounds agree with finite differences") {
  for (const std::int64_t features : {2, 3, 7, 18}) {
    for (std::uint64_t seed = 0; seed < 5; ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      // The way back ends in exponentials, so that the sum is large.
      check_layer_gradients(nvpflow::bounded_spec(features, seed, DType::float64), seed, 1e-7, 1e-9);
    }
  }
}

TEST_CASE_TEMPLATE("a row outside of bounds or on an edge has density 0 and no gradient", T, float, double) {
  constexpr T kInfinite = std::numeric_limits<T>::infinity(), kMax = std::numeric_limits<T>::max();
  for (const std::int64_t features : {2, 17}) {
    FlowSpec spec = FlowSpec::real_nvp(features, 2, {9}, Activation::tanh, 1.0, true, dtype_of<T>);
    nvpflow::Bounds bounds;
    bounds.low.assign(static_cast<std::size_t>(features), -0.25);
    bounds.high.assign(static_cast<std::size_t>(features), 0.75);
    bounds.high[0] = std::numeric_limits<double>::infinity();
    spec.layers.insert(spec.layers.begin(), bounds);
    Flow flow(spec);
    const std::vector<T> parameters = random_parameters<T>(flow.layout(), 3);
    flow.template set_parameters<T>(parameters);
    const oracle::Flow oracle(spec, widened<T>(parameters));
    const std::vector<T> outside = {T(-0.25), -kMax, T(-0.3)}, strange = {kInfinite, -kInfinite, kPoison<T>};
    for (const std::int64_t rows : {1, 100}) {
      std::vector<T> x(static_cast<std::size_t>(rows * features), T(0.3)), z(x.size(), kPoison<T>), grad_x = z;
      std::vector<T> log_det(static_cast<std::size_t>(rows), kPoison<T>), log_prob = log_det, vjp_log_prob = log_det;
      const auto kind_of = [](std::int64_t row) { return (row + 2) % 7; };  // a single row is outside
      for (std::int64_t row = 0; row < rows; ++row) {
        const auto kind = static_cast<std::size_t>(kind_of(row));
        T& value = x[static_cast<std::size_t>(row * features + row % features)];
        if (kind < 3) value = outside[kind];
        if (kind == 3) value = strange[static_cast<std::size_t>(row) % 3];
      }
      flow.template forward<T>(x, z, log_det);
      flow.template log_prob<T>(x, log_prob);
      const std::vector<T> ones(static_cast<std::size_t>(rows), T(1));
      std::vector<T> gradient(parameters.size(), kPoison<T>);
      flow.log_prob_vjp_unchecked(x.data(), rows, ones.data(), vjp_log_prob.data(), grad_x.data(), gradient.data(),
                                  false);
      std::int64_t wrong = 0;
      for (std::int64_t row = 0; row < rows; ++row) {
        const auto r = static_cast<std::size_t>(row);
        const std::int64_t kind = kind_of(row);
        const double expected = oracle.log_prob(row_of(x, row, features));
        for (std::int64_t d = 0; d < features; ++d) {
          const auto i = static_cast<std::size_t>(row * features + d);
          if (kind < 3) wrong += z[i] != kInfinite || grad_x[i] != 0;
          if (kind == 3) wrong += !std::isnan(z[i]) || !std::isnan(grad_x[i]);
          if (kind > 3) wrong += !std::isfinite(z[i]) || !std::isfinite(grad_x[i]);
        }
        if (kind < 3) wrong += log_prob[r] != -kInfinite || log_det[r] != -kInfinite || expected != -HUGE_VAL;
        if (kind == 3) wrong += !std::isnan(log_prob[r]) || !std::isnan(log_det[r]) || !std::isnan(expected);
        if (kind > 3) wrong += !within(static_cast<double>(log_prob[r]), expected, 4 * kBudget<T>);
        wrong += std::memcmp(&vjp_log_prob[r], &log_prob[r], sizeof(T)) != 0 && kind != 3;
      }
      CHECK(wrong == 0);
      // The mean loss of rows without NaN is infinite where one is outside, its gradient that of the others.
      std::vector<T> kept, inside;
      for (std::int64_t row = 0; row < rows; ++row) {
        const auto begin = x.begin() + row * features;
        if (kind_of(row) != 3) kept.insert(kept.end(), begin, begin + features);
        if (kind_of(row) > 3) inside.insert(inside.end(), begin, begin + features);
      }
      CHECK(flow.template nll_gradient<T>(kept, gradient) == HUGE_VAL);
      if (inside.empty()) {
        for (const T g : gradient) CHECK(g == 0);
        continue;
      }
      std::vector<T> of_inside(gradient.size(), kPoison<T>);
      flow.template nll_gradient<T>(inside, of_inside);
      const double share = static_cast<double>(inside.size()) / static_cast<double>(kept.size());
      for (std::size_t i = 0; i < gradient.size(); ++i) {
        CHECK(within(static_cast<double>(gradient[i]), share * static_cast<double>(of_inside[i]), 10 * kBudget<T>));
      }
      for (const int threads : {2, 3}) {
        flow.set_num_threads(threads);
        std::vector<T> again(gradient.size(), kPoison<T>);
        flow.template nll_gradient<T>(kept, again);
        CHECK(same_bits<T>(again, gradient));
      }
      flow.set_num_threads(0);
    }
  }
}

TEST_CASE_TEMPLATE("what comes back through bounds lies inside, and has a density", T, float, double) {
  const std::vector<std::pair<double, double>> intervals = {
      {0, 1}, {0, HUGE_VAL}, {-HUGE_VAL, 0}, {0.1, 0.7}, {1e6, HUGE_VAL}, {-HUGE_VAL, -3e-30}, {-1, 1e30}, {0, 1e-30}};
  for (const auto& [low, high] : intervals) {
    CAPTURE(low);
    CAPTURE(high);
    FlowSpec spec = FlowSpec::real_nvp(2, 1, {}, Activation::relu, 1.0, false, dtype_of<T>);
    spec.layers.insert(spec.layers.begin(), nvpflow::Bounds{{low, low}, {high, high}});
    Flow flow(spec);
    flow.template set_parameters<T>(std::vector<T>(static_cast<std::size_t>(flow.num_parameters())));
    std::vector<T> z, x;
    for (const double far : {0.0, 1.0, 10.0, 80.0, 100.0, 700.0, 1e4, 1e30}) {
      z.insert(z.end(), {static_cast<T>(far), static_cast<T>(-far)});
    }
    x.assign(z.size(), kPoison<T>);
    std::vector<T> log_det(z.size() / 2, kPoison<T>), log_prob = log_det;
    flow.template inverse<T>(z, x, log_det);
    for (const T value : x) CHECK((static_cast<double>(value) > low && static_cast<double>(value) < high));
    for (const T value : x) CHECK(std::isfinite(value));
    for (const T value : log_det) CHECK(!std::isnan(value));
    std::vector<T> there(x.size(), kPoison<T>), there_log_det = log_det;
    flow.template forward<T>(x, there, there_log_det);
    for (const T value : there) CHECK(std::isfinite(value));
    for (const T value : there_log_det) CHECK(std::isfinite(value));
    const std::int64_t drawn = 20'000;
    x.assign(static_cast<std::size_t>(2 * drawn), kPoison<T>);
    log_prob.assign(static_cast<std::size_t>(drawn), kPoison<T>);
    flow.template sample_and_log_prob<T>(7, x, log_prob);
    std::int64_t wrong = 0;
    for (const T value : x) wrong += !(static_cast<double>(value) > low && static_cast<double>(value) < high);
    for (const T value : log_prob) wrong += !std::isfinite(value);
    CHECK(wrong == 0);
  }
}

// What float32 keeps of a spline depends on its slopes: the tests in Python count in condition numbers.
TEST_CASE_TEMPLATE("splines agree with the oracle", T, float, double) {
  for (const std::int64_t features : {2, 3, 5, 8, 17, 33}) {
    for (std::uint64_t seed = 0; seed < 8; ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      check_layers<T>(nvpflow::spline_spec(features, seed, dtype_of<T>), seed, 100 * kBudget<T>);
    }
  }
}

TEST_CASE("gradients of layers of all features, directions and places agree with finite differences") {
  for (const std::int64_t features : {2, 3, 7, 18}) {
    for (std::uint64_t seed = 0; seed < 5; ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      check_layer_gradients(mixed_spec(features, seed, DType::float64), seed, 1e-7);
    }
  }
}

// The log-slope of a spline has a kink at each knot: a difference across one is as wrong as its step is long.
TEST_CASE("gradients of splines agree with finite differences") {
  for (const std::int64_t features : {2, 5}) {
    for (std::uint64_t seed = 0; seed < 5; ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      check_layer_gradients(nvpflow::spline_spec(features, seed, DType::float64), seed, 1e-4);
    }
  }
}

TEST_CASE_TEMPLATE("a context, by rows and one for all, agrees with the oracle", T, float, double) {
  for (const std::int64_t features : {1, 2, 5, 17}) {
    for (std::uint64_t seed = 0; seed < 6; ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      const FlowSpec spec =
          nvpflow::conditional_spec(features, seed, static_cast<std::int64_t>(1 + seed * 7), dtype_of<T>);
      Flow flow(spec);
      const std::vector<T> parameters = random_parameters<T>(flow.layout(), static_cast<unsigned>(seed));
      flow.template set_parameters<T>(parameters);
      oracle::Flow oracle(spec, widened<T>(parameters));
      for (const std::int64_t rows : {0, 1, 3, 16, 37, 200}) {
        CAPTURE(rows);
        const std::vector<T> x = random_values<T>(rows * features, 5);
        const std::vector<T> context = random_values<T>(rows * spec.context_size, 9);
        std::vector<T> z(x.size(), kPoison<T>), log_det(static_cast<std::size_t>(rows), kPoison<T>), log_prob = log_det;
        flow.template forward<T>(x, z, log_det, context);
        flow.template log_prob<T>(x, log_prob, context);
        std::int64_t wrong = 0;
        for (std::int64_t row = 0; row < rows; ++row) {
          const std::vector<double> given = row_of(context, row, spec.context_size);
          const auto expected = oracle.forward(row_of(x, row, features), given);
          for (std::int64_t d = 0; d < features; ++d) {
            wrong += !within(z[static_cast<std::size_t>(row * features + d)],
                             expected.values[static_cast<std::size_t>(d)], 4 * kBudget<T>);
          }
          wrong += !within(log_det[static_cast<std::size_t>(row)], expected.log_det, kBudget<T>);
          wrong += !within(log_prob[static_cast<std::size_t>(row)], oracle.log_prob(row_of(x, row, features), given),
                           4 * kBudget<T>);
        }
        CHECK(wrong == 0);
        // One for all rows: by rows, in the call, and bound before it.
        const std::vector<T> one = random_values<T>(spec.context_size, 10);
        std::vector<T> repeated;
        for (std::int64_t row = 0; row < rows; ++row) repeated.insert(repeated.end(), one.begin(), one.end());
        std::vector<T> by_rows(x.size(), kPoison<T>), at_once = by_rows, bound = by_rows;
        const nvpflow::ConditionedFlow given = flow.template condition<T>(one);
        flow.template inverse<T>(x, by_rows, log_det, repeated);
        flow.template inverse<T>(x, at_once, log_prob, one);
        CHECK(same_bits<T>(by_rows, at_once));
        CHECK(same_bits<T>(log_det, log_prob));
        given.template inverse<T>(x, bound);
        CHECK(same_bits<T>(by_rows, bound));
        flow.template sample<T>(3, by_rows, 0, repeated);
        given.template sample<T>(3, bound);
        CHECK(same_bits<T>(by_rows, bound));
      }
      // A row whose context holds NaN is NaN, and no other.
      const std::vector<T> x = random_values<T>(20 * features, 5);
      std::vector<T> context = random_values<T>(20 * spec.context_size, 9), log_prob(20, kPoison<T>);
      context[static_cast<std::size_t>(7 * spec.context_size)] = std::numeric_limits<T>::quiet_NaN();
      context[static_cast<std::size_t>(18 * spec.context_size)] = std::numeric_limits<T>::infinity();
      flow.template log_prob<T>(x, log_prob, context);
      for (std::size_t row = 0; row < 20; ++row) CHECK(std::isnan(log_prob[row]) == (row == 7 || row == 18));
      context.resize(static_cast<std::size_t>(8 * spec.context_size));
      flow.template log_prob<T>(x, log_prob, std::span(context).last(static_cast<std::size_t>(spec.context_size)));
      for (std::size_t row = 0; row < 20; ++row) CHECK(std::isnan(log_prob[row]));
    }
  }
}

TEST_CASE("gradients with a context agree with finite differences") {
  for (const std::int64_t features : {1, 4, 7}) {
    for (std::uint64_t seed = 0; seed < 4; ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      FlowSpec spec = features > 1 ? mixed_spec(features, seed, DType::float64) : FlowSpec();
      spec.input_size = features;
      spec.dtype = DType::float64;
      nvpflow::Coupling of_all;
      of_all.transformed.name = nvpflow::FeatureSet::Name::all;
      if (seed % 2 == 0) of_all.network.hidden_sizes = {9};
      of_all.network.activation = Activation::silu;
      if (seed >= 2) of_all.network = nvpflow::gated_network(seed);
      spec.layers.emplace_back(of_all);
      spec.context_size = static_cast<std::int64_t>(1 + seed * 3);
      spec.standardize_context = seed % 2 == 1;
      Flow flow(spec);
      const std::vector<double> parameters = random_parameters<double>(flow.layout(), static_cast<unsigned>(seed));
      flow.set_parameters<double>(parameters);
      oracle::Flow oracle(spec, parameters);
      const std::int64_t rows = 35;
      std::vector<double> x = random_values<double>(rows * features, 6);
      for (const bool shared : {false, true}) {
        const std::int64_t context_rows = shared ? 1 : rows;
        std::vector<double> context = random_values<double>(context_rows * spec.context_size, 9);
        const std::vector<double> grad_out = random_values<double>(rows * features, 7);
        const std::vector<double> grad_log_det = random_values<double>(rows, 8);
        const auto loss = [&] {
          double sum = 0;
          for (std::int64_t row = 0; row < rows; ++row) {
            const auto result =
                oracle.forward(row_of(x, row, features), row_of(context, shared ? 0 : row, spec.context_size));
            for (std::int64_t d = 0; d < features; ++d) {
              sum +=
                  grad_out[static_cast<std::size_t>(row * features + d)] * result.values[static_cast<std::size_t>(d)];
            }
            sum += grad_log_det[static_cast<std::size_t>(row)] * result.log_det;
          }
          return sum;
        };
        std::vector<double> gradient(parameters.size(), kPoison<double>), grad_in(x.size(), kPoison<double>);
        std::vector<double> grad_context(context.size(), kPoison<double>);
        flow.vjp<double>(Direction::forward, x, grad_out, grad_log_det, grad_in, gradient, false, context,
                         grad_context);
        std::vector<double>& values = oracle.parameters();
        std::int64_t wrong = 0;
        for (std::size_t i = 0; i < values.size(); ++i) {
          wrong += !within(gradient[i], oracle::central_difference(values[i], loss), 1e-7);
        }
        for (std::size_t i = 0; i < x.size(); i += 11) {
          wrong += !within(grad_in[i], oracle::central_difference(x[i], loss), 1e-7);
        }
        for (std::size_t i = 0; i < context.size(); ++i) {
          wrong += !within(grad_context[i], oracle::central_difference(context[i], loss), 1e-7);
        }
        CHECK(wrong == 0);
        std::vector<double> again(gradient.size(), kPoison<double>);
        for (const int threads : {2, 3}) {
          flow.set_num_threads(threads);
          flow.vjp<double>(Direction::forward, x, grad_out, grad_log_det, grad_in, again, false, context);
          CHECK(same_bits<double>(gradient, again));
        }
        flow.set_num_threads(1);
      }
    }
  }
}

TEST_CASE("a context that is missing, superfluous or of a wrong size is refused by name") {
  FlowSpec spec = FlowSpec::real_nvp(4, 2, {8});
  Flow plain(spec);
  spec.context_size = 3;
  Flow flow(spec);
  const std::vector<float> x(8), context(6), short_one(4);
  const std::vector<double> wide(6);
  std::vector<float> out(2);
  const auto refused = [](const char* fragment, auto&& call) {
    try {
      call();
      FAIL("nothing was refused");
    } catch (const nvpflow::Error& error) {
      CHECK(std::string(error.what()).find(fragment) != std::string::npos);
    }
  };
  refused("context is missing, expected [B, 3] or [3]", [&] { flow.log_prob<float>(x, out); });
  refused("context is missing", [&] { flow.log_prob_unchecked(x.data(), 2, out.data()); });
  refused("expected none: the flow has no context", [&] { plain.log_prob<float>(x, out, context); });
  refused("context holds 4 elements, expected 6 ([B, C]) or 3 ([C])", [&] { flow.log_prob<float>(x, out, short_one); });
  refused("context is of another type", [&] { flow.log_prob<float>(x, out, wide); });
  refused("has context_size 0", [&] { plain.condition<float>(context); });
  refused("context holds 6 elements, expected 3 ([C])", [&] { flow.condition<float>(context); });
  std::vector<float> shared(8), other(8), gradient(static_cast<std::size_t>(flow.num_parameters())), grad_context(6);
  const std::span<float> first(shared.data(), 2), given(shared.data() + 1, 6);
  refused("out overlaps context", [&] { flow.log_prob<float>(x, first, given); });
  refused("z overlaps context", [&] { flow.forward<float>(x, shared, {}, given); });
  refused("log_det overlaps context", [&] { flow.inverse<float>(x, other, first, given); });
  refused("x overlaps context", [&] { flow.sample<float>(1, shared, 0, given); });
  refused("gradient overlaps context",
          [&] { flow.nll_gradient<float>(x, gradient, std::span<const float>(gradient).first(3)); });
  refused("grad_context overlaps context",
          [&] { flow.vjp<float>(Direction::forward, x, {}, {}, {}, {}, false, given, given); });
  refused("grad_in overlaps context",
          [&] { flow.vjp<float>(Direction::forward, x, {}, {}, shared, {}, false, given, grad_context); });
  refused("grad_context overlaps grad_in",
          [&] { flow.vjp<float>(Direction::forward, x, {}, {}, shared, {}, false, context, given); });
  refused("t overlaps context", [&] {
    flow.conditioner<float>(0, x, std::span<float>(other).first(4), std::span<float>(shared).first(4), given);
  });
}

TEST_CASE("nll_gradient agrees with finite differences of the oracle") {
  // Smooth activations: finite differences are meaningless across a kink. The kinked ones are compared with the
  // hand-written reverse mode in the Python tests.
  for (const Shape& shape : {Shape{2, 2, {}, Activation::tanh}, Shape{3, 2, {4}, Activation::silu, 1.0, true},
                             Shape{5, 3, {3, 2}, Activation::softplus, 2.0}, Shape{6, 2, {9}, Activation::gelu},
                             Shape{7, 1, {5}, Activation::sigmoid}, Shape{4, 2, {3}, Activation::elu}}) {
    CAPTURE(nvpflow::name_of(shape.activation));
    Pair<double> pair(shape);
    const std::int64_t rows = 37;
    const std::vector<double> x = random_values<double>(rows * pair.width, 6);
    std::vector<std::vector<double>> batch;
    for (std::int64_t row = 0; row < rows; ++row) batch.push_back(row_of(x, row, pair.width));

    std::vector<double> gradient(static_cast<std::size_t>(pair.flow.num_parameters()), kPoison<double>);
    const double value = pair.flow.nll_gradient<double>(x, gradient);
    CHECK(within(value, pair.oracle.nll(batch), kBudget<double>));
    CHECK(within(pair.flow.nll<double>(x), value, kBudget<double>));

    Pair<float> single(shape);
    single.oracle.parameters() = widened<float>(single.flow.parameters<float>());
    const std::vector<float> x32(x.begin(), x.end());
    std::vector<float> gradient32(gradient.size(), kPoison<float>);
    single.flow.nll_gradient<float>(x32, gradient32);

    std::vector<double>& parameters = pair.oracle.parameters();
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      const double expected = oracle::central_difference(parameters[i], [&] { return pair.oracle.nll(batch); });
      CAPTURE(i);
      CHECK(within(gradient[i], expected, 1e-8));
      CHECK(within(gradient32[i], expected, 1e-5));
    }
  }
}

TEST_CASE("vjp agrees with finite differences of the oracle, accumulates, and may leave out what is not wanted") {
  for (const Direction direction : {Direction::forward, Direction::inverse}) {
    CAPTURE(static_cast<int>(direction));
    Pair<double> pair({5, 3, {6}, Activation::silu, 1.5, true});
    const std::int64_t rows = 5, width = 5;
    std::vector<double> x = random_values<double>(rows * width, 7);
    const std::vector<double> grad_out = random_values<double>(rows * width, 8);
    const std::vector<double> grad_log_det = random_values<double>(rows, 9);
    const auto loss = [&] {
      double sum = 0;
      for (std::int64_t row = 0; row < rows; ++row) {
        const auto in = row_of(x, row, width);
        const auto result = direction == Direction::forward ? pair.oracle.forward(in) : pair.oracle.inverse(in);
        for (std::int64_t d = 0; d < width; ++d)
          sum += result.values[static_cast<std::size_t>(d)] * grad_out[static_cast<std::size_t>(row * width + d)];
        sum += result.log_det * grad_log_det[static_cast<std::size_t>(row)];
      }
      return sum;
    };
    const auto count = static_cast<std::size_t>(pair.flow.num_parameters());
    std::vector<double> grad_in(x.size(), kPoison<double>), gradient(count, kPoison<double>);
    pair.flow.vjp<double>(direction, x, grad_out, grad_log_det, grad_in, gradient);
    for (std::size_t i = 0; i < x.size(); ++i) CHECK(within(grad_in[i], oracle::central_difference(x[i], loss), 1e-8));
    std::vector<double>& parameters = pair.oracle.parameters();
    for (std::size_t i = 0; i < count; ++i)
      CHECK(within(gradient[i], oracle::central_difference(parameters[i], loss), 1e-8));

    // An empty span means zero in, not wanted out.
    std::vector<double> only_in(x.size(), kPoison<double>), only_gradient(count, kPoison<double>);
    pair.flow.vjp<double>(direction, x, grad_out, grad_log_det, only_in, {});
    pair.flow.vjp<double>(direction, x, grad_out, grad_log_det, {}, only_gradient);
    CHECK(same_bits<double>(only_in, grad_in));
    CHECK(same_bits<double>(only_gradient, gradient));
    const std::vector<double> zeros(x.size(), 0.0), zero_log_det(static_cast<std::size_t>(rows), 0.0);
    std::vector<double> given(x.size(), kPoison<double>), left_out = given;
    pair.flow.vjp<double>(direction, x, zeros, grad_log_det, given, {});
    pair.flow.vjp<double>(direction, x, {}, grad_log_det, left_out, {});
    CHECK(same_bits<double>(given, left_out));
    pair.flow.vjp<double>(direction, x, grad_out, zero_log_det, given, {});
    pair.flow.vjp<double>(direction, x, grad_out, {}, left_out, {});
    CHECK(same_bits<double>(given, left_out));

    // Accumulation adds to what is there.
    std::vector<double> accumulated = random_values<double>(static_cast<std::int64_t>(count), 10);
    const std::vector<double> before = accumulated;
    pair.flow.vjp<double>(direction, x, grad_out, grad_log_det, {}, accumulated, /*accumulate=*/true);
    for (std::size_t i = 0; i < count; ++i) CHECK(within(accumulated[i], before[i] + gradient[i], 1e-12));
  }
}

TEST_CASE_TEMPLATE("results and gradients keep their bits for every thread count", T, float, double) {
  Pair<T> pair({17, 3, {40}, Activation::gelu, 1.0, true});
  const std::int64_t rows = 4099;
  const std::vector<T> x = random_values<T>(rows * pair.width, 11);
  const auto run = [&](int threads) {
    pair.flow.set_num_threads(threads);
    std::vector<T> z(x.size(), kPoison<T>), log_prob(static_cast<std::size_t>(rows), kPoison<T>);
    std::vector<T> gradient(static_cast<std::size_t>(pair.flow.num_parameters()), kPoison<T>);
    pair.flow.template forward<T>(x, z);
    pair.flow.template log_prob<T>(x, log_prob);
    const double nll = pair.flow.template nll_gradient<T>(x, gradient);
    z.insert(z.end(), log_prob.begin(), log_prob.end());
    z.insert(z.end(), gradient.begin(), gradient.end());
    return std::pair{nll, z};
  };
  const auto [nll, results] = run(1);
  for (const int threads : {2, 3, 4, 7}) {
    CAPTURE(threads);
    const auto [other_nll, other] = run(threads);
    CHECK(other_nll == nll);
    CHECK(same_bits<T>(other, results));
  }
}

template <class T>
std::vector<T> with_blocks(const cpu::Packed<T>& packed, const cpu::Kernels<T>& kernels, const std::vector<T>& x,
                           std::int64_t rows, std::int64_t parameters) {
  const cpu::Program<T>& program = packed.program();
  packed.ensure_transposed();
  AlignedBuffer memory;
  const std::int64_t size =
      std::max(kernels.transform_scratch(program), kernels.tape_size(program, program.gradient_rows));
  T* scratch = static_cast<T*>(memory.reserve(size * static_cast<std::int64_t>(sizeof(T))));
  std::fill_n(scratch, size, kPoison<T>);
  std::vector<T> z(x.size(), kPoison<T>), log_prob(static_cast<std::size_t>(rows), kPoison<T>);
  std::vector<T> gradient(static_cast<std::size_t>(parameters), kPoison<T>);
  cpu::TransformCall<T> call;
  call.in = x.data(), call.out = z.data(), call.log_prob = log_prob.data();
  kernels.transform(program, call, 0, rows, scratch);
  cpu::GradientCall<T> backward;
  backward.in = x.data(), backward.nll = true, backward.nll_factor = 1, backward.gradient = gradient.data();
  double sums[cpu::kMaxGradientUnits] = {};
  const std::int64_t count = std::min(rows, program.gradient_rows);
  kernels.gradient_tile(program, backward, 0, count, (count + kernels.lanes - 1) / kernels.lanes * kernels.lanes,
                        scratch, sums);
  z.insert(z.end(), log_prob.begin(), log_prob.end());
  z.insert(z.end(), gradient.begin(), gradient.end());
  for (const double sum : sums) z.push_back(static_cast<T>(sum));
  return z;
}

template <class T>
void check_wide_blocks(const cpu::IsaEntry& isa, const Shape& shape, const std::vector<std::int64_t>& counts) {
  const cpu::Kernels<T>* kernels = nullptr;
  if constexpr (sizeof(T) == 4) kernels = isa.float32;
  if constexpr (sizeof(T) == 8) kernels = isa.float64;
  const FlowSpec spec = spec_of<T>(shape);
  const ParamLayout layout(spec);
  const std::vector<T> parameters = random_parameters<T>(layout, 5);
  cpu::Packed<T> narrow(spec, layout, *kernels, Weights::full, false);
  cpu::Packed<T> wide(spec, layout, *kernels, Weights::full, true);
  narrow.pack(parameters.data());
  wide.pack(parameters.data());
  for (const std::int64_t rows : counts) {
    CAPTURE(rows);
    const std::vector<T> x = random_values<T>(rows * spec.input_size, 6);
    CHECK(same_bits<T>(with_blocks(wide, *kernels, x, rows, layout.size()),
                       with_blocks(narrow, *kernels, x, rows, layout.size())));
  }
}

TEST_CASE_TEMPLATE("register blocks of either width leave the same bits", T, float, double) {
  for (const cpu::IsaEntry* isa : cpu::supported_isas()) {
    CAPTURE(isa->name);
    for (const Shape& shape :
         {Shape{16, 2, {128}, Activation::relu}, Shape{17, 2, {300, 40}, Activation::leaky_relu, 1.0, true},
          Shape{450, 1, {230}, Activation::tanh}}) {
      check_wide_blocks<T>(*isa, shape, {1, 15, 33, 47, 48, 49, 64, 100, 333});
    }
  }
}

TEST_CASE_TEMPLATE("a hidden layer and the head behind it in one kernel leave the bits of two", T, float, double) {
  // Among them each size of both halves that such a kernel is for, one more, and widths that are no whole units.
  for (const cpu::IsaEntry* isa : cpu::supported_isas()) {
    CAPTURE(isa->name);
    for (std::int64_t features = 2; features <= 18; ++features) {
      CAPTURE(features);
      for (const std::int64_t width : {1, 8, 16, 24, 31, 40, 48, 63, 64, 72, 96, 100, 256}) {
        CAPTURE(width);
        check_wide_blocks<T>(*isa, Shape{features, 2, {width}, Activation::relu}, {16, 50});
      }
      check_wide_blocks<T>(*isa, Shape{features, 2, {32}, Activation::leaky_relu}, {50});
      check_wide_blocks<T>(*isa, Shape{features, 2, {32, 32}, Activation::relu, 1.0, true}, {50});
    }
  }
}

TEST_CASE_TEMPLATE("threads that share a gradient tile leave the bits of one", T, float, double) {
  // Wide enough that so few rows are worth the threads, and are one tile or two.
  Pair<T> pair({17, 2, {600, 300}, Activation::silu, 1.0, true});
  for (const std::int64_t rows : {31, 33, 100, 256, 290}) {
    CAPTURE(rows);
    const std::vector<T> x = random_values<T>(rows * pair.width, 21),
                         grad_out = random_values<T>(rows * pair.width, 22);
    const auto run = [&](int threads) {
      pair.flow.set_num_threads(threads);
      std::vector<T> gradient(static_cast<std::size_t>(pair.flow.num_parameters()), kPoison<T>), inverse = gradient;
      std::vector<T> grad_x(x.size(), kPoison<T>);
      const double nll = pair.flow.template nll_gradient<T>(x, gradient);
      pair.flow.template vjp<T>(Direction::inverse, x, grad_out, {}, grad_x, inverse);
      gradient.insert(gradient.end(), inverse.begin(), inverse.end());
      gradient.insert(gradient.end(), grad_x.begin(), grad_x.end());
      return std::pair{nll, gradient};
    };
    const auto [nll, gradient] = run(1);
    for (const int threads : {2, 3, 5, 8, 13}) {
      CAPTURE(threads);
      const auto [other_nll, other] = run(threads);
      CHECK(other_nll == nll);
      CHECK(same_bits<T>(other, gradient));
    }
  }
}

TEST_CASE_TEMPLATE("a row keeps its bits wherever it stands in whatever batch", T, float, double) {
  for (const Shape& shape : {Shape{7, 3, {7, 5}, Activation::tanh}, Shape{16, 2, {128}, Activation::relu}}) {
    Pair<T> pair(shape);
    const std::int64_t most = 200, width = pair.width;
    const std::vector<T> x = random_values<T>(most * width, 12);
    std::vector<T> log_prob(static_cast<std::size_t>(most), kPoison<T>);
    pair.flow.template log_prob<T>(x, log_prob);
    for (std::int64_t batch = 1; batch <= most; ++batch) {
      const std::int64_t first = (batch * 37) % (most - batch + 1);
      const auto rows = static_cast<std::size_t>(batch);
      std::vector<T> part(rows, kPoison<T>);
      pair.flow.template log_prob<T>(std::span<const T>(x).subspan(static_cast<std::size_t>(first * width),
                                                                   rows * static_cast<std::size_t>(width)),
                                     part);
      CAPTURE(batch);
      CHECK(same_bits<T>(part, std::span<const T>(log_prob).subspan(static_cast<std::size_t>(first), rows)));
    }
  }
}

TEST_CASE("weights stored as bfloat16 give the bits of full weights that are rounded so") {
  const auto rounded = [](float value) {  // to 8 significant bits, ties to even, by the processor's own rounding
    int exponent = 0;
    const double fraction = std::frexp(static_cast<double>(value), &exponent);
    return static_cast<float>(std::ldexp(std::nearbyint(std::ldexp(fraction, 8)), exponent - 8));
  };
  for (const Shape& shape : kShapes) {
    const FlowSpec spec = spec_of<float>(shape);
    Flow narrow(spec, 0, {}, nvpflow::Precision::float32, nvpflow::Weights::bfloat16), full(spec);
    REQUIRE(narrow.weights() == nvpflow::Weights::bfloat16);
    REQUIRE(full.weights() == nvpflow::Weights::full);
    std::vector<float> parameters = random_parameters<float>(narrow.layout(), 4);
    narrow.set_parameters<float>(parameters);
    for (const nvpflow::TensorInfo& tensor : narrow.layout().tensors()) {
      if (tensor.shape.size() != 2) continue;
      for (std::int64_t i = tensor.offset; i < tensor.offset + tensor.size; ++i) {
        parameters[static_cast<std::size_t>(i)] = rounded(parameters[static_cast<std::size_t>(i)]);
      }
    }
    full.set_parameters<float>(parameters);
    for (const std::int64_t batch : kBatches) {
      const std::vector<float> x = random_values<float>(batch * shape.input_size, 5);
      std::vector<float> got(static_cast<std::size_t>(batch), kPoison<float>), expected(got);
      narrow.log_prob<float>(x, got);
      full.log_prob<float>(x, expected);
      CAPTURE(batch);
      CHECK(same_bits<float>(got, expected));
    }
    CHECK(narrow.to({}, nvpflow::Precision::float32, nvpflow::Weights::bfloat16).weights() == narrow.weights());
  }
  check_throws_code(ErrorCode::invalid_argument, "weights", [] {
    Flow(spec_of<double>(kShapes[0]), 0, {}, nvpflow::Precision::float32, nvpflow::Weights::bfloat16);
  });
}

TEST_CASE_TEMPLATE("a row of NaN or inf is NaN in all its results and leaves the others alone", T, float, double) {
  Pair<T> pair({6, 3, {9}, Activation::relu, 1.0, true});
  const std::int64_t rows = 70, width = 6;
  const std::vector<T> clean = random_values<T>(rows * width, 13);
  std::vector<T> z(clean.size()), log_det(static_cast<std::size_t>(rows)), log_prob = log_det;
  pair.flow.template forward<T>(clean, z, log_det);
  pair.flow.template log_prob<T>(clean, log_prob);
  const T infinity = std::numeric_limits<T>::infinity();
  for (const T bad : {kPoison<T>, infinity, -infinity}) {
    for (std::int64_t column = 0; column < width; ++column) {
      std::vector<T> x = clean;
      const std::int64_t bad_row = 31 + column;
      x[static_cast<std::size_t>(bad_row * width + column)] = bad;
      std::vector<T> dirty_z(x.size()), dirty_log_det(log_det.size()), dirty_log_prob(log_det.size());
      pair.flow.template forward<T>(x, dirty_z, dirty_log_det);
      pair.flow.template log_prob<T>(x, dirty_log_prob);
      for (std::int64_t row = 0; row < rows; ++row) {
        const auto r = static_cast<std::size_t>(row);
        for (std::int64_t d = 0; d < width; ++d) {
          const auto at = static_cast<std::size_t>(row * width + d);
          if (row == bad_row)
            CHECK(std::isnan(dirty_z[at]));
          else
            CHECK(dirty_z[at] == z[at]);
        }
        if (row == bad_row) {
          CHECK(std::isnan(dirty_log_det[r]));
          CHECK(std::isnan(dirty_log_prob[r]));
        } else {
          CHECK(dirty_log_det[r] == log_det[r]);
          CHECK(dirty_log_prob[r] == log_prob[r]);
        }
      }
    }
  }
}

TEST_CASE_TEMPLATE("a finite row that overflows has density 0, in any batch, and no NaN", T, float, double) {
  const T largest = std::numeric_limits<T>::max();
  for (const Shape& shape : kShapes) {
    if (shape.hidden_sizes.size() > 0 && shape.hidden_sizes[0] > 200) continue;
    CAPTURE(shape.input_size);
    Pair<T> pair(shape);
    const std::int64_t rows = 70, width = pair.width;
    std::vector<T> x = random_values<T>(rows * width, 14);
    for (std::int64_t r = 1; r < rows; r += 4) {
      for (std::int64_t d = 0; d < width; ++d) {
        if (r % 8 == 1 || d == r % width) x[static_cast<std::size_t>(r * width + d)] = d % 2 == 0 ? largest : -largest;
      }
    }
    std::vector<T> log_prob(static_cast<std::size_t>(rows)), z(x.size()), log_det = log_prob;
    pair.flow.template log_prob<T>(x, log_prob);
    for (const bool inverse : {false, true}) {
      if (inverse) {
        pair.flow.template inverse<T>(x, z, log_det);
      } else {
        pair.flow.template forward<T>(x, z, log_det);
      }
      CHECK(std::none_of(z.begin(), z.end(), [](T v) { return std::isnan(v); }));
      CHECK(std::none_of(log_det.begin(), log_det.end(),
                         [=](T v) { return inverse ? !(v > -largest) : !(v < largest); }));
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      const auto at = static_cast<std::size_t>(r);
      CAPTURE(r);
      if (r % 4 == 1) {
        CHECK(log_prob[at] == -std::numeric_limits<T>::infinity());
        const double expected = pair.oracle.log_prob(row_of(x, r, width));
        CHECK(static_cast<T>(expected) == log_prob[at]);
      }
      T alone = 0;
      pair.flow.template log_prob<T>(
          std::span<const T>(x).subspan(static_cast<std::size_t>(r * width), static_cast<std::size_t>(width)),
          std::span<T>(&alone, 1));
      CHECK(alone == log_prob[at]);
    }
  }
}

TEST_CASE("const calls from many threads while another replaces the parameters") {
  Pair<float> pair({8, 4, {32}, Activation::relu});
  const std::vector<float> first = random_parameters<float>(pair.flow.layout(), 21);
  const std::vector<float> second = random_parameters<float>(pair.flow.layout(), 22);
  const std::int64_t rows = 65;
  const std::vector<float> x = random_values<float>(rows * pair.width, 23);
  const auto answer = [&](const std::vector<float>& parameters) {
    pair.flow.set_parameters<float>(parameters);
    std::vector<float> log_prob(static_cast<std::size_t>(rows));
    pair.flow.log_prob<float>(x, log_prob);
    return log_prob;
  };
  const std::vector<float> second_answer = answer(second), first_answer = answer(first);
  REQUIRE_FALSE(same_bits<float>(first_answer, second_answer));

  std::atomic<int> torn{0};
  std::atomic<bool> done{false};
  std::vector<std::thread> readers;
  for (int reader = 0; reader < 4; ++reader) {
    readers.emplace_back([&] {
      std::vector<float> log_prob(static_cast<std::size_t>(rows));
      while (!done) {
        pair.flow.log_prob<float>(x, log_prob);
        torn += !same_bits<float>(log_prob, first_answer) && !same_bits<float>(log_prob, second_answer);
      }
    });
  }
  // Each set twice: the flow keeps two copies and writes them in turn, which would otherwise always hold the same set.
  for (int turn = 0; turn < 300; ++turn) pair.flow.set_parameters<float>(turn / 2 % 2 == 0 ? second : first);
  done = true;
  for (std::thread& reader : readers) reader.join();
  CHECK(torn == 0);
}

TEST_CASE_TEMPLATE("a sample is one endless sequence of rows, however it is cut", T, float, double) {
  Pair<T> pair({7, 2, {11}, Activation::silu});
  const std::int64_t rows = 401, width = 7;
  std::vector<T> whole(static_cast<std::size_t>(rows * width), kPoison<T>);
  pair.flow.template sample<T>(5, whole);
  for (const T value : whole) REQUIRE(std::isfinite(value));
  for (const std::int64_t piece : {1, 2, 3, 16, 17, 64, 100}) {
    std::vector<T> pieces(whole.size(), kPoison<T>);
    for (std::int64_t row = 0; row < rows; row += piece) {
      const auto count = static_cast<std::size_t>(std::min(piece, rows - row) * width);
      pair.flow.template sample<T>(5, std::span<T>(pieces).subspan(static_cast<std::size_t>(row * width), count),
                                   static_cast<std::uint64_t>(row));
    }
    CAPTURE(piece);
    CHECK(same_bits<T>(pieces, whole));
  }
  for (const int threads : {2, 3, 4}) {
    pair.flow.set_num_threads(threads);
    std::vector<T> again(whole.size(), kPoison<T>);
    pair.flow.template sample<T>(5, again);
    CHECK(same_bits<T>(again, whole));
  }
  std::vector<T> other(whole.size(), kPoison<T>);
  pair.flow.template sample<T>(6, other);
  CHECK_FALSE(same_bits<T>(other, whole));
}

namespace {

/// Of both bases, of specs of all kinds of layers, and of every number of rows that takes another path.
template <class T>
void check_density_of_sample(const FlowSpec& spec, unsigned seed = 1) {
  Flow flow(spec);
  const std::vector<T> parameters = random_parameters<T>(flow.layout(), seed);
  flow.template set_parameters<T>(parameters);
  const oracle::Flow oracle(spec, widened<T>(parameters));
  const std::int64_t rows = 150, width = spec.input_size;
  const auto count = static_cast<std::size_t>(rows * width);
  std::vector<T> x(count, kPoison<T>), again = x, z = x;
  std::vector<T> whole(static_cast<std::size_t>(rows), kPoison<T>);
  flow.template sample<T>(5, x);
  flow.template sample_and_log_prob<T>(5, again, whole);
  CHECK(same_bits<T>(again, x));
  flow.noise_unchecked(5, 0, rows, z.data());
  std::int64_t wrong = 0;
  for (std::int64_t row = 0; row < rows; ++row) {
    const auto latent = row_of(z, row, width);
    const double expected = oracle.base_density(latent) - oracle.inverse(latent).log_det;
    wrong += !within(whole[static_cast<std::size_t>(row)], expected, kBudget<T>);
  }
  CHECK(wrong == 0);
  for (const int threads : {1, 3}) {
    flow.set_num_threads(threads);
    for (const std::int64_t piece : {1, 3, 16, 67}) {
      std::vector<T> pieces(whole.size(), kPoison<T>);
      for (std::int64_t row = 0; row < rows; row += piece) {
        const auto size = static_cast<std::size_t>(std::min(piece, rows - row));
        const auto first = static_cast<std::size_t>(row);
        flow.template sample_and_log_prob<T>(5, std::span<T>(again).first(size * static_cast<std::size_t>(width)),
                                             std::span<T>(pieces).subspan(first, size),
                                             static_cast<std::uint64_t>(row));
      }
      CHECK(same_bits<T>(pieces, whole));
    }
  }
}

}  // namespace

TEST_CASE_TEMPLATE("a sample comes with the log-density of its rows", T, float, double) {
  check_density_of_sample<T>(spec_of<T>({7, 2, {11}, Activation::silu}));
  for (const std::int64_t features : {2, 5, 18}) {
    for (unsigned seed = 0; seed < 4; ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      FlowSpec spec = mixed_spec(features, seed, dtype_of<T>);
      check_density_of_sample<T>(spec, seed);
      spec.base = nvpflow::UniformBase{-1.5, 0.25};
      check_density_of_sample<T>(spec, seed);
    }
  }
}

TEST_CASE_TEMPLATE("a temperature is that of the base, the score is the gradient of log p", T, float, double) {
  for (const std::int64_t features : {2, 5, 18}) {
    const FlowSpec spec = mixed_spec(features, 3, dtype_of<T>);
    Flow flow(spec);
    const std::vector<T> parameters = random_parameters<T>(flow.layout(), 3);
    flow.template set_parameters<T>(parameters);
    const oracle::Flow oracle(spec, widened<T>(parameters));
    const std::size_t rows = 67, width = static_cast<std::size_t>(features);
    const double temperature = 0.3;
    std::vector<T> x(rows * width, kPoison<T>), log_p(rows, kPoison<T>), again = log_p, score = x, expected = x;
    flow.template sample_and_log_prob<T>(5, x, log_p, 2, {}, temperature);
    flow.template log_prob<T>(x, again, {}, temperature);
    std::int64_t wrong = 0;
    for (std::size_t row = 0; row < rows; ++row) {
      const auto found = oracle.forward(row_of(x, static_cast<std::int64_t>(row), features));
      double density = found.log_det;
      for (const auto z : found.values) {
        density -= 0.5 * static_cast<double>(z * z) / temperature + 0.5 * std::log(2 * std::numbers::pi * temperature);
      }
      wrong += !within(again[row], density, kBudget<T>);
    }
    CHECK(wrong == 0);
    const std::vector<T> ones(rows, T(1));
    flow.template score<T>(x, score);
    flow.log_prob_vjp_unchecked(x.data(), static_cast<std::int64_t>(rows), ones.data(), nullptr, expected.data(),
                                nullptr, false);
    CHECK(same_bits<T>(score, expected));
    std::vector<T> first(width, kPoison<T>);
    flow.template sample<T>(5, first, 2, {}, temperature);
    CHECK(same_bits<T>(std::span<const T>(first), std::span<const T>(x).first(width)));
  }
  Flow flow(spec_of<T>({7, 2, {11}, Activation::silu}));
  std::vector<T> x(7), log_p(1);
  check_throws_code(ErrorCode::invalid_argument, "temperature is 0, expected a number from 1e-12 to 1e12",
                    [&] { flow.template log_prob<T>(x, log_p, {}, 0); });
}

TEST_CASE("the log-density of a sample has arrays of its own") {
  const Flow flow(spec_of<float>({7, 2, {11}, Activation::silu}));
  std::vector<float> x(3 * 7), log_prob(3);
  const auto refused = [](const char* what, const auto& call) {
    check_throws_code(ErrorCode::invalid_argument, what, call);
  };
  refused("log_prob holds 2 elements, expected 3",
          [&] { flow.sample_and_log_prob<float>(1, x, std::span(log_prob).first(2)); });
  refused("x overlaps log_prob", [&] { flow.sample_and_log_prob<float>(1, x, std::span(x).first(3)); });
  check_throws_code(ErrorCode::type_mismatch, "the flow is float32", [&] {
    std::vector<double> wide(3 * 7);
    flow.sample_and_log_prob(1, std::span(wide), std::span(log_prob));
  });
}

TEST_CASE("copies own their parameters, moves carry them") {
  Pair<double> pair({4, 2, {3}, Activation::tanh});
  const std::vector<double> x = random_values<double>(4 * 9, 31);
  const auto score = [&](const Flow& flow) {
    std::vector<double> log_prob(9, kPoison<double>);
    flow.log_prob<double>(x, log_prob);
    return log_prob;
  };
  const std::vector<double> before = score(pair.flow);
  Flow copy = pair.flow;
  copy.set_parameters<double>(random_parameters<double>(copy.layout(), 32));
  CHECK(score(pair.flow) == before);
  CHECK(score(copy) != before);
  const std::vector<double> of_copy = score(copy);
  const Flow moved = std::move(copy);
  CHECK(score(moved) == of_copy);
}

TEST_CASE("spans of the wrong length, overlap and dtype are refused and named") {
  Flow flow(spec_of<float>({4, 2, {3}, Activation::relu}));
  std::vector<float> x(12, 0.5f), z(12), log_det(3);
  const std::vector<float> untouched_x = x;
  const auto invalid = ErrorCode::invalid_argument;
  const std::span<const float> in(x);
  const std::span<float> out(z), dets(log_det);

  check_throws_code(invalid, "x holds", [&] { flow.forward<float>(in.first(11), out, dets); });
  check_throws_code(invalid, "z holds", [&] { flow.forward<float>(in, out.first(8), dets); });
  check_throws_code(invalid, "log_det holds", [&] { flow.forward<float>(in, out, dets.first(2)); });
  check_throws_code(invalid, "z holds", [&] { flow.inverse<float>(in.first(10), out, dets); });
  check_throws_code(invalid, "out holds", [&] { flow.log_prob<float>(in, dets.first(1)); });
  check_throws_code(invalid, "x holds", [&] { flow.sample<float>(0, out.first(7)); });
  check_throws_code(invalid, "x has no rows", [&] { flow.nll<float>({}); });
  check_throws_code(invalid, "gradient holds", [&] { flow.nll_gradient<float>(in, dets); });
  check_throws_code(invalid, "parameters holds", [&] { flow.set_parameters<float>(in); });
  check_throws_code(invalid, "layer is 2", [&] { flow.conditioner<float>(2, in, dets, dets); });
  check_throws_code(invalid, "grad_out holds",
                    [&] { flow.vjp<float>(Direction::forward, in, in.first(8), {}, out, {}); });
  check_throws_code(invalid, "grad_log_det holds",
                    [&] { flow.vjp<float>(Direction::forward, in, {}, in.first(2), out, {}); });
  check_throws_code(invalid, "grad_in holds", [&] { flow.vjp<float>(Direction::forward, in, in, {}, dets, {}); });
  check_throws_code(invalid, "grad_parameters holds",
                    [&] { flow.vjp<float>(Direction::forward, in, in, {}, {}, dets); });

  std::vector<float> shared(15, 0.5f);
  const std::span<float> all(shared);
  check_throws_code(invalid, "overlap", [&] { flow.forward<float>(all.first(12), all.subspan(1, 12), dets); });
  check_throws_code(invalid, "overlap", [&] { flow.forward<float>(all.first(12), all.first(12), dets); });
  check_throws_code(invalid, "overlap", [&] { flow.forward<float>(in, all.first(12), all.subspan(11, 3)); });
  check_throws_code(invalid, "overlap", [&] { flow.log_prob<float>(all.first(12), all.first(3)); });

  std::vector<double> wide(12), wide_log_det(3);
  check_throws_code(ErrorCode::type_mismatch, "float32", [&] {
    flow.forward<double>(std::span<const double>(wide).first(4), std::span<double>(wide).last(4));
  });
  check_throws_code(ErrorCode::type_mismatch, "float32", [&] { flow.log_prob<double>(wide, wide_log_det); });
  check_throws_code(ErrorCode::type_mismatch, "float32", [&] { (void)flow.parameters<double>(); });

  CHECK(x == untouched_x);
}

namespace {

/// A flow that maps every row to itself, its bits and all.
template <class T>
Flow identity_flow(std::int64_t features, const nvpflow::Base& base) {
  FlowSpec spec = FlowSpec::real_nvp(features, 2, {3}, Activation::tanh, 1.0, false, dtype_of<T>);
  for (nvpflow::LayerSpec& layer : spec.layers) std::get<nvpflow::Coupling>(layer).transform = nvpflow::Additive{};
  spec.base = base;
  Flow flow(spec);
  flow.set_parameters<T>(std::vector<T>(static_cast<std::size_t>(flow.num_parameters())));
  return flow;
}

}  // namespace

TEST_CASE_TEMPLATE("a uniform base agrees with the oracle, inside and outside", T, float, double) {
  for (const std::int64_t features : {2, 3, 5, 17}) {
    for (std::uint64_t seed = 0; seed < 8; ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      FlowSpec spec = mixed_spec(features, seed, dtype_of<T>);
      spec.base = nvpflow::UniformBase{-1.5, 2.25};
      Flow flow(spec);
      const std::vector<T> parameters = random_parameters<T>(flow.layout(), static_cast<unsigned>(seed));
      flow.template set_parameters<T>(parameters);
      const oracle::Flow oracle(spec, widened<T>(parameters));
      // Latents of which those of every second row lie inside, none near an edge.
      const std::int64_t rows = 70;
      std::vector<T> z = random_values<T>(rows * features, 5), x(z.size());
      for (std::size_t i = 0; i < z.size(); ++i) z[i] = T(0.5) + std::tanh(z[i]);
      for (std::int64_t row = 1; row < rows; row += 2) {
        z[static_cast<std::size_t>(row * features + row % features)] = row % 4 == 1 ? T(2.5) : T(-1.75);
      }
      flow.template inverse<T>(z, x);
      std::vector<T> log_prob(static_cast<std::size_t>(rows), kPoison<T>);
      flow.template log_prob<T>(x, log_prob);
      std::int64_t wrong = 0;
      for (std::int64_t row = 0; row < rows; ++row) {
        const T actual = log_prob[static_cast<std::size_t>(row)];
        const double expected = oracle.log_prob(row_of(x, row, features));
        CHECK(std::isinf(expected) == (row % 2 == 1));
        wrong += std::isinf(expected) ? static_cast<double>(actual) != expected
                                      : !within(static_cast<double>(actual), expected, 4 * kBudget<T>);
        T alone = kPoison<T>;
        flow.template log_prob<T>(
            std::span<const T>(x).subspan(static_cast<std::size_t>(row * features), static_cast<std::size_t>(features)),
            std::span<T>(&alone, 1));
        wrong += std::memcmp(&alone, &actual, sizeof(T)) != 0;
      }
      CHECK(wrong == 0);
      CHECK(std::isinf(flow.template nll<T>(x)));
    }
  }
}

TEST_CASE_TEMPLATE("the edges of a uniform base belong to it, and what is NaN is in none", T, float, double) {
  constexpr T kInfinite = std::numeric_limits<T>::infinity(), kMax = std::numeric_limits<T>::max();
  const T low = T(0.1), high = T(0.7);
  for (const std::int64_t features : {2, 17}) {
    const Flow flow =
        identity_flow<T>(features, nvpflow::UniformBase{static_cast<double>(low), static_cast<double>(high)});
    const double inside =
        -static_cast<double>(features) * std::log(static_cast<double>(high) - static_cast<double>(low));
    const std::vector<T> values = {low,
                                   high,
                                   std::nextafter(low, -kInfinite),
                                   std::nextafter(high, kInfinite),
                                   T(0.4),
                                   kMax,
                                   -kMax,
                                   kInfinite,
                                   -kInfinite,
                                   kPoison<T>};
    for (const std::int64_t rows : {1, 100}) {  // row path, tiles
      for (std::size_t v = 0; v < values.size(); ++v) {
        CAPTURE(values[v]);
        std::vector<T> x(static_cast<std::size_t>(rows * features), T(0.4)), log_prob(static_cast<std::size_t>(rows));
        for (std::int64_t row = 0; row < rows; ++row)
          x[static_cast<std::size_t>(row * features + row % features)] = values[v];
        flow.log_prob<T>(x, log_prob);
        for (const T value : log_prob) {
          if (v < 2 || v == 4) CHECK(within(static_cast<double>(value), inside, kBudget<T>));
          if (v == 2 || v == 3 || v == 5 || v == 6) CHECK(value == -kInfinite);
          if (v > 6) CHECK(std::isnan(value));
        }
      }
    }
  }
}

TEST_CASE("gradients under a uniform base agree with finite differences, and rows outside have none") {
  for (const std::int64_t features : {2, 7}) {
    for (std::uint64_t seed = 0; seed < 4; ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      FlowSpec spec = mixed_spec(features, seed, DType::float64);
      spec.base = nvpflow::UniformBase{-1, 2};
      Flow flow(spec);
      const std::vector<double> parameters = random_parameters<double>(flow.layout(), static_cast<unsigned>(seed));
      flow.set_parameters<double>(parameters);
      oracle::Flow oracle(spec, parameters);
      const std::int64_t rows = 37;
      std::vector<double> z = random_values<double>(rows * features, 5), x(z.size());
      for (double& value : z) value = 0.5 + std::tanh(value);
      for (std::int64_t row = 1; row < rows; row += 3) z[static_cast<std::size_t>(row * features)] = 3;
      flow.inverse<double>(z, x);
      const std::vector<double> weights = random_values<double>(rows, 6);
      const auto loss = [&] {
        double sum = 0;
        for (std::int64_t row = 0; row < rows; ++row) {
          const double log_prob = oracle.log_prob(row_of(x, row, features));
          REQUIRE(std::isinf(log_prob) == (row % 3 == 1));
          if (row % 3 != 1) sum += weights[static_cast<std::size_t>(row)] * log_prob;
        }
        return sum;
      };
      std::vector<double> gradient(parameters.size(), kPoison<double>), grad_x(x.size(), kPoison<double>);
      std::vector<double> log_prob(static_cast<std::size_t>(rows), kPoison<double>), direct = log_prob;
      flow.log_prob_vjp_unchecked(x.data(), rows, weights.data(), log_prob.data(), grad_x.data(), gradient.data(),
                                  false);
      flow.log_prob<double>(x, direct);
      CHECK(same_bits<double>(log_prob, direct));
      std::int64_t wrong = 0;
      std::vector<double>& values = oracle.parameters();
      for (std::size_t i = 0; i < values.size(); i += 3) {
        wrong += !within(gradient[i], oracle::central_difference(values[i], loss), 1e-7);
      }
      for (std::size_t i = 0; i < x.size(); ++i) {
        wrong += !within(grad_x[i], oracle::central_difference(x[i], loss), 1e-7);
        if (static_cast<std::int64_t>(i) / features % 3 == 1) wrong += grad_x[i] != 0;
      }
      CHECK(wrong == 0);
      // The mean loss of these rows is infinite, its gradient that of the rows inside.
      std::vector<double> of_mean(gradient.size(), kPoison<double>);
      CHECK(flow.nll_gradient<double>(x, of_mean) == HUGE_VAL);
      const std::vector<double> ones(static_cast<std::size_t>(rows), -1.0 / static_cast<double>(rows));
      flow.log_prob_vjp_unchecked(x.data(), rows, ones.data(), nullptr, nullptr, gradient.data(), false);
      for (std::size_t i = 0; i < gradient.size(); ++i) CHECK(within(of_mean[i], gradient[i], 1e-12));
      for (const int threads : {2, 3}) {
        flow.set_num_threads(threads);
        std::vector<double> again(gradient.size(), kPoison<double>);
        flow.nll_gradient<double>(x, again);
        CHECK(same_bits<double>(again, of_mean));
      }
    }
  }
}

TEST_CASE_TEMPLATE("uniform noise stays inside, is uniform, and one sequence however it is cut", T, float, double) {
  struct Interval {
    double low, high;
  };
  const std::int64_t features = 5, rows = 200'000;
  const auto count = static_cast<std::size_t>(rows * features);
  for (const Interval interval : {Interval{0, 1}, Interval{0.1, 0.3}, Interval{-1e6, 1e6 + 0.25},
                                  Interval{1, 1 + 0x1p-20}, Interval{-3, -1e-30}}) {
    CAPTURE(interval.low);
    Flow flow = identity_flow<T>(features, nvpflow::UniformBase{interval.low, interval.high});
    const T low = static_cast<T>(interval.low), high = static_cast<T>(interval.high);
    std::vector<T> x(count, kPoison<T>);
    flow.template sample<T>(7, x);
    CHECK(std::all_of(x.begin(), x.end(), [=](T v) { return v >= low && v <= high; }));
    std::vector<T> log_prob(static_cast<std::size_t>(rows));
    flow.template log_prob<T>(x, log_prob);
    CHECK(std::all_of(log_prob.begin(), log_prob.end(), [](T v) { return std::isfinite(v); }));

    std::vector<T> pieces(std::size_t{1000} * 5, kPoison<T>);
    for (const int threads : {1, 3}) {
      flow.set_num_threads(threads);
      for (const std::int64_t piece : {1, 3, 17, 1000}) {
        for (std::int64_t row = 0; row < 1000; row += piece) {
          const auto size = static_cast<std::size_t>(std::min<std::int64_t>(piece, 1000 - row) * features);
          flow.template sample<T>(7, std::span<T>(pieces).subspan(static_cast<std::size_t>(row * features), size),
                                  static_cast<std::uint64_t>(row));
        }
        CHECK(same_bits<T>(pieces, std::span<const T>(x).first(pieces.size())));
      }
    }
    if (interval.low == 1) continue;                              // float32 has eight steps there
    for (std::int64_t column = 0; column < features; ++column) {  // Kolmogorov and Smirnov, at one in a million
      std::vector<double> u;
      for (std::size_t i = static_cast<std::size_t>(column); i < count; i += 5) {
        u.push_back((static_cast<double>(x[i]) - interval.low) / (interval.high - interval.low));
      }
      std::sort(u.begin(), u.end());
      double distance = 0;
      for (std::size_t i = 0; i < u.size(); ++i) {
        const double step = 1 / static_cast<double>(u.size());
        distance = std::max({distance, std::fabs(u[i] - static_cast<double>(i) * step),
                             std::fabs(u[i] - static_cast<double>(i + 1) * step)});
      }
      CHECK(distance * std::sqrt(static_cast<double>(rows)) < 2.7);
    }
  }
}

namespace {

/// The bases with parameters. The first component of every mixture is alike: a wrong offset is a wrong density.
const std::vector<nvpflow::Base> kTrainedBases = {
    nvpflow::StudentTBase{4, true},
    nvpflow::MixtureBase{1, nvpflow::MixtureBase::Covariance::diagonal},
    nvpflow::MixtureBase{3, nvpflow::MixtureBase::Covariance::diagonal},
    nvpflow::MixtureBase{1, nvpflow::MixtureBase::Covariance::full},
    nvpflow::MixtureBase{5, nvpflow::MixtureBase::Covariance::full},
};

/// A flow of random layers over a base, and parameters.
template <class T>
struct BasedFlow {
  FlowSpec spec;
  std::vector<T> parameters;

  BasedFlow(const nvpflow::Base& base, std::int64_t features, std::uint64_t seed)
      : spec(mixed_spec(features, seed, dtype_of<T>)) {
    spec.base = base;
    if (seed % 2 == 1) {
      spec.context_size = 3;
      spec.standardize_context = true;
    }
    parameters = random_parameters<T>(ParamLayout(spec), static_cast<unsigned>(seed));
  }
};

}  // namespace

TEST_CASE_TEMPLATE("bases with parameters agree with the oracle, on both paths", T, float, double) {
  for (const nvpflow::Base& base : kTrainedBases) {
    for (const std::int64_t features : {2, 3, 9, 18}) {
      for (std::uint64_t seed = 0; seed < 4; ++seed) {
        CAPTURE(base.index());
        CAPTURE(features);
        CAPTURE(seed);
        const BasedFlow<T> based(base, features, seed);
        Flow flow(based.spec);
        flow.template set_parameters<T>(based.parameters);
        const oracle::Flow oracle(based.spec, {based.parameters.begin(), based.parameters.end()});
        const std::int64_t rows = 53, width = based.spec.context_size;
        const std::vector<T> x = random_values<T>(rows * features, 5), c = random_values<T>(rows * width, 6);
        std::vector<T> log_prob(static_cast<std::size_t>(rows), kPoison<T>);
        flow.template log_prob<T>(x, log_prob,
                                  width > 0 ? nvpflow::Context(std::span<const T>(c)) : nvpflow::Context());
        std::int64_t wrong = 0;
        for (std::int64_t row = 0; row < rows; ++row) {
          const double expected = oracle.log_prob(row_of(x, row, features), row_of(c, row, width));
          wrong += !within(static_cast<double>(log_prob[static_cast<std::size_t>(row)]), expected, 5 * kBudget<T>);
          T alone = kPoison<T>;
          const auto at = static_cast<std::size_t>(row * features), of_c = static_cast<std::size_t>(row * width);
          const std::span<const T> given = std::span<const T>(c).subspan(of_c, static_cast<std::size_t>(width));
          flow.template log_prob<T>(std::span<const T>(x).subspan(at, static_cast<std::size_t>(features)),
                                    std::span<T>(&alone, 1), width > 0 ? nvpflow::Context(given) : nvpflow::Context());
          wrong += alone != log_prob[static_cast<std::size_t>(row)];
        }
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("gradients under bases with parameters agree with finite differences") {
  for (const nvpflow::Base& base : kTrainedBases) {
    for (const std::int64_t features : {2, 5}) {
      for (const std::uint64_t seed : {0, 2}) {
        CAPTURE(base.index());
        CAPTURE(features);
        CAPTURE(seed);
        const BasedFlow<double> based(base, features, seed);
        Flow flow(based.spec);
        flow.set_parameters<double>(based.parameters);
        oracle::Flow oracle(based.spec, based.parameters);
        const std::int64_t rows = 71;  // three units
        std::vector<double> x = random_values<double>(rows * features, 5);
        const std::vector<double> weights = random_values<double>(rows, 6);
        const auto loss = [&] {
          double sum = 0;
          for (std::int64_t row = 0; row < rows; ++row) {
            sum += weights[static_cast<std::size_t>(row)] * oracle.log_prob(row_of(x, row, features));
          }
          return sum;
        };
        std::vector<double> gradient(based.parameters.size(), kPoison<double>), grad_x(x.size(), kPoison<double>);
        flow.log_prob_vjp_unchecked(x.data(), rows, weights.data(), nullptr, grad_x.data(), gradient.data(), false);
        std::int64_t wrong = 0;
        std::vector<double>& values = oracle.parameters();
        const auto base_begin = static_cast<std::size_t>(
            flow.layout().tensors()[flow.layout().first_tensor(based.spec.layers.size())].offset);
        for (std::size_t i = 0; i < values.size(); i += i < base_begin ? 97 : 1) {
          wrong += !within(gradient[i], oracle::central_difference(values[i], loss), 1e-6);
        }
        for (std::size_t i = 0; i < x.size(); i += 17) {
          wrong += !within(grad_x[i], oracle::central_difference(x[i], loss), 1e-6);
        }
        CHECK(wrong == 0);
        std::vector<double> twice = gradient;
        flow.log_prob_vjp_unchecked(x.data(), rows, weights.data(), nullptr, nullptr, twice.data(), true);
        for (std::size_t i = 0; i < twice.size(); ++i) CHECK(within(twice[i], 2 * gradient[i], 1e-12));
        for (const int threads : {2, 3}) {
          flow.set_num_threads(threads);
          std::vector<double> again(gradient.size(), kPoison<double>);
          flow.log_prob_vjp_unchecked(x.data(), rows, weights.data(), nullptr, grad_x.data(), again.data(), false);
          CHECK(same_bits<double>(again, gradient));
        }
        // The base is no part of a transform.
        const std::vector<double> cotangents = random_values<double>(rows * features, 8);
        flow.vjp_unchecked(Direction::forward, x.data(), rows, cotangents.data(), weights.data(), nullptr, twice.data(),
                           false);
        CHECK(std::all_of(twice.begin() + static_cast<std::ptrdiff_t>(base_begin), twice.end(),
                          [](double g) { return g == 0; }));
      }
    }
  }
}

TEST_CASE_TEMPLATE("threads that share a tile leave the bits of one, also of a base's gradient", T, float, double) {
  for (const nvpflow::Base& base : kTrainedBases) {
    CAPTURE(base.index());
    FlowSpec spec = FlowSpec::real_nvp(20, 2, {64}, Activation::tanh, 1, false, dtype_of<T>);
    spec.base = base;
    Flow flow(spec, 3);
    const std::vector<T> x = random_values<T>(std::int64_t{3000} * 20, 5);
    std::vector<T> gradient(static_cast<std::size_t>(flow.num_parameters()), kPoison<T>), again = gradient;
    flow.set_num_threads(1);
    const double loss = flow.template nll_gradient<T>(x, gradient);
    for (const int threads : {2, 3, 7}) {
      flow.set_num_threads(threads);
      CHECK(flow.template nll_gradient<T>(x, again) == loss);
      CHECK(same_bits<T>(again, gradient));
    }
  }
}

TEST_CASE_TEMPLATE("rows far out have a density under a student_t base, and what overflows has none", T, float,
                   double) {
  Flow flow = identity_flow<T>(2, nvpflow::StudentTBase{1, true});
  const T largest = std::numeric_limits<T>::max();
  const double log_pi = std::log(std::acos(-1.0)), log_largest = std::log(static_cast<double>(largest));
  for (const std::int64_t rows : {1, 40}) {
    std::vector<T> x(static_cast<std::size_t>(2 * rows), T(0)), log_prob(static_cast<std::size_t>(rows));
    for (std::int64_t row = 0; row < rows; ++row)
      x[static_cast<std::size_t>(2 * row)] = row % 2 == 0 ? largest : -largest;
    flow.template log_prob<T>(x, log_prob);
    for (const T value : log_prob) {  // 1 / (pi (1 + z^2)), whose square T does not hold
      CHECK(within(static_cast<double>(value), -2 * log_pi - 2 * log_largest, kBudget<T>));
    }
  }
  Flow mixture = identity_flow<T>(2, nvpflow::MixtureBase{3, nvpflow::MixtureBase::Covariance::full});
  for (const std::int64_t rows : {1, 40}) {
    std::vector<T> x(static_cast<std::size_t>(2 * rows), largest), log_prob(static_cast<std::size_t>(rows), T(0));
    mixture.template log_prob<T>(x, log_prob);
    for (const T value : log_prob) CHECK(value == -std::numeric_limits<T>::infinity());
    std::fill(x.begin(), x.end(), std::numeric_limits<T>::quiet_NaN());
    mixture.template log_prob<T>(x, log_prob);
    for (const T value : log_prob) CHECK(std::isnan(value));
  }
}

TEST_CASE_TEMPLATE("samples of bases with parameters are one sequence, with their log-densities", T, float, double) {
  for (const nvpflow::Base& base : kTrainedBases) {
    CAPTURE(base.index());
    const BasedFlow<T> based(base, 5, 2);
    Flow flow(based.spec);
    flow.template set_parameters<T>(based.parameters);
    const std::int64_t rows = 700;
    std::vector<T> x(static_cast<std::size_t>(rows * 5), kPoison<T>), log_prob(static_cast<std::size_t>(rows));
    flow.template sample_and_log_prob<T>(7, x, log_prob);
    std::vector<T> direct(log_prob.size()), pieces(x.size(), kPoison<T>);
    flow.template log_prob<T>(x, direct);
    std::vector<double> distances;
    for (std::size_t i = 0; i < direct.size(); ++i) {
      distances.push_back(std::fabs(static_cast<double>(direct[i] - log_prob[i])) /
                          (1 + std::fabs(static_cast<double>(direct[i]))));
    }
    std::nth_element(distances.begin(), distances.begin() + 350, distances.end());
    CHECK(distances[350] < kBudget<T>);
    for (std::int64_t row = 0; row < rows; row += 7) {
      flow.template sample<T>(7, std::span<T>(pieces).subspan(static_cast<std::size_t>(row * 5), 35),
                              static_cast<std::uint64_t>(row));
    }
    CHECK(same_bits<T>(pieces, x));
  }
}

TEST_CASE_TEMPLATE("splines on the interval of a uniform base never carry a row out", T, float, double) {
  struct Interval {
    double low, high;
  };
  for (const Interval interval : {Interval{0, 1}, Interval{0.1, 0.7}, Interval{-1000, 1000.3}}) {
    for (const bool free : {false, true}) {
      CAPTURE(interval.low);
      CAPTURE(free);
      FlowSpec spec = FlowSpec::real_nvp(5, 4, {7}, Activation::tanh, 1.0, false, dtype_of<T>);
      nvpflow::Spline spline;
      spline.lower = interval.low;
      spline.upper = interval.high;
      spline.boundary = free ? nvpflow::Spline::Boundary::free : nvpflow::Spline::Boundary::one;
      for (nvpflow::LayerSpec& layer : spec.layers) std::get<nvpflow::Coupling>(layer).transform = spline;
      spec.base = nvpflow::UniformBase{interval.low, interval.high};
      Flow flow(spec);
      std::vector<T> parameters = random_parameters<T>(flow.layout(), 1);
      for (T& value : parameters) value *= T(3);
      flow.template set_parameters<T>(parameters);
      // Half of the numbers are at the edges, or a few steps inside.
      const std::int64_t rows = 20'000;
      const T low = static_cast<T>(interval.low), high = static_cast<T>(interval.high);
      std::vector<T> x = random_values<T>(rows * 5, 3), log_prob(static_cast<std::size_t>(rows));
      for (std::size_t i = 0; i < x.size(); ++i) {
        x[i] = std::clamp(low + (high - low) * (T(0.5) + T(0.25) * x[i]), low, high);
        if (i % 7 == 1) x[i] = low;
        if (i % 7 == 2) x[i] = high;
        for (std::size_t step = 0; i % 7 == 3 && step < i % 4; ++step)
          x[i] = std::nextafter(step == 0 ? high : x[i], low);
      }
      flow.template log_prob<T>(x, log_prob);
      CHECK(std::all_of(log_prob.begin(), log_prob.end(), [](T v) { return std::isfinite(v); }));
      for (std::size_t r = 0; r < 50; ++r) {
        T alone = 0;
        flow.template log_prob<T>(std::span<const T>(x).subspan(5 * r, 5), std::span<T>(&alone, 1));
        CHECK(std::memcmp(&alone, &log_prob[r], sizeof(T)) == 0);
      }
      flow.template sample<T>(5, x);
      CHECK(std::all_of(x.begin(), x.end(), [=](T v) { return v >= low && v <= high; }));
      flow.template log_prob<T>(x, log_prob);
      CHECK(std::all_of(log_prob.begin(), log_prob.end(), [](T v) { return std::isfinite(v); }));
    }
  }
}

TEST_CASE_TEMPLATE("fit names rows outside a uniform base before it trains", T, float, double) {
  const std::int64_t rows = 60;
  std::vector<T> x = random_values<T>(rows * 2, 3);
  for (T& value : x) value = T(0.5) + T(0.4) * std::tanh(value);
  Flow flow = identity_flow<T>(2, nvpflow::UniformBase{0, 1});
  nvpflow::FitOptions options;
  options.epochs = 1;
  options.validation_fraction = 0.2;
  std::vector<T> outside = x;
  outside[2 * 7 + 1] = T(1.25);
  outside[2 * 50] = T(-0.5);
  const char* expected = "x has 2 of 60 rows outside the uniform base (row 7, counted from 0, is [";
  check_throws_code(ErrorCode::invalid_argument, expected, [&] { nvpflow::fit<T>(flow, outside, {}, options); });
  check_throws_code(ErrorCode::invalid_argument, ", 1.25]: latent 1 is 1.25, expected 0 to 1)",
                    [&] { nvpflow::fit<T>(flow, outside, {}, options); });
  check_throws_code(ErrorCode::invalid_argument, "validation has 2 of 60 rows outside",
                    [&] { nvpflow::fit<T>(flow, x, outside, options); });
  options.learning_rate = 1e-4;
  const nvpflow::History history = nvpflow::fit<T>(flow, x, {}, options);
  CHECK(std::fabs(history.best_loss) < 1e-3);
  // Layers that stretch carry rows out.
  FlowSpec spec = FlowSpec::real_nvp(2, 2, {8}, Activation::tanh, 1.0, false, dtype_of<T>);
  spec.base = nvpflow::UniformBase{0, 1};
  Flow stretching(spec);
  options.learning_rate = 0.05;
  options.epochs = 20;
  check_throws_code(ErrorCode::not_finite, "rows have left the interval of the uniform base",
                    [&] { nvpflow::fit<T>(stretching, x, {}, options); });
}

/// ctest runs this program once per instruction set; 77 tells it that this processor lacks the one it asked for.
int main(int argc, char** argv) {
  const char* wanted = std::getenv("NVPFLOW_ISA");
  const std::string available = "," + std::string(nvpflow::cpu_isas_available()) + ",";
  if (wanted != nullptr && available.find("," + std::string(wanted) + ",") == std::string::npos) {
    std::printf("skipped: this processor has no %s\n", wanted);
    return 77;
  }
  std::printf("instruction set: %s\n", nvpflow::cpu_isa());
  return doctest::Context(argc, argv).run();
}

TEST_CASE_TEMPLATE("fit finds a conditional density", T, float, double) {
  // x = 2 c + 0.5 e, for which -mean log p is the entropy of 0.5 e; c in units far from 1.
  for (const bool divided : {true, false}) {
    FlowSpec spec;
    spec.input_size = 1;
    spec.context_size = 2;
    spec.standardize_context = true;
    spec.dtype = dtype_of<T>;
    nvpflow::Coupling coupling;
    coupling.transformed.name = nvpflow::FeatureSet::Name::all;
    coupling.network.hidden_sizes = {16};
    spec.layers = {nvpflow::Standardize{}, coupling, coupling};
    Flow flow(spec, 1);
    const std::int64_t rows = 2000;
    const std::vector<T> units = random_values<T>(rows, 3), noise = random_values<T>(rows, 4);
    std::vector<T> x, context;
    for (std::size_t r = 0; r < static_cast<std::size_t>(rows); ++r) {
      x.push_back(T(2) * units[r] + T(0.5) * noise[r]);
      context.insert(context.end(), {T(300) + T(1000) * units[r], T(7)});  // the second never changes
    }
    nvpflow::FitOptions options;
    options.epochs = 60;
    options.learning_rate = 5e-3;
    const std::span<const T> all = x, given = context;
    const auto history = divided ? nvpflow::fit<T>(flow, all, {}, options, nullptr, given)
                                 : nvpflow::fit<T>(flow, all.first(1800), all.subspan(1800), options, nullptr,
                                                   given.first(3600), given.subspan(3600));
    const double entropy = 0.5 * std::log(2 * std::acos(-1.0) * std::exp(1.0)) + std::log(0.5);
    CHECK(history.best_loss < entropy + 0.15);
    CHECK(flow.template nll<T>(x, context) < entropy + 0.1);
    const auto size = static_cast<std::size_t>(flow.num_parameters());
    CHECK(flow.template parameters<T>()[size - 4] > T(200));  // context.mean
    CHECK(flow.template parameters<T>()[size - 1] == T(0));   // the second's log_std
    Flow initialized(spec, 1);
    CHECK(initialized.template initialize_from<T>(all, nvpflow::Statistics::mean, given).size() == 1);
    CHECK(initialized.template parameters<T>()[size - 2] != T(0));  // context.log_std
    CHECK(initialized.template parameters<T>()[size - 1] == T(0));
    CHECK_THROWS_AS(initialized.template initialize_from<T>(all, nvpflow::Statistics::mean, given.first(4)),
                    nvpflow::Error);
    CHECK_THROWS_AS(nvpflow::fit<T>(flow, all, {}, options), nvpflow::Error);
    CHECK_THROWS_AS(nvpflow::fit<T>(flow, all, {}, options, nullptr, given.first(4)), nvpflow::Error);
  }
}
