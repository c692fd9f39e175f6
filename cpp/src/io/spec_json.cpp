#include "spec_json.hpp"

#include <cstddef>
#include <string>
#include <utility>

#include <nlohmann/json.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/spec.hpp>

#include "messages.hpp"
#include "metadata_json.hpp"

namespace nvpflow {

using namespace io;
using nlohmann::json;

namespace {

LayerSpec layer_from_json(const json& value, const std::string& where) {
  if (!value.is_object() || !value.contains("kind")) check_keys(value, where, {"kind"});
  LayerSpec layer;
  layer.kind = name_from(value["kind"], where + ".kind", parse_layer_kind);
  if (layer.kind == LayerKind::standardize) {
    check_keys(value, where, {"kind"});
    return layer;
  }
  check_keys(value, where, {"kind", "swapped", "hidden_sizes", "activation", "scale_bound"});
  if (!value["swapped"].is_boolean()) fail_field(where + ".swapped", value["swapped"], "true or false");
  layer.swapped = value["swapped"].get<bool>();
  const json& sizes = value["hidden_sizes"];
  if (!sizes.is_array()) fail_field(where + ".hidden_sizes", sizes, "an array");
  for (const json& size : sizes) layer.hidden_sizes.push_back(integer_of(size, where + ".hidden_sizes"));
  layer.activation = name_from(value["activation"], where + ".activation", parse_activation);
  if (!value["scale_bound"].is_number()) fail_field(where + ".scale_bound", value["scale_bound"], "a number");
  layer.scale_bound = value["scale_bound"].get<double>();
  return layer;
}

}  // namespace

std::string spec_to_json(const FlowSpec& spec) {
  nlohmann::ordered_json layers = nlohmann::ordered_json::array();
  for (const LayerSpec& layer : spec.layers) {
    nlohmann::ordered_json& entry = layers.emplace_back();
    entry["kind"] = name_of(layer.kind);
    if (layer.kind == LayerKind::standardize) continue;
    entry["swapped"] = layer.swapped;
    entry["hidden_sizes"] = layer.hidden_sizes;
    entry["activation"] = name_of(layer.activation);
    entry["scale_bound"] = layer.scale_bound;
  }
  nlohmann::ordered_json document;
  document["input_size"] = spec.input_size;
  document["dtype"] = name_of(spec.dtype);
  document["layers"] = std::move(layers);
  return document.dump();
}

FlowSpec spec_from_json(const std::string& text) {
  const json document = parse_metadata_json(text);
  check_keys(document, "", {"input_size", "dtype", "layers"});
  FlowSpec spec;
  spec.input_size = integer_of(document["input_size"], "input_size");
  spec.dtype = name_from(document["dtype"], "dtype", parse_dtype);
  const json& layers = document["layers"];
  if (!layers.is_array()) fail_field("layers", layers, "an array");
  for (std::size_t i = 0; i < layers.size(); ++i) {
    spec.layers.push_back(layer_from_json(layers[i], "layers[" + std::to_string(i) + "]"));
  }
  try {
    spec.validate();
  } catch (const Error& error) {
    throw Error(ErrorCode::file_format, error.what());
  }
  return spec;
}

std::string difference(const FlowSpec& file, const FlowSpec& expected) {
  const auto differs = [](const std::string& field, const std::string& came, const std::string& wanted) {
    return field + " is " + came + " in the file, expected " + wanted;
  };
  if (file == expected) return "";
  if (file.input_size != expected.input_size) {
    return differs("input_size", std::to_string(file.input_size), std::to_string(expected.input_size));
  }
  if (file.dtype != expected.dtype) {
    return differs("dtype", std::string(name_of(file.dtype)), std::string(name_of(expected.dtype)));
  }
  if (file.layers.size() != expected.layers.size()) {
    return differs("the number of layers", std::to_string(file.layers.size()), std::to_string(expected.layers.size()));
  }
  std::size_t i = 0;
  while (file.layers[i] == expected.layers[i]) ++i;
  const LayerSpec& came = file.layers[i];
  const LayerSpec& wanted = expected.layers[i];
  const std::string prefix = "layers[" + std::to_string(i) + "].";
  if (came.kind != wanted.kind) {
    return differs(prefix + "kind", std::string(name_of(came.kind)), std::string(name_of(wanted.kind)));
  }
  if (came.swapped != wanted.swapped) {
    return differs(prefix + "swapped", came.swapped ? "true" : "false", wanted.swapped ? "true" : "false");
  }
  if (came.hidden_sizes != wanted.hidden_sizes) {
    return differs(prefix + "hidden_sizes", text_of(came.hidden_sizes), text_of(wanted.hidden_sizes));
  }
  if (came.activation != wanted.activation) {
    return differs(prefix + "activation", std::string(name_of(came.activation)),
                   std::string(name_of(wanted.activation)));
  }
  return differs(prefix + "scale_bound", json(came.scale_bound).dump(), json(wanted.scale_bound).dump());
}

}  // namespace nvpflow
