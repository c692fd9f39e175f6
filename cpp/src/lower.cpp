#include "lower.hpp"

#include <cstddef>
#include <type_traits>
#include <variant>

#include "layers/layer.hpp"
#include "program.hpp"

namespace nvpflow {

static_assert(std::is_same_v<std::variant_alternative_t<static_cast<std::size_t>(Kind::coupling), LoweredLayer>,
                             LoweredCoupling> &&
                  std::is_same_v<std::variant_alternative_t<static_cast<std::size_t>(Kind::standardize), LoweredLayer>,
                                 LoweredStandardize>,
              "Kind and LoweredLayer have one order");

Lowered lower(const FlowSpec& spec, const ParamLayout& layout) {
  Lowered lowered;
  lowered.input_size = spec.input_size;
  lowered.layers.reserve(spec.layers.size());
  for (std::size_t i = 0; i < spec.layers.size(); ++i) {
    const TensorInfo* tensors = layout.tensors().data() + layout.first_tensor(i);
    std::visit([&](const auto& layer) { layers::lower(layer, spec, tensors, lowered); }, spec.layers[i]);
  }
  return lowered;
}

}  // namespace nvpflow
