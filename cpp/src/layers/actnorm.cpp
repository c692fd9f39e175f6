// The actnorm layer: a trained scale and shift per feature.
#include <string>
#include <utility>
#include <vector>

#include <nvpflow/spec.hpp>

#include "layer.hpp"

namespace nvpflow::layers {

std::vector<Field> fields(ActNorm& layer) { return {{"inverse", &layer.inverse}}; }

void check(const ActNorm&, const FlowSpec&, const std::string&) {}

void tensors(const ActNorm&, const FlowSpec& spec, const Site& site, const TensorSink& sink) {
  for (const char* const what : {".log_scale", ".shift"}) {
    TensorInfo tensor = vector_tensor("actnorm_" + std::to_string(site.layer) + what, spec.input_size, site.layer);
    tensor.trained = tensor.from_data = true;
    sink(std::move(tensor));
  }
}

/// x exp(log_scale) + shift is a standardize layer's formula backwards.
void lower(const ActNorm& layer, const FlowSpec&, const TensorInfo* first, Lowering& to) {
  to.add_diagonal(!layer.inverse, /*mean=*/first[1].offset, /*log_std=*/first[0].offset);
}

LayerFacts facts(const ActNorm& layer) {
  LayerFacts facts;
  facts.set_from = SetFrom::sample;
  facts.inverse = layer.inverse;
  facts.keeps_columns = true;
  return facts;
}

}  // namespace nvpflow::layers
