// Contexts and temperatures through the C interface: the bits of the C++ calls, what is refused and how, and how long
// conditioned flows live.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <nvpflow.h>
#include <nvpflow/execution.hpp>
#include <nvpflow/flow.hpp>

#include "mixed_spec.hpp"

namespace {

using nvpflow::conditional_spec;
using nvpflow::DType;
using nvpflow::Flow;
using nvpflow::FlowSpec;
using nvpflow::SampleWeights;

template <class T>
constexpr DType kDType = sizeof(T) == 4 ? DType::float32 : DType::float64;
template <class T>
constexpr T kPoison = std::numeric_limits<T>::quiet_NaN();

/// A flow as C sees it, through a file.
class Handle {
 public:
  explicit Handle(const Flow& flow) {
    const std::string path = "test_c_context.safetensors";
    flow.save(path);
    REQUIRE(nvpflow_load(path.c_str(), &flow_) == NVPFLOW_OK);
    std::remove(path.c_str());
  }
  explicit Handle(nvpflow_flow* flow) : flow_(flow) {}
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() { nvpflow_free(flow_); }
  operator nvpflow_flow*() const { return flow_; }  // NOLINT(google-explicit-constructor)

 private:
  nvpflow_flow* flow_ = nullptr;
};

nvpflow_flow* conditioned(const nvpflow_flow* flow, const float* context) {
  nvpflow_flow* made = nullptr;
  REQUIRE(nvpflow_condition_f32(flow, context, &made) == NVPFLOW_OK);
  return made;
}
nvpflow_flow* conditioned(const nvpflow_flow* flow, const double* context) {
  nvpflow_flow* made = nullptr;
  REQUIRE(nvpflow_condition_f64(flow, context, &made) == NVPFLOW_OK);
  return made;
}

nvpflow_flow* tempered(const nvpflow_flow* flow, double temperature) {
  nvpflow_flow* made = nullptr;
  REQUIRE(nvpflow_temper(flow, temperature, &made) == NVPFLOW_OK);
  return made;
}

/// The functions for rows of X and other arrays of T.
template <class X, class T>
struct Functions;
#define NVPFLOW_FUNCTIONS(X, T, suffix)                                                    \
  template <>                                                                              \
  struct Functions<X, T> {                                                                 \
    static constexpr auto& log_prob = nvpflow_log_prob_##suffix;                           \
    static constexpr auto& log_prob_context = nvpflow_log_prob_context_##suffix;           \
    static constexpr auto& forward = nvpflow_forward_##suffix;                             \
    static constexpr auto& forward_context = nvpflow_forward_context_##suffix;             \
    static constexpr auto& inverse = nvpflow_inverse_##suffix;                             \
    static constexpr auto& inverse_context = nvpflow_inverse_context_##suffix;             \
    static constexpr auto& sample = nvpflow_sample_##suffix;                               \
    static constexpr auto& sample_context = nvpflow_sample_context_##suffix;               \
    static constexpr auto& sampled = nvpflow_sample_and_log_prob_##suffix;                 \
    static constexpr auto& sampled_context = nvpflow_sample_and_log_prob_context_##suffix; \
    static constexpr auto& score = nvpflow_score_##suffix;                                 \
    static constexpr auto& score_context = nvpflow_score_context_##suffix;                 \
  };
NVPFLOW_FUNCTIONS(float, float, f32)
NVPFLOW_FUNCTIONS(double, double, f64)
NVPFLOW_FUNCTIONS(double, float, rows64)
#undef NVPFLOW_FUNCTIONS

constexpr auto& nll_gradient_context(float) { return nvpflow_nll_gradient_context_f32; }
constexpr auto& nll_gradient_context(double) { return nvpflow_nll_gradient_context_f64; }
constexpr auto& nll_gradient(float) { return nvpflow_nll_gradient_f32; }
constexpr auto& nll_gradient(double) { return nvpflow_nll_gradient_f64; }
constexpr auto& weighted_context(float) { return nvpflow_nll_gradient_weighted_context_f32; }
constexpr auto& weighted_context(double) { return nvpflow_nll_gradient_weighted_context_f64; }
constexpr auto& weighted(float) { return nvpflow_nll_gradient_weighted_f32; }
constexpr auto& weighted(double) { return nvpflow_nll_gradient_weighted_f64; }

template <class T>
std::vector<T> random_values(std::int64_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  std::vector<T> values(static_cast<std::size_t>(count));
  for (T& value : values) value = static_cast<T>(normal(engine));
  return values;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

/// Every function with a context of so many rows, and with it bound where there is one, against C++.
template <class X, class T>
void check_numbers(const Flow& flow, const nvpflow_flow* c, std::int64_t rows, std::int64_t context_rows) {
  CAPTURE(rows);
  CAPTURE(context_rows);
  using C = Functions<X, T>;
  const std::int64_t features = flow.spec().input_size;
  const std::vector<X> x = random_values<X>(rows * features, 5);
  const std::vector<T> z = random_values<T>(rows * features, 6);
  const std::vector<T> context = random_values<T>(context_rows * flow.spec().context_size, 9);
  const Handle given(context_rows == 1 ? conditioned(c, context.data()) : nullptr);
  std::optional<nvpflow::ConditionedFlow> view;  // the same in C++
  if (context_rows == 1) view = flow.condition(std::span<const T>(context));
  const std::vector<T> no_rows(static_cast<std::size_t>(rows), kPoison<T>), no_latents(z.size(), kPoison<T>);
  const std::vector<X> no_data(x.size(), kPoison<X>);
  const std::span<const X> in(x);
  const std::span<const T> latents(z);
  const T* of = context.data();

  std::vector<T> expected = no_rows, found = no_rows;
  flow.log_prob(in, std::span(expected), context);
  REQUIRE(C::log_prob_context(c, x.data(), rows, of, context_rows, found.data()) == NVPFLOW_OK);
  CHECK(same_bits(found, expected));
  if (given != nullptr) {
    found = no_rows;
    REQUIRE(C::log_prob(given, x.data(), rows, found.data()) == NVPFLOW_OK);
    CHECK(same_bits(found, expected));
    found = no_rows;
    view->log_prob(in, std::span(found));
    CHECK(same_bits(found, expected));
  }

  std::vector<T> expected_out = no_latents, found_out = no_latents;
  flow.forward(in, std::span(expected_out), std::span(expected), context);
  REQUIRE(C::forward_context(c, x.data(), rows, of, context_rows, found_out.data(), found.data()) == NVPFLOW_OK);
  CHECK((same_bits(found_out, expected_out) && same_bits(found, expected)));
  if (given != nullptr) {
    found_out = no_latents;
    REQUIRE(C::forward(given, x.data(), rows, found_out.data(), nullptr) == NVPFLOW_OK);
    CHECK(same_bits(found_out, expected_out));
    found_out = no_latents;
    view->forward(in, std::span(found_out));
    CHECK(same_bits(found_out, expected_out));
  }

  expected_out = found_out = no_latents;
  flow.score(in, std::span(expected_out), context);
  REQUIRE(C::score_context(c, x.data(), rows, of, context_rows, found_out.data()) == NVPFLOW_OK);
  CHECK(same_bits(found_out, expected_out));
  if (given != nullptr) {
    found_out = no_latents;
    REQUIRE(C::score(given, x.data(), rows, found_out.data()) == NVPFLOW_OK);
    CHECK(same_bits(found_out, expected_out));
  }

  std::vector<X> expected_x = no_data, found_x = no_data;
  flow.inverse(latents, std::span(expected_x), std::span(expected), context);
  REQUIRE(C::inverse_context(c, z.data(), rows, of, context_rows, found_x.data(), found.data()) == NVPFLOW_OK);
  CHECK((same_bits(found_x, expected_x) && same_bits(found, expected)));
  if (given != nullptr) {
    found_x = no_data;
    REQUIRE(C::inverse(given, z.data(), rows, found_x.data(), nullptr) == NVPFLOW_OK);
    CHECK(same_bits(found_x, expected_x));
    found_x = no_data;
    view->inverse(latents, std::span(found_x));
    CHECK(same_bits(found_x, expected_x));
  }

  flow.template sample<X>(7, expected_x, 3, context);
  found_x = no_data;
  REQUIRE(C::sample_context(c, 7, 3, rows, of, context_rows, found_x.data()) == NVPFLOW_OK);
  CHECK(same_bits(found_x, expected_x));
  if (given != nullptr) {
    found_x = no_data;
    REQUIRE(C::sample(given, 7, 3, rows, found_x.data()) == NVPFLOW_OK);
    CHECK(same_bits(found_x, expected_x));
    found_x = no_data;
    view->template sample<X>(7, found_x, 3);
    CHECK(same_bits(found_x, expected_x));
  }

  std::vector<X> again = no_data;
  flow.sample_and_log_prob(7, std::span(again), std::span(expected), 3, context);
  CHECK(same_bits(again, expected_x));
  found_x = no_data, found = no_rows;
  REQUIRE(C::sampled_context(c, 7, 3, rows, of, context_rows, found_x.data(), found.data()) == NVPFLOW_OK);
  CHECK((same_bits(found_x, expected_x) && same_bits(found, expected)));
  if (given != nullptr) {
    found_x = no_data, found = no_rows;
    REQUIRE(C::sampled(given, 7, 3, rows, found_x.data(), found.data()) == NVPFLOW_OK);
    CHECK((same_bits(found_x, expected_x) && same_bits(found, expected)));
    found_x = no_data, found = no_rows;
    view->sample_and_log_prob(7, std::span(found_x), std::span(found), 3);
    CHECK((same_bits(found_x, expected_x) && same_bits(found, expected)));
  }
}

/// What has a temperature, of a flow under a context of so many rows, against C++.
template <class X, class T>
void check_temperature(const Flow& flow, const nvpflow_flow* c, std::int64_t rows, std::int64_t context_rows) {
  using C = Functions<X, T>;
  constexpr double kTemperature = 0.3;
  const Handle warm(tempered(c, kTemperature));
  const std::vector<X> x = random_values<X>(rows * flow.spec().input_size, 5);
  const std::vector<T> context = random_values<T>(context_rows * flow.spec().context_size, 9);
  std::vector<T> expected(static_cast<std::size_t>(rows), kPoison<T>), found = expected;
  flow.log_prob(std::span(x), std::span(expected), context, kTemperature);
  REQUIRE(C::log_prob_context(warm, x.data(), rows, context.data(), context_rows, found.data()) == NVPFLOW_OK);
  CHECK(same_bits(found, expected));
  std::vector<X> expected_x(x.size(), kPoison<X>), found_x = expected_x;
  flow.template sample<X>(7, expected_x, 3, context, kTemperature);
  REQUIRE(C::sample_context(warm, 7, 3, rows, context.data(), context_rows, found_x.data()) == NVPFLOW_OK);
  CHECK(same_bits(found_x, expected_x));
  flow.sample_and_log_prob(7, std::span(expected_x), std::span(expected), 3, context, kTemperature);
  REQUIRE(C::sampled_context(warm, 7, 3, rows, context.data(), context_rows, found_x.data(), found.data()) ==
          NVPFLOW_OK);
  CHECK((same_bits(found_x, expected_x) && same_bits(found, expected)));
  if (context_rows != 1) return;
  // In either order.
  const Handle given(conditioned(warm, context.data())), bound(conditioned(c, context.data()));
  const Handle also(tempered(bound, kTemperature));
  for (const nvpflow_flow* view : {static_cast<nvpflow_flow*>(given), static_cast<nvpflow_flow*>(also)}) {
    REQUIRE(C::sampled(view, 7, 3, rows, found_x.data(), found.data()) == NVPFLOW_OK);
    CHECK((same_bits(found_x, expected_x) && same_bits(found, expected)));
  }
}

template <class T>
void check_gradient(const Flow& flow, const nvpflow_flow* c, std::int64_t rows, std::int64_t context_rows) {
  const std::vector<T> x = random_values<T>(rows * flow.spec().input_size, 5);
  const std::vector<T> context = random_values<T>(context_rows * flow.spec().context_size, 9);
  std::vector<T> expected(static_cast<std::size_t>(flow.num_parameters()), kPoison<T>), found = expected;
  const double loss = flow.nll_gradient<T>(x, expected, context);
  double nll = 0;
  REQUIRE(nll_gradient_context(T())(c, x.data(), rows, context.data(), context_rows, &nll, found.data()) == NVPFLOW_OK);
  CHECK(nll == loss);
  CHECK(same_bits(found, expected));
  std::vector<double> weights(static_cast<std::size_t>(rows), 0.0);
  for (std::size_t i = 0; i < weights.size(); i += 2) weights[i] = 1 + static_cast<double>(i % 3);
  std::vector<T> by_weight(expected.size(), kPoison<T>);
  const double mean = flow.nll_gradient<T>(x, by_weight, SampleWeights(weights), context);
  CHECK(mean == flow.nll<T>(x, SampleWeights(weights), context));
  REQUIRE(weighted_context(T())(c, x.data(), rows, weights.data(), context.data(), context_rows, &nll, found.data()) ==
          NVPFLOW_OK);
  CHECK(nll == mean);
  CHECK(same_bits(found, by_weight));
  if (context_rows != 1) return;
  const Handle given(conditioned(c, context.data()));
  std::fill(found.begin(), found.end(), kPoison<T>);
  REQUIRE(nll_gradient(T())(given, x.data(), rows, &nll, found.data()) == NVPFLOW_OK);
  CHECK(nll == loss);
  CHECK(same_bits(found, expected));
  REQUIRE(weighted(T())(given, x.data(), rows, weights.data(), &nll, found.data()) == NVPFLOW_OK);
  CHECK(nll == mean);
  CHECK(same_bits(found, by_weight));
}

void check_refused(nvpflow_status status, nvpflow_status expected, const std::string& message) {
  CHECK(status == expected);
  CHECK(std::string(nvpflow_last_error()) == message);
}
void check_refused(nvpflow_status status, const std::string& message) {
  check_refused(status, NVPFLOW_INVALID_ARGUMENT, message);
}

}  // namespace

TEST_CASE_TEMPLATE("a context through C gives the bits of C++", T, float, double) {
  for (const std::int64_t features : {1, 2, 5}) {
    for (std::uint64_t seed = 0; seed < 4; ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      const Flow flow(conditional_spec(features, seed, 3, kDType<T>), seed);
      const Handle c(flow);
      CHECK(nvpflow_context_size(c) == 3);
      for (const std::int64_t rows : {0, 1, 3, 37}) {
        for (const std::int64_t context_rows : {std::int64_t{1}, rows}) {
          check_numbers<T, T>(flow, c, rows, context_rows);
          check_temperature<T, T>(flow, c, rows, context_rows);
          if constexpr (sizeof(T) == 4) {
            if (takes_float64_rows(flow.spec())) {
              check_numbers<double, float>(flow, c, rows, context_rows);
              check_temperature<double, float>(flow, c, rows, context_rows);
            }
          }
          if (rows > 0) check_gradient<T>(flow, c, rows, context_rows);
        }
      }
    }
  }
}

TEST_CASE("a sample under several contexts has so many rows of each") {
  const Flow flow(conditional_spec(4, 2, 2, DType::float64), 1);
  const Handle c(flow);
  const std::vector<double> context = random_values<double>(3 * 2, 9);
  std::vector<double> expected(12 * 4, kPoison<double>), found = expected, none;
  flow.sample<double>(7, expected, 0, context);
  REQUIRE(nvpflow_sample_context_f64(c, 7, 0, 12, context.data(), 3, found.data()) == NVPFLOW_OK);
  CHECK(same_bits(found, expected));
  // Rows 4 to 7 are those that the second context gives.
  std::vector<double> second(4 * 4);
  REQUIRE(nvpflow_sample_context_f64(c, 7, 4, 4, context.data() + 2, 1, second.data()) == NVPFLOW_OK);
  CHECK(same_bits(second, std::vector<double>(found.begin() + 16, found.begin() + 32)));
  CHECK(nvpflow_sample_context_f64(c, 7, 0, 0, context.data(), 3, nullptr) == NVPFLOW_OK);
  check_refused(nvpflow_sample_context_f64(c, 7, 0, 10, context.data(), 3, found.data()),
                "context_rows is 3, expected 1 or rows, 10, or a number that divides it");
  check_refused(nvpflow_sample_context_f64(c, 7, 0, 10, context.data(), 0, found.data()),
                "context_rows is 0, expected 1 or rows, 10, or a number that divides it");
}

TEST_CASE("a context row that holds NaN makes its row NaN") {
  const Flow flow(conditional_spec(4, 2, 2, DType::float32), 1);
  const Handle c(flow);
  const std::vector<float> x(3 * 4);
  std::vector<float> context(3 * 2), out(3);
  context[3] = kPoison<float>;
  REQUIRE(nvpflow_log_prob_context_f32(c, x.data(), 3, context.data(), 3, out.data()) == NVPFLOW_OK);
  CHECK((out[0] == out[2] && out[1] != out[1]));
  const Handle given(conditioned(c, context.data() + 2));
  REQUIRE(nvpflow_log_prob_f32(given, x.data(), 3, out.data()) == NVPFLOW_OK);
  CHECK(out[0] != out[0]);
}

TEST_CASE("functions without a context name those to call instead") {
  // D = 3, standardized, so that it takes float64 rows.
  FlowSpec spec = FlowSpec::real_nvp(3, 2, {8}, nvpflow::Activation::relu, 1.0, /*standardize=*/true);
  spec.context_size = 2;
  const Handle c{Flow(spec)}, wide{Flow(spec.with_dtype(DType::float64))};
  std::vector<float> x(6), z(6), out(2), gradient(static_cast<std::size_t>(nvpflow_num_parameters(c)));
  std::vector<double> x64(6), z64(6), out64(2), gradient64(gradient.size());
  double nll = 0;
  const auto names = [](nvpflow_status status, const std::string& function, const std::string& condition) {
    check_refused(status, "context is missing, expected [context_rows, 2]; call " + function +
                              ", or give a flow that " + condition + " has made");
  };
  const char *one = "nvpflow_condition_f32", *two = "nvpflow_condition_f64";
  names(nvpflow_log_prob_f32(c, x.data(), 2, out.data()), "nvpflow_log_prob_context_f32", one);
  names(nvpflow_log_prob_f64(wide, x64.data(), 2, out64.data()), "nvpflow_log_prob_context_f64", two);
  names(nvpflow_log_prob_rows64(c, x64.data(), 2, out.data()), "nvpflow_log_prob_context_rows64", one);
  names(nvpflow_forward_f32(c, x.data(), 2, z.data(), nullptr), "nvpflow_forward_context_f32", one);
  names(nvpflow_forward_f64(wide, x64.data(), 2, z64.data(), nullptr), "nvpflow_forward_context_f64", two);
  names(nvpflow_forward_rows64(c, x64.data(), 2, z.data(), nullptr), "nvpflow_forward_context_rows64", one);
  names(nvpflow_inverse_f32(c, z.data(), 2, x.data(), nullptr), "nvpflow_inverse_context_f32", one);
  names(nvpflow_inverse_f64(wide, z64.data(), 2, x64.data(), nullptr), "nvpflow_inverse_context_f64", two);
  names(nvpflow_inverse_rows64(c, z.data(), 2, x64.data(), nullptr), "nvpflow_inverse_context_rows64", one);
  names(nvpflow_sample_f32(c, 1, 0, 2, x.data()), "nvpflow_sample_context_f32", one);
  names(nvpflow_sample_f64(wide, 1, 0, 2, x64.data()), "nvpflow_sample_context_f64", two);
  names(nvpflow_sample_rows64(c, 1, 0, 2, x64.data()), "nvpflow_sample_context_rows64", one);
  names(nvpflow_nll_gradient_f32(c, x.data(), 2, &nll, gradient.data()), "nvpflow_nll_gradient_context_f32", one);
  names(nvpflow_nll_gradient_f64(wide, x64.data(), 2, &nll, gradient64.data()), "nvpflow_nll_gradient_context_f64",
        two);
  names(nvpflow_log_prob_f32(c, nullptr, 0, nullptr), "nvpflow_log_prob_context_f32", one);  // rows or not
  CHECK(nvpflow_log_prob_f64(c, x64.data(), 2, out64.data()) == NVPFLOW_TYPE_MISMATCH);
}

TEST_CASE("a context that cannot be is refused by name") {
  FlowSpec spec = FlowSpec::real_nvp(4, 2, {8});
  spec.context_size = 2;
  const Handle c{Flow(spec)};
  const std::vector<float> x(3 * 4), context(3 * 2);
  std::vector<float> z(3 * 4), out(3), gradient(static_cast<std::size_t>(nvpflow_num_parameters(c)));
  double nll = 0;
  const auto log_prob = [&](const float* of, std::int64_t context_rows, std::int64_t rows = 3) {
    return nvpflow_log_prob_context_f32(c, x.data(), rows, of, context_rows, out.data());
  };
  const std::int64_t most = std::numeric_limits<std::int64_t>::max();
  check_refused(log_prob(context.data(), 2), "context_rows is 2, expected 1 or rows, 3");
  check_refused(log_prob(context.data(), 0), "context_rows is 0, expected 1 or rows, 3");
  check_refused(log_prob(context.data(), -1), "context_rows is -1, expected 1 or rows, 3");
  check_refused(log_prob(context.data(), most), "context_rows is 9223372036854775807, expected 1 or rows, 3");
  check_refused(log_prob(nullptr, 3), "context is NULL");
  check_refused(log_prob(nullptr, 1, 0), "context is NULL");
  CHECK(log_prob(nullptr, 0, 0) == NVPFLOW_OK);
  CHECK(log_prob(context.data(), -1, -1) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(log_prob(context.data(), most, most) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_sample_context_f32(c, 1, 0, 0, context.data(), most, z.data()) == NVPFLOW_INVALID_ARGUMENT);
  CHECK(nvpflow_sample_context_f32(c, 1, 0, 0, context.data(), -3, z.data()) == NVPFLOW_INVALID_ARGUMENT);
  check_refused(nvpflow_forward_context_f32(c, x.data(), 3, context.data(), 2, z.data(), nullptr),
                "context_rows is 2, expected 1 or rows, 3");
  check_refused(nvpflow_inverse_context_f32(c, x.data(), 3, context.data(), 2, z.data(), nullptr),
                "context_rows is 2, expected 1 or rows, 3");
  check_refused(nvpflow_nll_gradient_context_f32(c, x.data(), 3, context.data(), 2, &nll, gradient.data()),
                "context_rows is 2, expected 1 or rows, 3");
  check_refused(nvpflow_nll_gradient_context_f32(c, x.data(), 0, context.data(), 0, &nll, gradient.data()),
                "x has no rows, expected at least one: the mean over an empty batch is not defined");
  check_refused(nvpflow_log_prob_context_f32(c, nullptr, 3, context.data(), 3, out.data()), "x is NULL");
  check_refused(nvpflow_log_prob_context_f32(c, x.data(), 3, context.data(), 3, nullptr), "log_prob is NULL");
  check_refused(nvpflow_log_prob_context_f32(c, x.data(), 3, out.data() + 1, 1, out.data()),
                "out overlaps context; they must not share memory");
  // Of another type: the flow does not begin with a standardize layer.
  std::vector<double> x64(3 * 4), context64(3 * 2), out64(3);
  CHECK(nvpflow_log_prob_context_f64(c, x64.data(), 3, context64.data(), 3, out64.data()) == NVPFLOW_TYPE_MISMATCH);
  CHECK(nvpflow_log_prob_context_rows64(c, x64.data(), 3, context.data(), 3, out.data()) == NVPFLOW_TYPE_MISMATCH);
  CHECK(nvpflow_sample_context_rows64(c, 1, 0, 3, context.data(), 3, x64.data()) == NVPFLOW_TYPE_MISMATCH);
  nvpflow_flow* none = c;
  CHECK(nvpflow_condition_f64(c, context64.data(), &none) == NVPFLOW_TYPE_MISMATCH);
  CHECK(none == nullptr);
  check_refused(nvpflow_condition_f32(c, nullptr, &none), "context is NULL");
  check_refused(nvpflow_condition_f32(nullptr, context.data(), &none), "flow is NULL");
  check_refused(nvpflow_condition_f32(c, context.data(), nullptr), "conditioned is NULL");
}

TEST_CASE("a conditioned flow is one without a context that cannot be changed") {
  FlowSpec spec = FlowSpec::real_nvp(4, 2, {8}, nvpflow::Activation::relu, 1.0, /*standardize=*/true);
  spec.context_size = 2;
  Flow flow(spec, 1);
  flow.set_column_names({"a", "b", "c", "d"});
  flow.set_threshold(nvpflow::Threshold{-3, 0.5});
  const Handle c(flow);
  const std::vector<float> x(3 * 4, 0.5f), context(2, 1.0f);
  std::vector<float> out(3);
  const Handle given(conditioned(c, context.data()));
  CHECK(nvpflow_context_size(given) == 0);
  CHECK(nvpflow_input_size(given) == 4);
  CHECK(nvpflow_dtype_of(given) == NVPFLOW_FLOAT32);
  CHECK(nvpflow_num_layers(given) == 3);
  CHECK(nvpflow_num_couplings(given) == 2);
  CHECK(nvpflow_num_parameters(given) == nvpflow_num_parameters(c));
  CHECK(nvpflow_takes_float64_rows(given) == 1);
  std::size_t needed = 0, of_flow = 0;
  CHECK(nvpflow_spec_json(given, nullptr, 0, &needed) == NVPFLOW_OK);
  CHECK(nvpflow_spec_json(c, nullptr, 0, &of_flow) == NVPFLOW_OK);
  CHECK(needed == of_flow);
  char name[2] = "";
  CHECK(nvpflow_column_name(given, 1, name, sizeof name, nullptr) == NVPFLOW_OK);
  CHECK(name[0] == 'b');
  double limit = 0;
  CHECK(nvpflow_threshold(given, &limit, nullptr) == NVPFLOW_OK);
  CHECK(limit == -3);

  check_refused(nvpflow_log_prob_context_f32(given, x.data(), 3, context.data(), 1, out.data()),
                "the flow is conditioned, expected one that takes a context; call nvpflow_log_prob_f32");
  nvpflow_flow* none = nullptr;
  check_refused(nvpflow_condition_f32(given, context.data(), &none),
                "the flow is conditioned, expected one that takes a context");
  const std::string changed = "flow is conditioned, expected the flow that it was made of";
  check_refused(nvpflow_set_num_threads(given, 1), changed);
  check_refused(nvpflow_reload(given, "there/is/no/such/file"), changed);
  check_refused(nvpflow_initialize_from_f32(given, x.data(), 3), changed);
  check_refused(nvpflow_swap(given, c), "a is conditioned, expected the flow that it was made of");
  check_refused(nvpflow_swap(c, given), "b is conditioned, expected the flow that it was made of");
}

TEST_CASE("a conditioned flow keeps its flow alive and follows its parameters") {
  const FlowSpec spec = conditional_spec(4, 2, 2, DType::float32);
  const Flow first(spec, 1), second(spec, 2);
  std::optional<Handle> c(std::in_place, first);
  const Handle other(second);
  const std::vector<float> x(20 * 4, 0.5f);
  std::vector<float> context(2, 1.0f), out(20), expected(20);
  const Handle given(conditioned(*c, context.data()));
  context.assign(2, -5.0f);  // it has a copy
  const std::vector<float> bound(2, 1.0f);
  REQUIRE(nvpflow_swap(*c, other) == NVPFLOW_OK);
  for (const std::int64_t rows : {1, 20}) {
    const std::span<const float> some(x.data(), static_cast<std::size_t>(rows * 4));
    second.log_prob<float>(some, std::span(expected).first(static_cast<std::size_t>(rows)), bound);
    REQUIRE(nvpflow_log_prob_f32(given, x.data(), rows, out.data()) == NVPFLOW_OK);
    CHECK(std::memcmp(out.data(), expected.data(), static_cast<std::size_t>(rows) * sizeof(float)) == 0);
  }
  c.reset();
  std::fill(out.begin(), out.end(), kPoison<float>);
  REQUIRE(nvpflow_log_prob_f32(given, x.data(), 20, out.data()) == NVPFLOW_OK);
  CHECK(same_bits(out, expected));
}

TEST_CASE("a flow at a temperature refuses what has none, and keeps its flow alive") {
  const Flow flow(FlowSpec::real_nvp(4, 2, {8}, nvpflow::Activation::relu, 1.0, /*standardize=*/true), 1);
  std::optional<Handle> c(std::in_place, flow);
  const Handle warm(tempered(*c, 0.5)), one(tempered(*c, 1));
  const std::vector<float> x(3 * 4, 0.5f);
  std::vector<float> out(3 * 4), gradient(static_cast<std::size_t>(flow.num_parameters()));
  std::vector<float> expected(3);
  double nll = 0;
  const std::string message = " has temperature 0.5, expected the flow that it was made of";
  check_refused(nvpflow_score_f32(warm, x.data(), 3, out.data()), "flow" + message);
  check_refused(nvpflow_nll_gradient_f32(warm, x.data(), 3, &nll, gradient.data()), "flow" + message);
  check_refused(nvpflow_set_num_threads(warm, 1), "flow" + message);
  check_refused(nvpflow_reload(warm, "there/is/no/such/file"), "flow" + message);
  check_refused(nvpflow_initialize_from_f32(warm, x.data(), 3), "flow" + message);
  check_refused(nvpflow_swap(warm, *c), "a" + message);
  check_refused(nvpflow_swap(*c, warm), "b" + message);
  nvpflow_flow* none = *c;
  check_refused(nvpflow_temper(warm, 2, &none), "flow" + message);
  CHECK(none == nullptr);
  check_refused(nvpflow_temper(*c, 0, &none), "temperature is 0, expected a number from 1e-12 to 1e12");
  check_refused(nvpflow_temper(*c, kPoison<double>, &none), "temperature is nan, expected a number from 1e-12 to 1e12");
  FlowSpec other = flow.spec();
  other.base = nvpflow::StudentTBase{};
  const Handle heavy{Flow(other)};
  const Handle same(tempered(heavy, 1));
  check_refused(nvpflow_temper(heavy, 2, &none),
                "temperature is 2, expected 1: only a normal base has a temperature, and this flow's is another one");
  // Without a context, and behind the flow's end.
  c.reset();
  flow.log_prob<float>(x, expected, {}, 0.5);
  REQUIRE(nvpflow_log_prob_f32(warm, x.data(), 3, out.data()) == NVPFLOW_OK);
  CHECK(std::memcmp(out.data(), expected.data(), 3 * sizeof(float)) == 0);
  flow.log_prob<float>(x, expected);
  REQUIRE(nvpflow_log_prob_f32(one, x.data(), 3, out.data()) == NVPFLOW_OK);
  CHECK(std::memcmp(out.data(), expected.data(), 3 * sizeof(float)) == 0);
}
