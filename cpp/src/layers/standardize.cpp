// The standardize layer: a mean and the logarithm of a standard deviation per feature, set from the data.
#include <string>
#include <vector>

#include <nvpflow/spec.hpp>

#include "layer.hpp"

namespace nvpflow::layers {

std::vector<Field> fields(Standardize&) { return {}; }

void check(const Standardize&, const FlowSpec&, const std::string&) {}

void tensors(const Standardize&, const FlowSpec& spec, const Site& site, const TensorSink& sink) {
  for (const char* const what : {".mean", ".log_std"}) {
    TensorInfo tensor = vector_tensor("standardize_" + std::to_string(site.layer) + what, spec.input_size, site.layer);
    tensor.from_data = true;
    sink(std::move(tensor));
  }
}

void lower(const Standardize&, const FlowSpec&, const TensorInfo* first, Lowering& to) {
  to.add_diagonal(/*inverse=*/false, first[0].offset, first[1].offset);
}

LayerFacts facts(const Standardize&) {
  LayerFacts facts;
  facts.set_from = SetFrom::columns;
  facts.keeps_columns = true;
  return facts;
}

}  // namespace nvpflow::layers
