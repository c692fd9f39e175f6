// The bounds layer: columns that cannot lie beyond some number, or hold integers. No kernel runs for it:
// bounded_backend.hpp applies it to rows of data in front of a backend.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <nvpflow/spec.hpp>

#include "../bounds_map.hpp"
#include "check.hpp"
#include "layer.hpp"

namespace nvpflow::layers {
namespace {

/// Numbers of the dtype that lie inside, and how far apart the edges are.
template <class X>
bool has_room(double low, double high) {
  const Inside<X> inside(low, high);
  return inside.lowest < inside.highest && std::isfinite(static_cast<X>(high) - static_cast<X>(low));
}

void check_pair(double low, double high, DType dtype, const std::string& low_name, const std::string& high_name) {
  if (low != -std::numeric_limits<double>::infinity()) check_finite(low_name, low, dtype);
  if (high != std::numeric_limits<double>::infinity()) check_finite(high_name, high, dtype);
  if (std::isinf(low) || std::isinf(high)) return;
  if (low < high && (dtype == DType::float32 ? has_room<float>(low, high) : has_room<double>(low, high))) return;
  refuse(high_name + " is " + text_of(high) + ", expected more than " + low_name + ", which is " + text_of(low) +
         ", with numbers of " + std::string(name_of(dtype)) + " between them");
}

/// Each column once, with ends that are edges of cells.
void check_discrete(const Bounds& layer, const FlowSpec& spec, const std::string& prefix) {
  for (std::size_t i = 0; i < layer.discrete.size(); ++i) {
    const std::int64_t column = layer.discrete[i];
    const std::string name = prefix + "discrete[" + std::to_string(i) + "]";
    if (column < 0 || column >= spec.input_size) {
      refuse(name + " is " + std::to_string(column) + ", expected 0 to " + std::to_string(spec.input_size - 1));
    }
    if (i > 0 && column <= layer.discrete[i - 1]) {
      refuse(name + " is " + std::to_string(column) + " after " + std::to_string(layer.discrete[i - 1]) +
             ", expected ascending columns");
    }
    const auto check_edge = [&](const char* field, double edge) {
      if (std::isinf(edge) || std::floor(edge) == edge - 0.5) return;
      refuse(prefix + field + "[" + std::to_string(column) + "] is " + text_of(edge) +
             " of a discrete column, expected the edge of an integer's cell, such as -0.5");
    };
    check_edge("low", layer.low[static_cast<std::size_t>(column)]);
    check_edge("high", layer.high[static_cast<std::size_t>(column)]);
  }
}

}  // namespace

/// `discrete` only where there are such columns, so that the others' text is what it was before there was such a field.
std::vector<Field> fields(Bounds& layer) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  std::vector<Field> list = {{"low", &layer.low, /*of_null=*/-kInfinity}, {"high", &layer.high, /*of_null=*/kInfinity}};
  if (!layer.discrete.empty()) list.push_back({"discrete", &layer.discrete});
  return list;
}

void check(const Bounds& layer, const FlowSpec& spec, const std::string& prefix) {
  bool any = false;
  const auto check_size = [&](const char* name, const std::vector<double>& values) {
    if (static_cast<std::int64_t>(values.size()) == spec.input_size) return;
    refuse(prefix + name + " has " + std::to_string(values.size()) + " entries, expected " +
           std::to_string(spec.input_size) + ", one for each column");
  };
  check_size("low", layer.low);
  check_size("high", layer.high);
  for (std::size_t j = 0; j < layer.low.size(); ++j) {
    const std::string column = std::to_string(j) + "]";
    check_pair(layer.low[j], layer.high[j], spec.dtype, prefix + "low[" + column, prefix + "high[" + column);
    any = any || std::isfinite(layer.low[j]) || std::isfinite(layer.high[j]);
  }
  check_discrete(layer, spec, prefix);
  if (any || !layer.discrete.empty()) return;
  refuse(prefix + "low and " + prefix + "high hold no number, expected a bound of one column at least");
}

void tensors(const Bounds&, const FlowSpec&, const Site&, const TensorSink&) {}

void lower(const Bounds&, const FlowSpec&, const TensorInfo*, Lowering&) {}

LayerFacts facts(const Bounds&) {
  LayerFacts facts;
  facts.has_kernel = false;
  facts.keeps_columns = true;
  return facts;
}

}  // namespace nvpflow::layers
