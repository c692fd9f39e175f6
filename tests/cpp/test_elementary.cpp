// The vectorised elementary functions against long double references, in units in the last place, on every instruction
// set that this processor has.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <limits>
#include <string_view>
#include <vector>

#include "cpu/isa.hpp"
#include "elementary_functions.hpp"

// NVPFLOW_ISAS: NVPFLOW_ISA(name) for each set that is built in.
namespace nvpflow_test {
#define NVPFLOW_ISA(name) extern const ElementaryFunctions elementary_##name;
NVPFLOW_ISAS
#undef NVPFLOW_ISA
}  // namespace nvpflow_test

namespace {

using nvpflow_test::ElementaryFunctions;
using nvpflow_test::Evaluate;
using nvpflow_test::Function;
using Real = long double;

std::vector<ElementaryFunctions> supported() {
#define NVPFLOW_ISA(name) nvpflow_test::elementary_##name,
  const ElementaryFunctions built[] = {NVPFLOW_ISAS};
#undef NVPFLOW_ISA
  std::vector<ElementaryFunctions> sets;
  for (const nvpflow::cpu::IsaEntry* isa : nvpflow::cpu::supported_isas()) {
    const auto* set = std::find_if(std::begin(built), std::end(built),
                                   [&](const ElementaryFunctions& e) { return std::string_view(e.isa) == isa->name; });
    REQUIRE(set != std::end(built));
    sets.push_back(*set);
  }
  return sets;
}

struct Case {
  const char* name;
  Function function;
  Real (*reference)(Real);
  double low32, high32;  // range for float
  double low64, high64;  // range for double
  double bound;          // ulp
};

constexpr Real kHalfPi = 1.57079632679489661923132169163975144L;
constexpr Real kRootHalf = 0x1.6a09e667f3bccp-1L, kRootHalfLow = 0x1.21165f626cdd52afa7c75bd82eap-54L;
constexpr Real kTwoOverRootPi = 1.12837916709551257389615890312154517169L;

Real sigmoid(Real x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }

/// In the lower tail erfc magnifies a relative error of its argument z by 2 z^2, to an ulp of double with a 64-bit
/// significand: what rounding takes from x / sqrt 2 is put back to first order.
Real gelu(Real x) {
  const Real z = x * kRootHalf;
  const Real low = std::fma(x, kRootHalf, -z) + x * kRootHalfLow;
  return x * 0.5L * (std::erfc(-z) + low * kTwoOverRootPi * std::exp(-z * z));
}

// Ranges reach past the last finite or non-zero result where the function has one.
const Case kCases[] = {
    {"exp", Function::exp, [](Real x) { return std::exp(x); }, -110, 90, -750, 711, 1},
    {"exp_within_1", Function::exp_within_one, [](Real x) { return std::exp(x); }, -1, 1, -1, 1, 1},
    {"tanh", Function::tanh, [](Real x) { return std::tanh(x); }, -12, 12, -25, 25, 2},
    {"sigmoid", Function::sigmoid, sigmoid, -110, 110, -750, 750, 2},
    {"softplus", Function::softplus, [](Real x) { return std::fmax(x, 0.0L) + std::log1p(std::exp(-std::fabs(x))); },
     -110, 110, -750, 750, 2},
    {"gelu", Function::gelu, gelu, -15, 15, -39, 39, 2},
    {"silu", Function::silu, [](Real x) { return x * sigmoid(x); }, -112, 112, -757, 757, 2},
    {"elu", Function::elu, [](Real x) { return x > 0 ? x : std::expm1(x); }, -30, 30, -50, 50, 2},
    {"log", Function::log, [](Real x) { return std::log(x); }, 1e-37, 3e38, 1e-300, 1e300, 1},
    {"atan", Function::atan, [](Real x) { return std::atan(x); }, -1e9, 1e9, -1e18, 1e18, 2},
    {"sin_quarter", Function::sin_quarter, [](Real x) { return std::sin(kHalfPi * x); }, -0.5, 0.5, -0.5, 0.5, 2},
    {"cos_quarter", Function::cos_quarter, [](Real x) { return std::cos(kHalfPi * x); }, -0.5, 0.5, -0.5, 0.5, 1.5},
};

/// Points spread evenly, again where the functions bend and change over from one formula to the next, points spread
/// evenly in magnitude down to the smallest, and the ends.
template <class T>
std::vector<T> points(double low, double high) {
  constexpr int kCount = 400'000;
  std::vector<T> x = {static_cast<T>(low), static_cast<T>(high)};
  for (int i = 0; i < kCount; ++i) {
    x.push_back(static_cast<T>(low + (high - low) * (i + 0.5) / kCount));
    const double near = -2 + 4 * (i + 0.5) / kCount;
    if (near >= low && near <= high) x.push_back(static_cast<T>(near));
    for (const double end : {low, high}) {
      const double magnitude = end * std::exp(-80.0 * (i + 0.5) / kCount);
      if (magnitude >= low && magnitude <= high) x.push_back(static_cast<T>(magnitude));
    }
  }
  if (low <= 0) x.insert(x.end(), {T(0), T(-0.0)});
  return x;
}

/// Distance in units in the last place of the rounded reference; subnormal results count in the smallest normal's.
template <class T>
double ulp_error(T got, Real wanted) {
  const T rounded = static_cast<T>(wanted);
  if (std::isinf(rounded)) return std::isinf(got) && (got > 0) == (rounded > 0) ? 0 : 1e9;
  const T magnitude = std::max(std::fabs(rounded), std::numeric_limits<T>::min());
  const Real unit = std::ldexp(Real(1), std::ilogb(magnitude) - (std::numeric_limits<T>::digits - 1));
  return static_cast<double>(std::fabs(static_cast<Real>(got) - wanted) / unit);
}

template <class T>
double worst_error(Evaluate<T> evaluate, const Case& c) {
  const bool single = sizeof(T) == 4;
  const std::vector<T> x = points<T>(single ? c.low32 : c.low64, single ? c.high32 : c.high64);
  std::vector<T> y(x.size(), std::numeric_limits<T>::quiet_NaN());
  evaluate(c.function, x.data(), y.data(), static_cast<std::int64_t>(x.size()));
  double worst = 0;
  for (std::size_t i = 0; i < x.size(); ++i) worst = std::max(worst, ulp_error(y[i], c.reference(x[i])));
  return worst;
}

}  // namespace

