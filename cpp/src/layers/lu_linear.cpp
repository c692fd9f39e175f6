// The lu_linear layer: a square matrix as the product of a unit lower and an upper triangular one, and a bias.
#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <nvpflow/spec.hpp>

#include "check.hpp"
#include "layer.hpp"

namespace nvpflow::layers {
namespace {

/// Forming the matrix takes D^3 operations whenever the parameters change.
constexpr std::int64_t kMaxLinearSize = 4096;

template <class T>
std::string describe_wrong_sign(const TensorInfo& tensor, const T* values) {
  const T* const end = values + tensor.size;
  const T* const wrong = std::find_if(values, end, [](T value) { return value != T(1) && value != T(-1); });
  if (wrong == end) return "";
  return tensor.name + "[" + std::to_string(wrong - values) + "] is " + text_of(static_cast<double>(*wrong)) +
         ", expected 1 or -1";
}

}  // namespace

/// `whitens` only where it is true, so that the others' text is what it was before there was such a field.
std::vector<Field> fields(LULinear& layer) {
  std::vector<Field> list = {{"inverse", &layer.inverse}};
  if (layer.whitens) list.push_back({"whitens", &layer.whitens});
  return list;
}

void check(const LULinear&, const FlowSpec& spec, const std::string& prefix) {
  if (spec.input_size <= kMaxLinearSize) return;
  refuse(prefix + "kind is lu_linear with input_size " + std::to_string(spec.input_size) + ", expected at most " +
         std::to_string(kMaxLinearSize) + ": its matrix is formed anew whenever the parameters change; use a " +
         "permutation instead");
}

void tensors(const LULinear& layer, const FlowSpec& spec, const Site& site, const TensorSink& sink) {
  const std::int64_t features = spec.input_size, triangle = features * (features - 1) / 2;
  const auto put = [&](const std::string& what, std::int64_t size, bool multiplies) {
    TensorInfo tensor = vector_tensor("lu_linear_" + std::to_string(site.layer) + what, size, site.layer);
    tensor.signs = what == ".sign";
    tensor.trained = !tensor.signs && !layer.whitens;
    tensor.from_data = layer.whitens;
    tensor.multiplies = multiplies;
    if (tensor.signs) tensor.initial = Initial::one;
    sink(std::move(tensor));
  };
  put(".lower", triangle, true);
  put(".upper", triangle, true);
  put(".log_diagonal", features, true);
  put(".sign", features, false);
  put(".bias", features, false);
}

std::string describe_wrong_sign(const TensorInfo& tensor, DType dtype, const void* values) {
  if (!tensor.signs) return "";
  if (dtype == DType::float32) return describe_wrong_sign(tensor, static_cast<const float*>(values));
  return describe_wrong_sign(tensor, static_cast<const double*>(values));
}

void lower(const LULinear& layer, const FlowSpec&, const TensorInfo* first, Lowering& to) {
  LoweredLinear linear;
  linear.inverse = layer.inverse;
  linear.lower = first[0].offset;
  linear.upper = first[1].offset;
  linear.log_diagonal = first[2].offset;
  linear.sign = first[3].offset;
  linear.bias = first[4].offset;
  to.add_linear(std::move(linear));
}

LayerFacts facts(const LULinear& layer) {
  LayerFacts facts;
  if (layer.whitens) facts.set_from = SetFrom::covariance;
  facts.inverse = layer.inverse;
  facts.places_anew = true;
  return facts;
}

}  // namespace nvpflow::layers
