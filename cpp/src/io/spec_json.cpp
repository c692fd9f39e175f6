#include "spec_json.hpp"

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>
#include <variant>

#include <nlohmann/json.hpp>
#include <nvpflow/base.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/spec.hpp>
#include <nvpflow/spec_json.hpp>

#include "layer_json.hpp"
#include "metadata_json.hpp"

namespace nvpflow {

using namespace io;
using nlohmann::json;
using nlohmann::ordered_json;

namespace {

ordered_json document_of(const FlowSpec& spec, Format format) {
  ordered_json document;
  document["input_size"] = spec.input_size;
  if (format == Format::v1_1) {
    document["context_size"] = spec.context_size;
    document["standardize_context"] = spec.standardize_context;
  }
  document["dtype"] = name_of(spec.dtype);
  if (format == Format::v1_1) document["base"] = base_to_json(spec.base);
  ordered_json layers = ordered_json::array();
  for (const LayerSpec& layer : spec.layers) layers.push_back(layer_to_json(layer, format));
  document["layers"] = std::move(layers);
  return document;
}

Format format_of(const FlowSpec& spec) {
  const bool old = spec.context_size == 0 && !spec.standardize_context &&
                   std::holds_alternative<NormalBase>(spec.base) &&
                   std::all_of(spec.layers.begin(), spec.layers.end(), is_of_1_0);
  return old ? Format::v1_0 : Format::v1_1;
}

/// What is in 1.1 only.
void read_head(const json& document, FlowSpec& spec) {
  check_keys(document, "", {"input_size", "context_size", "standardize_context", "dtype", "base", "layers"});
  spec.context_size = integer_of(document["context_size"], "context_size");
  const json& standardized = document["standardize_context"];
  if (!standardized.is_boolean()) fail_field("standardize_context", standardized, "true or false");
  spec.standardize_context = standardized.get<bool>();
  spec.base = base_from_json(document["base"], "base");
}

/// The first place where two documents of the same keys differ: "layers[2].network.hidden_sizes is [4] in the file,
/// expected [5]"; "" where they are equal.
std::string difference(const ordered_json& came, const ordered_json& wanted, const std::string& path,
                       const std::string& where) {
  if (came == wanted) return "";
  const bool both_lists = came.is_array() && wanted.is_array() && !came.empty() && came.front().is_object();
  if (both_lists && came.size() != wanted.size()) {
    return "the number of " + path + " is " + std::to_string(came.size()) + " in " + where + ", expected " +
           std::to_string(wanted.size());
  }
  if (both_lists) {
    for (std::size_t i = 0; i < came.size(); ++i) {
      const std::string found = difference(came[i], wanted[i], path + "[" + std::to_string(i) + "]", where);
      if (!found.empty()) return found;
    }
  }
  if (came.is_object() && wanted.is_object()) {
    for (const auto& [key, value] : came.items()) {  // the first key says what the object is
      const std::string name = path.empty() ? key : path + "." + key;
      if (!wanted.contains(key)) return name + " is in " + where + ", expected none";
      const std::string found = difference(value, wanted[key], name, where);
      if (!found.empty()) return found;
    }
  }
  const auto text = [](const ordered_json& value) {
    std::string dumped = value.is_string() ? value.get<std::string>() : value.dump();
    std::string spaced;
    for (const char c : dumped) spaced.append(c == ',' ? ", " : std::string(1, c));
    return spaced;
  };
  return path + " is " + text(came) + " in " + where + ", expected " + text(wanted);
}

}  // namespace

std::string to_json(const FlowSpec& spec) { return document_of(spec, format_of(spec)).dump(); }

std::string to_full_json(const FlowSpec& spec) { return document_of(spec, Format::v1_1).dump(); }

bool needs_format_1_1(const FlowSpec& spec) { return format_of(spec) == Format::v1_1; }

FlowSpec parse_spec(const std::string& text) {
  const json document = parse_metadata_json(text);
  FlowSpec spec;
  const Format format = document.is_object() && document.contains("context_size") ? Format::v1_1 : Format::v1_0;
  if (format == Format::v1_1) {
    read_head(document, spec);
  } else {
    check_keys(document, "", {"input_size", "dtype", "layers"});
  }
  spec.input_size = integer_of(document["input_size"], "input_size");
  spec.dtype = name_from(document["dtype"], "", "dtype", parse_dtype);
  const json& layers = document["layers"];
  if (!layers.is_array()) fail_field("layers", layers, "an array");
  for (std::size_t i = 0; i < layers.size(); ++i) {
    spec.layers.push_back(layer_from_json(layers[i], "layers[" + std::to_string(i) + "]", format));
  }
  try {
    spec.validate();
  } catch (const Error& error) {
    throw Error(ErrorCode::file_format, error.what());
  }
  return spec;
}

std::string difference(const FlowSpec& came, const FlowSpec& expected, const std::string& where) {
  if (came == expected) return "";
  const Format format = std::max(format_of(came), format_of(expected));
  return difference(document_of(came, format), document_of(expected, format), "", where);
}

}  // namespace nvpflow
