// The bases: their names and fields, what these may be, and what the kernels read.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <nvpflow/base.hpp>
#include <nvpflow/spec.hpp>

#include "../base_density.hpp"
#include "../kinds.hpp"
#include "../lower.hpp"
#include "../names.hpp"
#include "../overloaded.hpp"
#include "check.hpp"
#include "layer.hpp"

namespace nvpflow {
namespace layers {
namespace {

constexpr Names<BaseKind, 4> kBases = {{{BaseKind::normal, "normal"},
                                        {BaseKind::uniform, "uniform"},
                                        {BaseKind::student_t, "student_t"},
                                        {BaseKind::mixture, "mixture"}}};
static_assert(std::variant_size_v<Base> == kBases.size(), "each base has a name");

template <BaseKind kind, class Kind>
constexpr bool stands_at = std::is_same_v<std::variant_alternative_t<static_cast<std::size_t>(kind), Base>, Kind>;
static_assert(stands_at<BaseKind::normal, NormalBase> && stands_at<BaseKind::uniform, UniformBase> &&
                  stands_at<BaseKind::student_t, StudentTBase> && stands_at<BaseKind::mixture, MixtureBase>,
              "BaseKind and Base have one order");

using Covariance = MixtureBase::Covariance;
constexpr Names<Covariance, 2> kCovariances = {{{Covariance::diagonal, "diagonal"}, {Covariance::full, "full"}}};

// A row takes operations for each number of each component's covariance, of which there are at most so many.
constexpr std::int64_t kMaxComponents = 1024, kMaxCovariances = std::int64_t{1} << 26;

/// Both numbers and their distance, rounded to T.
template <class T>
bool is_interval(const UniformBase& base) {
  const auto low = static_cast<T>(base.low), high = static_cast<T>(base.high);
  return low < high && std::isfinite(high - low);
}

void check(const NormalBase&, const FlowSpec&) {}

void check(const UniformBase& base, const FlowSpec& spec) {
  const DType dtype = spec.dtype;
  check_finite("base.low", base.low, dtype);
  check_finite("base.high", base.high, dtype);
  if (dtype == DType::float32 ? is_interval<float>(base) : is_interval<double>(base)) return;
  refuse("base.high is " + text_of(base.high) + ", expected more than base.low, which is " + text_of(base.low) +
         ", by a finite number of " + std::string(name_of(dtype)));
}

void check(const StudentTBase& base, const FlowSpec& spec) { check_positive("base.df", base.df, spec.dtype); }

void check(const MixtureBase& base, const FlowSpec& spec) {
  check_named("base.", base.covariance);
  check_range("base.components", base.components, 1, kMaxComponents);
  if (base.components * spec.input_size * spec.input_size <= kMaxCovariances) return;
  refuse("base.components is " + std::to_string(base.components) + " with input_size " +
         std::to_string(spec.input_size) + ", expected at most " +
         std::to_string(kMaxCovariances / spec.input_size / spec.input_size) +
         ": a row takes components * input_size^2 operations, which may be 2^26");
}

/// A tensor that training changes, of no layer.
TensorInfo trained_tensor(const char* name, std::vector<std::int64_t> shape, const FlowSpec& spec) {
  TensorInfo tensor;
  tensor.name = name;
  tensor.size = 1;
  for (const std::int64_t extent : shape) tensor.size *= extent;
  tensor.shape = std::move(shape);
  tensor.layer = static_cast<std::int64_t>(spec.layers.size());
  tensor.trained = true;
  return tensor;
}

void tensors(const NormalBase&, const FlowSpec&, const TensorSink&) {}
void tensors(const UniformBase&, const FlowSpec&, const TensorSink&) {}

void tensors(const StudentTBase& base, const FlowSpec& spec, const TensorSink& sink) {
  TensorInfo tensor = trained_tensor("base.log_df", {spec.input_size}, spec);
  tensor.trained = base.trainable;
  tensor.initial = Initial::value;
  tensor.value = std::log(base.df);
  sink(std::move(tensor));
}

void tensors(const MixtureBase& base, const FlowSpec& spec, const TensorSink& put) {
  const std::int64_t components = base.components, features = spec.input_size;
  const auto sink = [&](TensorInfo tensor) {
    tensor.from_data = true;
    put(std::move(tensor));
  };
  sink(trained_tensor("base.logits", {components}, spec));
  TensorInfo means = trained_tensor("base.means", {components, features}, spec);
  means.initial = Initial::mean;
  sink(std::move(means));
  TensorInfo log_scales = trained_tensor("base.log_scales", {components, features}, spec);
  log_scales.multiplies = true;
  sink(std::move(log_scales));
  if (base.covariance == Covariance::diagonal) return;
  TensorInfo lower = trained_tensor("base.lower", {components, features * (features - 1) / 2}, spec);
  lower.multiplies = true;
  sink(std::move(lower));
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
    case BaseKind::student_t:
      return StudentTBase{};
    case BaseKind::mixture:
      return MixtureBase{};
  }
  refuse("kind is " + std::string(name) + ", expected an enumerator of BaseKind");
}

std::vector<Field> fields(Base& base) {
  using Fields = std::vector<Field>;
  return std::visit(
      Overloaded{[](NormalBase&) { return Fields(); },
                 [](UniformBase& uniform) { return Fields{{"low", &uniform.low}, {"high", &uniform.high}}; },
                 [](StudentTBase& student) { return Fields{{"df", &student.df}, {"trainable", &student.trainable}}; },
                 [](MixtureBase& mixture) {
                   return Fields{{"components", &mixture.components}, {"covariance", &mixture.covariance}};
                 }},
      base);
}

void check_base(const FlowSpec& spec) {
  std::visit([&](const auto& base) { check(base, spec); }, spec.base);
}

BaseFacts facts_of(const Base& base) {
  return std::visit(Overloaded{[](const NormalBase&) { return BaseFacts{.has_temperature = true}; },
                               [](const UniformBase&) { return BaseFacts{.is_bounded = true}; },
                               [](const StudentTBase&) { return BaseFacts{.has_heavy_tails = true}; },
                               [](const MixtureBase&) { return BaseFacts{.starts_at_rows = true}; }},
                    base);
}

void base_tensors(const FlowSpec& spec, const TensorSink& sink) {
  std::visit([&](const auto& base) { tensors(base, spec, sink); }, spec.base);
}

LoweredBase lower_base(const FlowSpec& spec, const TensorInfo* first) {
  LoweredBase lowered;
  lowered.kind = static_cast<BaseKind>(spec.base.index());
  std::visit(Overloaded{[](const NormalBase&) {},
                        [&](const UniformBase& uniform) {
                          lowered.low = uniform.low;
                          lowered.high = uniform.high;
                          lowered.log_density =
                              -static_cast<double>(spec.input_size) * std::log(uniform.high - uniform.low);
                        },
                        [&](const StudentTBase&) { lowered.offset = first[0].offset; },
                        [&](const MixtureBase& mixture) {
                          lowered.components = mixture.components;
                          lowered.full = mixture.covariance == Covariance::full;
                          lowered.offset = first[0].offset;
                          lowered.means = first[1].offset;
                          lowered.log_scales = first[2].offset;
                          if (lowered.full) lowered.lower = first[3].offset;
                        }},
             spec.base);
  return lowered;
}

}  // namespace layers

bool is_bounded(const Base& base) { return layers::facts_of(base).is_bounded; }

std::string_view name_of(MixtureBase::Covariance covariance) {
  return find_name(layers::kCovariances, covariance, "covariance");
}

MixtureBase::Covariance parse_covariance(std::string_view name) {
  return find_value(layers::kCovariances, name, "covariance");
}

template <class T>
BaseDensity<T> density_of(const LoweredBase& from) {
  BaseDensity<T> density;
  density.kind = from.kind;
  density.low = static_cast<T>(from.low);
  density.high = static_cast<T>(from.high);
  density.range = density.high - density.low;
  density.log_density = static_cast<T>(from.log_density);
  density.components = from.components;
  density.full = from.full;
  density.offset = from.offset;
  density.means_offset = from.means;
  density.log_scales_offset = from.log_scales;
  density.lower_offset = from.lower;
  return density;
}
template BaseDensity<float> density_of(const LoweredBase&);
template BaseDensity<double> density_of(const LoweredBase&);

}  // namespace nvpflow
