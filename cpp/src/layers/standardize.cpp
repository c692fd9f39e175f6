// The standardize layer: a mean and the logarithm of a standard deviation per feature, set from the data.
#include <string>
#include <utility>
#include <vector>

#include <nvpflow/spec.hpp>

#include "layer.hpp"

namespace nvpflow::layers {

std::vector<Field> fields(Standardize&) { return {}; }

void tensors(const Standardize&, const FlowSpec& spec, const Site& site, const TensorSink& sink) {
  for (const char* const what : {".mean", ".log_std"}) {
    TensorInfo tensor;
    tensor.name = "standardize_" + std::to_string(site.layer) + what;
    tensor.shape = {spec.input_size};
    tensor.size = spec.input_size;
    tensor.layer = site.layer;
    sink(std::move(tensor));
  }
}

void lower(const Standardize&, const FlowSpec&, const TensorInfo* first, Lowered& to) {
  to.layers.emplace_back(LoweredStandardize{first[0].offset, first[1].offset});
}

}  // namespace nvpflow::layers
