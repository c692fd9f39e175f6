// The bases: their names and fields, what these may be, and what the kernels read.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>
#include <vector>

#include <nvpflow/base.hpp>
#include <nvpflow/spec.hpp>

#include "../base_density.hpp"
#include "../lower.hpp"
#include "../names.hpp"
#include "../overloaded.hpp"
#include "../program.hpp"
#include "check.hpp"
#include "layer.hpp"

namespace nvpflow {
namespace layers {
namespace {

constexpr Names<BaseKind, 2> kBases = {{{BaseKind::normal, "normal"}, {BaseKind::uniform, "uniform"}}};
static_assert(std::variant_size_v<Base> == kBases.size(), "each base has a name");

template <BaseKind kind, class Kind>
constexpr bool stands_at = std::is_same_v<std::variant_alternative_t<static_cast<std::size_t>(kind), Base>, Kind>;
static_assert(stands_at<BaseKind::normal, NormalBase> && stands_at<BaseKind::uniform, UniformBase>,
              "BaseKind and Base have one order");

/// Both numbers and their distance, rounded to T.
template <class T>
bool is_interval(const UniformBase& base) {
  const auto low = static_cast<T>(base.low), high = static_cast<T>(base.high);
  return low < high && std::isfinite(high - low);
}

void check(const NormalBase&, DType) {}

void check(const UniformBase& base, DType dtype) {
  check_finite("base.low", base.low, dtype);
  check_finite("base.high", base.high, dtype);
  if (dtype == DType::float32 ? is_interval<float>(base) : is_interval<double>(base)) return;
  refuse("base.high is " + text_of(base.high) + ", expected more than base.low, which is " + text_of(base.low) +
         ", by a finite number of " + std::string(name_of(dtype)));
}

}  // namespace

std::string_view name_of(const Base& base) {
  return find_name(kBases, static_cast<BaseKind>(base.index()), "base.kind");
}

Base parse_base(std::string_view name) {
  switch (find_value(kBases, name, "kind")) {
    case BaseKind::normal:
      return NormalBase{};
    case BaseKind::uniform:
      return UniformBase{};
  }
  refuse("kind is " + std::string(name) + ", expected an enumerator of BaseKind");
}

std::vector<Field> fields(Base& base) {
  return std::visit(Overloaded{[](NormalBase&) { return std::vector<Field>(); },
                               [](UniformBase& uniform) {
                                 return std::vector<Field>{{"low", &uniform.low}, {"high", &uniform.high}};
                               }},
                    base);
}

void check_base(const FlowSpec& spec) {
  std::visit([&](const auto& base) { check(base, spec.dtype); }, spec.base);
}

bool is_bounded(const Base& base) {
  return std::visit(Overloaded{[](const NormalBase&) { return false; }, [](const UniformBase&) { return true; }}, base);
}

LoweredBase lower_base(const FlowSpec& spec) {
  LoweredBase lowered;
  lowered.kind = static_cast<BaseKind>(spec.base.index());
  if (const auto* uniform = std::get_if<UniformBase>(&spec.base)) {
    lowered.low = uniform->low;
    lowered.high = uniform->high;
    lowered.log_density = -static_cast<double>(spec.input_size) * std::log(uniform->high - uniform->low);
  }
  return lowered;
}

}  // namespace layers

template <class T>
BaseDensity<T> density_of(const LoweredBase& from) {
  BaseDensity<T> density;
  density.kind = from.kind;
  density.low = static_cast<T>(from.low);
  density.high = static_cast<T>(from.high);
  density.range = density.high - density.low;
  density.log_density = static_cast<T>(from.log_density);
  return density;
}
template BaseDensity<float> density_of(const LoweredBase&);
template BaseDensity<double> density_of(const LoweredBase&);

}  // namespace nvpflow
