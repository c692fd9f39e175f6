// The permutation layer: other places for the same numbers. No kernel runs for it: the features after it have other
// places in a tile.
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <nvpflow/spec.hpp>

#include "check.hpp"
#include "layer.hpp"

namespace nvpflow::layers {

std::vector<Field> fields(Permutation& layer) { return {{"order", &layer.order}}; }

void check(const Permutation& layer, const FlowSpec& spec, const std::string& prefix) {
  const std::int64_t features = spec.input_size;
  if (static_cast<std::int64_t>(layer.order.size()) != features) {
    refuse(prefix + "order has " + std::to_string(layer.order.size()) + " entries, expected each of 0 to " +
           std::to_string(features - 1) + " once");
  }
  std::vector<bool> seen(layer.order.size());
  for (std::size_t j = 0; j < layer.order.size(); ++j) {
    const std::string name = prefix + "order[" + std::to_string(j) + "]";
    check_range(name, layer.order[j], 0, features - 1);
    const auto index = static_cast<std::size_t>(layer.order[j]);
    if (seen[index]) refuse(name + " is " + std::to_string(index) + " again, expected each index once");
    seen[index] = true;
  }
}

void tensors(const Permutation&, const FlowSpec&, const Site&, const TensorSink&) {}

void lower(const Permutation& layer, const FlowSpec&, const TensorInfo*, Lowering& to) { to.permute(layer.order); }

LayerFacts facts(const Permutation& layer) {
  LayerFacts facts;
  facts.has_kernel = false;
  facts.keeps_columns = true;
  facts.order = &layer.order;
  return facts;
}

}  // namespace nvpflow::layers
