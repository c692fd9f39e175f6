#include "lower.hpp"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <nvpflow/spec.hpp>

#include "kinds.hpp"
#include "layers/layer.hpp"
#include "overloaded.hpp"

namespace nvpflow {
namespace {

template <Kind kind, class Layer>
constexpr bool stands_at =
    std::is_same_v<std::variant_alternative_t<static_cast<std::size_t>(kind), LoweredLayer>, Layer>;
static_assert(stands_at<Kind::coupling, LoweredCoupling> && stands_at<Kind::diagonal, LoweredDiagonal> &&
                  stands_at<Kind::linear, LoweredLinear> && stands_at<Kind::spline, LoweredSpline>,
              "Kind and LoweredLayer have one order");

std::vector<std::int64_t> in_order(std::int64_t count) {
  std::vector<std::int64_t> numbers(static_cast<std::size_t>(count));
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}

bool is_in_order(const std::vector<std::int64_t>& numbers) {
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    if (numbers[i] != static_cast<std::int64_t>(i)) return false;
  }
  return true;
}

}  // namespace

template <class T>
Scale<T> scale_of(const LoweredScale& from) {
  Scale<T> scale;
  scale.function = from.function;
  scale.factor = static_cast<T>(from.factor);
  scale.inverse_factor = static_cast<T>(1.0 / from.factor);
  scale.inverse_divisor = static_cast<T>(1.0 / from.divisor);
  scale.slope = static_cast<T>(from.factor / from.divisor);
  scale.low = static_cast<T>(from.low);
  scale.high = static_cast<T>(from.high);
  scale.range = static_cast<T>(from.high - from.low);
  scale.offset = static_cast<T>(from.offset);
  scale.log_high = static_cast<T>(std::log(from.high));
  // Below it softplus(x) = e (1 - e / 2) with e = e^x, to the last bit of its logarithm.
  constexpr T kTail = sizeof(T) == 4 ? -9 : -20;
  scale.tail = from.low == 0 ? kTail : -std::numeric_limits<T>::infinity();
  scale.negated = from.negated;
  scale.sign = from.negated ? T(-1) : T(1);
  return scale;
}
template Scale<float> scale_of(const LoweredScale&);
template Scale<double> scale_of(const LoweredScale&);

template <class T>
SplineMap<T> map_of(const Spline& from) {
  const auto bins = static_cast<double>(from.num_bins);
  SplineMap<T> map;
  map.num_bins = static_cast<std::int32_t>(from.num_bins);
  map.num_slopes = static_cast<std::int32_t>(from.num_slopes());
  map.free_ends = from.boundary == Spline::Boundary::free;
  map.exp_slopes = from.derivative.function == KnotSlope::Function::exp;
  map.slope_tails = from.tails == Spline::Tails::slope && map.free_ends;  // a slope of 1 is the identity
  map.squashed = !std::isinf(from.size_bound);
  map.lower = static_cast<T>(from.lower);
  map.upper = static_cast<T>(from.upper);
  map.span = static_cast<T>(from.upper - from.lower);
  map.inverse_span = static_cast<T>(1 / (from.upper - from.lower));
  map.width_share = static_cast<T>(1 - bins * from.min_bin_width);
  map.height_share = static_cast<T>(1 - bins * from.min_bin_height);
  map.width_floor = static_cast<T>(from.min_bin_width / (1 - bins * from.min_bin_width));
  map.height_floor = static_cast<T>(from.min_bin_height / (1 - bins * from.min_bin_height));
  map.min_slope = static_cast<T>(from.min_derivative);
  map.gain = static_cast<T>(from.derivative.gain);
  map.offset = static_cast<T>(from.derivative.offset);
  map.slope_factor = static_cast<T>(1 / from.derivative.bound);
  map.size_factor = map.squashed ? static_cast<T>(1 / from.size_bound) : T(0);
  return map;
}
template SplineMap<float> map_of(const Spline&);
template SplineMap<double> map_of(const Spline&);

const std::vector<LoweredNetwork>& networks_of(const LoweredLayer& layer) {
  using Networks = std::vector<LoweredNetwork>;
  static const Networks none;
  return *std::visit(
      Overloaded{[](const LoweredCoupling& coupling) { return &coupling.networks; },
                 [](const LoweredDiagonal&) { return &none; }, [](const LoweredLinear&) { return &none; },
                 [](const LoweredSpline& spline) { return &spline.networks; }},
      layer);
}

