// The coupling layer: some features, and the context, say how the others are transformed.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <nvpflow/spec.hpp>

#include "../kinds.hpp"
#include "../overloaded.hpp"
#include "check.hpp"
#include "layer.hpp"
#include "network.hpp"
#include "spline.hpp"

namespace nvpflow::layers {
namespace {

using Function = LogScale::Function;

constexpr bool same(ScaleFunction kernel, Function function) {
  return static_cast<int>(kernel) == static_cast<int>(function);
}
static_assert(same(ScaleFunction::tanh, Function::tanh) && same(ScaleFunction::softsign, Function::softsign) &&
                  same(ScaleFunction::atan, Function::atan) && same(ScaleFunction::identity, Function::identity) &&
                  same(ScaleFunction::sigmoid, Function::sigmoid) && same(ScaleFunction::softplus, Function::softplus),
              "ScaleFunction and LogScale::Function have one order");

bool has_bounds(Function function) { return function == Function::sigmoid || function == Function::softplus; }

void check(const LogScale& scale, DType dtype, const std::string& prefix) {
  check_named(prefix, scale.function);
  if (scale.function == Function::identity) return;
  if (!has_bounds(scale.function)) {
    check_positive(prefix + "factor", scale.factor, dtype);
    check_positive(prefix + "divisor", scale.divisor, dtype);
    return;
  }
  if (!(scale.low >= 0) || !std::isfinite(scale.low)) {
    refuse(prefix + "low is " + text_of(scale.low) + ", expected finite and >= 0");
  }
  if (scale.low > 0) check_positive(prefix + "low", scale.low, dtype);
  const bool open = scale.function == Function::softplus && std::isinf(scale.high);
  if (!(scale.high > scale.low) || (!open && !std::isfinite(scale.high))) {
    refuse(prefix + "high is " + text_of(scale.high) + ", expected " +
           (scale.function == Function::sigmoid ? "finite and " : "") + "> low, which is " + text_of(scale.low));
  }
  if (!open) check_positive(prefix + "high", scale.high, dtype);
  check_finite(prefix + "offset", scale.offset, dtype);
}

}  // namespace

void check_features(const FeatureSet& set, const FlowSpec& spec, const std::string& prefix, const char* field) {
  check_named(prefix, set.name);
  const std::string name = prefix + field;
  if (set.name != FeatureSet::Name::indices && !set.indices.empty()) {
    refuse(name + " has both a name and indices, expected one of them");
  }
  for (std::size_t i = 0; i < set.indices.size(); ++i) {
    const std::string entry = name + "[" + std::to_string(i) + "]";
    check_range(entry, set.indices[i], 0, spec.input_size - 1);
    if (i > 0 && set.indices[i] <= set.indices[i - 1]) {
      refuse(entry + " is " + std::to_string(set.indices[i]) + " after " + std::to_string(set.indices[i - 1]) +
             ", expected ascending indices");
    }
  }
  if (set.count(spec.input_size) == 0) refuse(name + " holds no feature, expected at least one");
}

namespace {

void check_transformed(const FeatureSet& set, const FlowSpec& spec, const std::string& prefix) {
  check_features(set, spec, prefix, "transformed");
  if (set.count(spec.input_size) == spec.input_size && spec.context_size == 0) {
    refuse(prefix + "transformed holds all features, expected one less at least: without a context nothing says how " +
           "to transform them");
  }
}

/// What the translation's own network makes; the first one makes the rest.
bool is_split(const Coupling& layer) { return layer.translation_network.has_value(); }

std::vector<NetworkHead> heads_of(const Coupling& layer, std::int64_t columns) {
  return std::visit(
      Overloaded{[&](const Affine&) { return std::vector<NetworkHead>{{"scale", columns}, {"translation", columns}}; },
                 [&](const Additive&) { return std::vector<NetworkHead>{{"translation", columns}}; },
                 [&](const Spline& spline) { return layers::heads_of(spline, columns); }},
      layer.transform);
}

LoweredScale lower(const LogScale& scale) {
  return {static_cast<ScaleFunction>(scale.function),
          scale.factor,
          scale.divisor,
          scale.low,
          scale.high,
          scale.offset,
          scale.negated};
}

}  // namespace

std::vector<Field> fields(Transform& transform) {
  return std::visit(
      Overloaded{[](Affine& affine) { return std::vector<Field>{{"log_scale", &affine.log_scale}}; },
                 [](Additive&) { return std::vector<Field>{}; }, [](Spline& spline) { return fields(spline); }},
      transform);
}

std::vector<Field> fields(LogScale& scale) {
  if (scale.function == Function::identity) return {};
  if (!has_bounds(scale.function)) return {{"factor", &scale.factor}, {"divisor", &scale.divisor}};
  return {{"low", &scale.low},
          {"high", &scale.high, scale.function == Function::softplus ? std::numeric_limits<double>::infinity() : 0},
          {"offset", &scale.offset},
          {"negated", &scale.negated}};
}

std::vector<Field> fields(Coupling& layer) {
  std::vector<Field> list = {{"inverse", &layer.inverse},
                             {"transformed", &layer.transformed},
                             {"transform", &layer.transform},
                             {is_split(layer) ? "scale_network" : "network", &layer.network}};
  if (is_split(layer)) list.push_back({"translation_network", &*layer.translation_network});
  return list;
}

bool has_scale_and_shift(const Transform& transform) {
  return std::visit(Overloaded{[](const Affine&) { return true; }, [](const Additive&) { return true; },
                               [](const Spline&) { return false; }},
                    transform);
}

bool is_plain(const Coupling& layer) {
  const auto* affine = std::get_if<Affine>(&layer.transform);
  if (affine == nullptr || is_split(layer) || layer.inverse) return false;
  const LogScale& scale = affine->log_scale;
  const bool bounded = scale == LogScale::bounded(scale.factor) || std::isnan(scale.factor + scale.divisor);
  Network plain;
  plain.hidden_sizes = layer.network.hidden_sizes;
  plain.activation = layer.network.activation;
  const FeatureSet::Name name = layer.transformed.name;
  return bounded && layer.network == plain && layer.transformed.indices.empty() &&
         (name == FeatureSet::Name::first_half || name == FeatureSet::Name::second_half);
}

std::vector<Field> plain_fields(Coupling& layer, bool& swapped) {
  swapped = layer.transformed.name == FeatureSet::Name::first_half;
  return {{"swapped", &swapped},
          {"hidden_sizes", &layer.network.hidden_sizes},
          {"activation", &layer.network.activation},
          {"scale_bound", &std::get<Affine>(layer.transform).log_scale.factor}};
}

void check(const Coupling& layer, const FlowSpec& spec, const std::string& prefix) {
  if (is_plain(layer)) {  // by the names that such a flow is built with
    check(layer.network, spec, prefix);
    check_positive(prefix + "scale_bound", std::get<Affine>(layer.transform).log_scale.factor, spec.dtype);
  }
  check_transformed(layer.transformed, spec, prefix);
  std::visit(
      Overloaded{[&](const Affine& affine) { check(affine.log_scale, spec.dtype, prefix + "transform.log_scale."); },
                 [](const Additive&) {},
                 [&](const Spline& spline) { layers::check(spline, spec.dtype, prefix + "transform."); }},
      layer.transform);
  if (is_split(layer) && !std::holds_alternative<Affine>(layer.transform)) {
    refuse(prefix + "translation_network is given, expected only network: only an affine coupling has two");
  }
  check(layer.network, spec, prefix + (is_split(layer) ? "scale_network." : "network."));
  if (is_split(layer)) check(*layer.translation_network, spec, prefix + "translation_network.");
  if (is_split(layer) &&
      (layer.network.kind != Network::Kind::mlp || layer.translation_network->kind != Network::Kind::mlp)) {
    refuse(prefix +
           "scale_network and translation_network are not both mlp, expected that; a residual network serves "
           "both heads");
  }
}

void tensors(const Coupling& layer, const FlowSpec& spec, const Site& site, const TensorSink& sink) {
  const std::string prefix = "flow_" + std::to_string(site.coupling) + "_";
  const std::int64_t columns = layer.transformed.count(spec.input_size), inputs = spec.input_size - columns;
  if (is_split(layer)) {
    tensors(layer.network, spec, inputs, {prefix, "scale_", {{"scale", columns}}}, site, sink);
    tensors(*layer.translation_network, spec, inputs, {prefix, "translation_", {{"translation", columns}}}, site, sink);
  } else {
    const char* const name = layer.network.kind == Network::Kind::mlp ? "coupling_" : "";
    tensors(layer.network, spec, inputs, {prefix, name, heads_of(layer, columns)}, site, sink);
  }
}

std::int64_t num_tensors(const Coupling& layer) {
  const auto heads = static_cast<std::int64_t>(heads_of(layer, 0).size());
  return num_tensors(layer.network) + (is_split(layer) ? num_tensors(*layer.translation_network) : 0) + 2 * heads;
}

namespace {

std::vector<LoweredNetwork> lower_networks(const Coupling& layer, const FlowSpec& spec, const TensorInfo* first) {
  std::vector<LoweredNetwork> lowered;
  const std::int64_t columns = layer.transformed.count(spec.input_size), inputs = spec.input_size - columns;
  const auto network = [&](const Network& from, const std::vector<std::int64_t>& heads) {
    lowered.push_back(layers::lower(from, inputs, spec.context_size, heads, first));
  };
  if (is_split(layer)) {
    network(layer.network, {columns});
    network(*layer.translation_network, {columns});
  } else {
    std::vector<std::int64_t> heads;
    for (const NetworkHead& head : heads_of(layer, columns)) heads.push_back(head.columns);
    network(layer.network, heads);
  }
  return lowered;
}

}  // namespace

void lower(const Coupling& layer, const FlowSpec& spec, const TensorInfo* first, Lowering& to) {
  const std::vector<std::int64_t> a = spec.conditioning(layer), b = spec.transformed(layer);
  if (const auto* spline = std::get_if<Spline>(&layer.transform)) {
    LoweredSpline lowered;
    lowered.inverse = layer.inverse;
    lowered.spline = *spline;
    lowered.networks = lower_networks(layer, spec, first);
    return to.add_spline(std::move(lowered), a, b);
  }
  LoweredCoupling lowered;
  lowered.inverse = layer.inverse;
  if (const auto* affine = std::get_if<Affine>(&layer.transform)) lowered.scale = lower(affine->log_scale);
  lowered.networks = lower_networks(layer, spec, first);
  to.add_coupling(std::move(lowered), a, b);
}

LayerFacts facts(const Coupling& layer) {
  LayerFacts facts;
  facts.inverse = layer.inverse;
  facts.spline = std::get_if<Spline>(&layer.transform);
  facts.splined = facts.spline == nullptr ? nullptr : &layer.transformed;
  return facts;
}

}  // namespace nvpflow::layers
