#include "spec_json.hpp"

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <nlohmann/json.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/spec.hpp>
#include <nvpflow/spec_json.hpp>

#include "../layers/layer.hpp"
#include "../overloaded.hpp"
#include "messages.hpp"
#include "metadata_json.hpp"

namespace nvpflow {

using namespace io;
using nlohmann::json;

namespace {

void read_field(const json& value, const std::string& prefix, const layers::Field& field) {
  const std::string name = prefix + field.name;
  std::visit(Overloaded{[&](bool* to) {
                          if (!value.is_boolean()) fail_field(name, value, "true or false");
                          *to = value.get<bool>();
                        },
                        [&](std::vector<std::int64_t>* to) {
                          if (!value.is_array()) fail_field(name, value, "an array");
                          for (const json& size : value) to->push_back(integer_of(size, name));
                        },
                        [&](Activation* to) { *to = name_from(value, prefix, field.name, parse_activation); },
                        [&](double* to) {
                          if (!value.is_number()) fail_field(name, value, "a number");
                          *to = value.get<double>();
                        }},
             field.value);
}

nlohmann::ordered_json field_to_json(const layers::Field& field) {
  return std::visit(Overloaded{[](const Activation* value) { return nlohmann::ordered_json(name_of(*value)); },
                               [](const auto* value) { return nlohmann::ordered_json(*value); }},
                    field.value);
}

LayerSpec layer_from_json(const json& value, const std::string& where) {
  if (!value.is_object() || !value.contains("kind")) check_keys(value, where, {"kind"});
  const std::string prefix = where + ".";
  LayerSpec layer = layers::make_layer(name_from(value["kind"], prefix, "kind", parse_layer_kind));
  const std::vector<layers::Field> fields = layers::fields(layer);
  std::vector<std::string_view> keys = {"kind"};
  for (const layers::Field& field : fields) keys.emplace_back(field.name);
  check_keys(value, where, keys);
  for (const layers::Field& field : fields) read_field(value[field.name], prefix, field);
  return layer;
}

std::string text_of(const layers::Field& field) {
  return std::visit(Overloaded{[](const std::vector<std::int64_t>* value) { return io::text_of(*value); },
                               [](const Activation* value) { return std::string(name_of(*value)); },
                               [](const auto* value) { return json(*value).dump(); }},
                    field.value);
}

}  // namespace

std::string to_json(const FlowSpec& spec) {
  nlohmann::ordered_json layers = nlohmann::ordered_json::array();
  for (LayerSpec layer : spec.layers) {
    nlohmann::ordered_json& entry = layers.emplace_back();
    entry["kind"] = name_of(kind_of(layer));
    for (const layers::Field& field : layers::fields(layer)) entry[field.name] = field_to_json(field);
  }
  nlohmann::ordered_json document;
  document["input_size"] = spec.input_size;
  document["dtype"] = name_of(spec.dtype);
  document["layers"] = std::move(layers);
  return document.dump();
}

FlowSpec parse_spec(const std::string& text) {
  const json document = parse_metadata_json(text);
  check_keys(document, "", {"input_size", "dtype", "layers"});
  FlowSpec spec;
  spec.input_size = integer_of(document["input_size"], "input_size");
  spec.dtype = name_from(document["dtype"], "", "dtype", parse_dtype);
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
  LayerSpec came = file.layers[i], wanted = expected.layers[i];
  const std::string prefix = "layers[" + std::to_string(i) + "].";
  if (kind_of(came) != kind_of(wanted)) {
    return differs(prefix + "kind", std::string(name_of(kind_of(came))), std::string(name_of(kind_of(wanted))));
  }
  const std::vector<layers::Field> fields = layers::fields(came), others = layers::fields(wanted);
  for (std::size_t f = 0; f < fields.size(); ++f) {
    const std::string value = text_of(fields[f]), other = text_of(others[f]);
    if (value != other) return differs(prefix + fields[f].name, value, other);
  }
  throw std::logic_error("fields() leaves out what makes the layers differ");
}

}  // namespace nvpflow