Lowering::Lowering(const FlowSpec& spec) : spec_(spec), place_(in_order(spec.input_size)) {
  lowered_.input_size = spec.input_size;
  lowered_.context_size = spec.context_size;
  lowered_.layers.reserve(spec.layers.size());
  place_from(0);
  lowered_.data_place = place_or_empty();
}

void Lowering::place_from(std::size_t index) {
  std::vector<std::int64_t> now = in_order(spec_.input_size);  // what the feature at layer `index` is at the layer here
  for (; index < spec_.layers.size(); ++index) {
    const LayerSpec& layer = spec_.layers[index];
    const layers::LayerFacts facts = layers::facts_of(layer);
    if (facts.places_anew) return;
    if (facts.order != nullptr) {
      std::vector<std::int64_t> next(now.size());
      for (std::size_t j = 0; j < now.size(); ++j) next[j] = now[static_cast<std::size_t>((*facts.order)[j])];
      now = std::move(next);
    }
    const auto* coupling = std::get_if<Coupling>(&layer);
    if (coupling == nullptr) continue;
    // The part that feature 0 belongs to comes first, so that halves stay where they are.
    const std::vector<std::int64_t> a = spec_.conditioning(*coupling), b = spec_.transformed(*coupling);
    const bool a_first = !a.empty() && a.front() == 0;
    std::int64_t next = 0;
    for (const std::vector<std::int64_t>* part : {a_first ? &a : &b, a_first ? &b : &a}) {
      for (const std::int64_t feature : *part) {
        place_[static_cast<std::size_t>(now[static_cast<std::size_t>(feature)])] = next++;
      }
    }
    return;
  }
}

void Lowering::permute(const std::vector<std::int64_t>& order) {
  std::vector<std::int64_t> next(place_.size());
  for (std::size_t j = 0; j < next.size(); ++j) next[j] = place_[static_cast<std::size_t>(order[j])];
  place_ = std::move(next);
}

Places Lowering::places_of(const std::vector<std::int64_t>& features) const {
  Places places;
  places.count = static_cast<std::int64_t>(features.size());
  if (features.empty()) return places;
  places.begin = place_[static_cast<std::size_t>(features.front())];
  bool follow = true;
  for (std::size_t i = 0; i < features.size(); ++i) {
    places.index.push_back(place_[static_cast<std::size_t>(features[i])]);
    follow = follow && places.index.back() == places.begin + static_cast<std::int64_t>(i);
  }
  if (follow) places.index.clear();
  return places;
}

std::vector<std::int64_t> Lowering::place_or_empty() const {
  return is_in_order(place_) ? std::vector<std::int64_t>() : place_;
}

void Lowering::add_coupling(LoweredCoupling coupling, const std::vector<std::int64_t>& a,
                            const std::vector<std::int64_t>& b) {
  coupling.conditioning = places_of(a);
  coupling.transformed = places_of(b);
  coupling.place = place_or_empty();
  lowered_.layers.emplace_back(std::move(coupling));
}

void Lowering::add_spline(LoweredSpline spline, const std::vector<std::int64_t>& a,
                          const std::vector<std::int64_t>& b) {
  spline.conditioning = places_of(a);
  spline.transformed = places_of(b);
  spline.place = place_or_empty();
  lowered_.layers.emplace_back(std::move(spline));
}

void Lowering::add_diagonal(bool inverse, std::int64_t mean, std::int64_t log_std) {
  lowered_.layers.emplace_back(LoweredDiagonal{inverse, place_or_empty(), mean, log_std});
}

void Lowering::add_linear(LoweredLinear linear) {
  linear.in_place = place_or_empty();
  place_ = in_order(spec_.input_size);
  place_from(index_ + 1);
  linear.out_place = place_or_empty();
  lowered_.layers.emplace_back(std::move(linear));
}

Lowered Lowering::finish() {
  lowered_.latent_place = place_or_empty();
  return std::move(lowered_);
}

Lowered lower(const FlowSpec& spec, const ParamLayout& layout) {
  Lowering lowering(spec);
  for (std::size_t i = 0; i < spec.layers.size(); ++i) {
    lowering.at(i);
    const TensorInfo* tensors = layout.tensors().data() + layout.first_tensor(i);
    std::visit([&](const auto& layer) { layers::lower(layer, spec, tensors, lowering); }, spec.layers[i]);
  }
  Lowered lowered = lowering.finish();
  lowered.base = layers::lower_base(spec, layout.tensors().data() + layout.first_tensor(spec.layers.size()));
  if (spec.standardize_context) {
    lowered.context_mean = layout.find("context.mean")->offset;
    lowered.context_log_std = layout.find("context.log_std")->offset;
  }
  return lowered;
}

}  // namespace nvpflow
