#include "layer.hpp"

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <nvpflow/spec.hpp>

namespace nvpflow::layers {
namespace {

template <std::size_t... Index>
LayerSpec make_by_index(std::size_t wanted, std::index_sequence<Index...>) {
  LayerSpec layer;
  ((wanted == Index ? static_cast<void>(layer.emplace<Index>()) : static_cast<void>(0)), ...);
  return layer;
}

}  // namespace

std::vector<Field> fields(LayerSpec& layer) {
  return std::visit([](auto& kind) { return fields(kind); }, layer);
}

void check_layer(const LayerSpec& layer, const FlowSpec& spec, const std::string& prefix) {
  std::visit([&](const auto& kind) { check(kind, spec, prefix); }, layer);
}

LayerFacts facts_of(const LayerSpec& layer) {
  return std::visit([](const auto& kind) { return facts(kind); }, layer);
}

double spline_flops(const LayerSpec& layer, const FlowSpec& spec) {
  constexpr double kSpline = 100, kBin = 30;  // of a spline, and of each of its bins
  const LayerFacts of = facts_of(layer);
  if (of.spline == nullptr) return 0;
  const auto count = static_cast<double>(of.splined->count(spec.input_size));
  return count * (kSpline + kBin * static_cast<double>(of.spline->num_bins));
}

LayerSpec make_layer(LayerKind kind) {
  return make_by_index(static_cast<std::size_t>(kind), std::make_index_sequence<std::variant_size_v<LayerSpec>>());
}

void each_tensor(const FlowSpec& spec, const TensorSink& sink) {
  Site site;
  site.zero_heads = spec.whitens();
  for (const LayerSpec& layer : spec.layers) {
    std::visit([&](const auto& kind) { tensors(kind, spec, site, sink); }, layer);
    if (std::holds_alternative<Coupling>(layer)) ++site.coupling;
    ++site.layer;
  }
  base_tensors(spec, sink);
  if (!spec.standardize_context) return;
  for (const char* const what : {"context.mean", "context.log_std"}) {
    TensorInfo tensor = vector_tensor(what, spec.context_size, site.layer);
    tensor.from_data = true;
    sink(std::move(tensor));
  }
}

std::int64_t num_tensors(const FlowSpec& spec) {
  std::int64_t count = 0;
  each_tensor(spec, [&](const TensorInfo&) { ++count; });
  return count;
}

TensorInfo vector_tensor(std::string name, std::int64_t size, std::int64_t layer) {
  TensorInfo tensor;
  tensor.name = std::move(name);
  tensor.shape = {size};
  tensor.size = size;
  tensor.layer = layer;
  return tensor;
}

}  // namespace nvpflow::layers