TEST_CASE("elementary functions stay within their bounds in ulp") {
  for (const ElementaryFunctions& isa : supported()) {
    for (const Case& c : kCases) {
      const double error32 = worst_error(isa.float32, c), error64 = worst_error(isa.float64, c);
      std::printf("%-9s %-12s float32 %.2f ulp, float64 %.2f ulp (bound %.1f)\n", isa.isa, c.name, error32, error64,
                  c.bound);
      CAPTURE(isa.isa);
      CAPTURE(c.name);
      CHECK(error32 <= c.bound);
      CHECK(error64 <= c.bound);
    }
  }
}

template <class T>
void check_special_values(Evaluate<T> evaluate) {
  const T nan = std::numeric_limits<T>::quiet_NaN(), inf = std::numeric_limits<T>::infinity();
  for (const Case& c : kCases) {
    CAPTURE(c.name);
    T y = 0;
    evaluate(c.function, &nan, &y, 1);
    // log and the quarter turns only ever see uniforms.
    if (c.function != Function::log) CHECK(std::isnan(y));
  }
  const auto at = [&](Function function, T x) {
    T y = nan;
    evaluate(function, &x, &y, 1);
    return y;
  };
  CHECK(at(Function::exp, inf) == inf);
  CHECK(at(Function::exp, -inf) == T(0));
  CHECK(at(Function::exp, T(0)) == T(1));
  CHECK(at(Function::tanh, inf) == T(1));
  CHECK(at(Function::tanh, -inf) == T(-1));
  CHECK(std::signbit(at(Function::tanh, T(-0.0))));
  CHECK(at(Function::atan, inf) == static_cast<T>(kHalfPi));
  CHECK(at(Function::atan, -inf) == -static_cast<T>(kHalfPi));
  CHECK(std::signbit(at(Function::atan, T(-0.0))));
  CHECK(at(Function::sigmoid, -inf) == T(0));
  CHECK(at(Function::sigmoid, inf) == T(1));
  CHECK(at(Function::elu, -inf) == T(-1));
  CHECK(at(Function::softplus, inf) == inf);
  CHECK(at(Function::softplus, -inf) == T(0));
  for (const Function function : {Function::gelu, Function::silu}) {
    CHECK(at(function, inf) == inf);
    CHECK(at(function, -inf) == T(0));
    CHECK(!std::signbit(at(function, T(0))));
    CHECK(std::signbit(at(function, T(-0.0))));
  }
}

TEST_CASE("NaN goes through and limits are exact") {
  for (const ElementaryFunctions& isa : supported()) {
    CAPTURE(isa.isa);
    check_special_values(isa.float32);
    check_special_values(isa.float64);
  }
}
