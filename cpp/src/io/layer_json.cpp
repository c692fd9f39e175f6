#include "layer_json.hpp"

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <nlohmann/json.hpp>
#include <nvpflow/base.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/layers.hpp>

#include "../layers/layer.hpp"
#include "../overloaded.hpp"
#include "messages.hpp"
#include "metadata_json.hpp"

namespace nvpflow::io {

using layers::Field;
using nlohmann::json;
using nlohmann::ordered_json;

namespace {

// ---- writing ----

ordered_json fields_to_json(ordered_json to, const std::vector<Field>& fields);

ordered_json value_to_json(const FeatureSet& set) {
  if (set.name == FeatureSet::Name::indices) return set.indices;
  return name_of(set.name);
}

const char* name_of_transform(const Transform& transform) {
  return std::visit(Overloaded{[](const Affine&) { return "affine"; }, [](const Additive&) { return "additive"; },
                               [](const Spline&) { return "spline"; }},
                    transform);
}

ordered_json value_to_json(Transform& transform) {
  return fields_to_json({{"kind", name_of_transform(transform)}}, layers::fields(transform));
}

ordered_json value_to_json(LogScale& scale) {
  return fields_to_json({{"function", name_of(scale.function)}}, layers::fields(scale));
}

ordered_json value_to_json(Network& network) {
  return fields_to_json({{"kind", name_of(network.kind)}}, layers::fields(network));
}

ordered_json value_to_json(KnotSlope& slope) {
  return fields_to_json({{"function", name_of(slope.function)}}, layers::fields(slope));
}

ordered_json value_to_json(Spline& spline) { return fields_to_json(ordered_json::object(), layers::fields(spline)); }

ordered_json value_to_json(Activation activation) { return name_of(activation); }
ordered_json value_to_json(Spline::Boundary boundary) { return name_of(boundary); }
ordered_json value_to_json(Spline::Tails tails) { return name_of(tails); }
ordered_json value_to_json(MixtureBase::Covariance covariance) { return name_of(covariance); }
ordered_json value_to_json(bool value) { return value; }
ordered_json value_to_json(double value) { return value; }  // infinity as null
ordered_json value_to_json(std::int64_t value) { return value; }
ordered_json value_to_json(const std::vector<std::int64_t>& value) { return value; }
ordered_json value_to_json(const std::vector<double>& value) { return value; }

ordered_json fields_to_json(ordered_json to, const std::vector<Field>& fields) {
  for (const Field& field : fields) {
    to[field.name] = std::visit([](auto* value) { return value_to_json(*value); }, field.value);
  }
  return to;
}

// ---- reading ----

/// Where a value stands: "layers[3]." and "transformed".
struct Place {
  const std::string& prefix;
  const char* name;
  std::string path() const { return prefix + name; }
};

void read_fields(const json& object, const std::string& where, const char* tag, const std::vector<Field>& fields);

void read_value(const json& value, const Place& place, bool& to) {
  if (!value.is_boolean()) fail_field(place.path(), value, "true or false");
  to = value.get<bool>();
}

void read_value(const json& value, const Place& place, std::int64_t& to) { to = integer_of(value, place.path()); }

void read_value(const json& value, const Place& place, double& to) { to = number_of(value, place.path()); }

void read_value(const json& value, const Place& place, std::vector<std::int64_t>& to) {
  if (!value.is_array()) fail_field(place.path(), value, "an array");
  to.clear();
  to.reserve(value.size());
  for (std::size_t i = 0; i < value.size(); ++i) {
    to.push_back(integer_of(value[i], place.path() + "[" + std::to_string(i) + "]"));
  }
}

/// of_null: of Field.
void read_values(const json& value, const Place& place, double of_null, std::vector<double>& to) {
  if (!value.is_array()) fail_field(place.path(), value, "an array");
  to.clear();
  to.reserve(value.size());
  for (std::size_t i = 0; i < value.size(); ++i) {
    to.push_back(value[i].is_null() ? of_null : number_of(value[i], place.path() + "[" + std::to_string(i) + "]"));
  }
}

void read_value(const json& value, const Place& place, Activation& to) {
  to = name_from(value, place.prefix, place.name, parse_activation);
}

void read_value(const json& value, const Place& place, FeatureSet& to) {
  if (value.is_array()) {
    to.name = FeatureSet::Name::indices;
    return read_value(value, place, to.indices);
  }
  to.name = name_from(value, place.prefix, place.name, parse_feature_set);
  if (to.name == FeatureSet::Name::indices) fail_field(place.path(), value, "an array of indices or a name");
}

/// The name that says what an object is, read before its fields are known.
template <class Parse>
auto tag_of(const json& value, const Place& place, const char* tag, Parse parse) {
  if (!value.is_object() || !value.contains(tag)) check_keys(value, place.path(), {tag});
  return name_from(value[tag], place.path() + ".", tag, parse);
}

void read_value(const json& value, const Place& place, Transform& to) {
  to = tag_of(value, place, "kind", [](std::string_view name) {
    if (name == "affine") return Transform(Affine{});
    if (name == "additive") return Transform(Additive{});
    if (name == "spline") return Transform(Spline{});
    throw Error(ErrorCode::invalid_argument, "kind is " + quote(name) + ", expected one of affine, additive, spline");
  });
  read_fields(value, place.path(), "kind", layers::fields(to));
}

void read_value(const json& value, const Place& place, LogScale& to) {
  to.function = tag_of(value, place, "function", parse_log_scale);
  read_fields(value, place.path(), "function", layers::fields(to));
}

void read_value(const json& value, const Place& place, KnotSlope& to) {
  to.function = tag_of(value, place, "function", parse_knot_slope);
  read_fields(value, place.path(), "function", layers::fields(to));
}

void read_value(const json& value, const Place& place, Spline& to) {
  if (!value.is_object()) fail_field(place.path(), value, "an object");
  read_fields(value, place.path(), nullptr, layers::fields(to));
}

void read_value(const json& value, const Place& place, Spline::Boundary& to) {
  to = name_from(value, place.prefix, place.name, parse_spline_boundary);
}

void read_value(const json& value, const Place& place, Spline::Tails& to) {
  to = name_from(value, place.prefix, place.name, parse_spline_tails);
}

void read_value(const json& value, const Place& place, MixtureBase::Covariance& to) {
  to = name_from(value, place.prefix, place.name, parse_covariance);
}

void read_value(const json& value, const Place& place, Network& to) {
  to.kind = tag_of(value, place, "kind", parse_network_kind);
  read_fields(value, place.path(), "kind", layers::fields(to));
}

/// Exactly these fields, and the tag that is read already (null: none).
void read_fields(const json& object, const std::string& where, const char* tag, const std::vector<Field>& fields) {
  std::vector<std::string_view> keys;
  if (tag != nullptr) keys.emplace_back(tag);
  for (const Field& field : fields) keys.emplace_back(field.name);
  check_keys(object, where, keys);
  const std::string prefix = where + ".";
  for (const Field& field : fields) {
    const json& value = object[field.name];
    const Place place = {prefix, field.name};
    auto* const number = std::get_if<double*>(&field.value);
    if (number != nullptr && field.of_null != 0 && value.is_null()) {
      **number = field.of_null;
      continue;
    }
    std::visit(Overloaded{[&](std::vector<double>* to) { read_values(value, place, field.of_null, *to); },
                          [&](auto* to) { read_value(value, place, *to); }},
               field.value);
  }
}

}  // namespace

bool is_of_1_0(const LayerSpec& layer) {
  const auto* coupling = std::get_if<Coupling>(&layer);
  return coupling != nullptr ? layers::is_plain(*coupling) : std::holds_alternative<Standardize>(layer);
}

ordered_json layer_to_json(LayerSpec layer, Format format) {
  bool swapped = false;
  auto* coupling = format == Format::v1_0 ? std::get_if<Coupling>(&layer) : nullptr;
  return fields_to_json({{"kind", name_of(kind_of(layer))}},
                        coupling != nullptr ? layers::plain_fields(*coupling, swapped) : layers::fields(layer));
}

LayerSpec layer_from_json(const json& value, const std::string& where, Format format) {
  if (!value.is_object() || !value.contains("kind")) check_keys(value, where, {"kind"});
  LayerSpec layer = layers::make_layer(name_from(value["kind"], where + ".", "kind", parse_layer_kind));
  auto* coupling = std::get_if<Coupling>(&layer);
  if (format == Format::v1_0 && coupling == nullptr && !std::holds_alternative<Standardize>(layer)) {
    fail_field(where + ".kind", value["kind"], "coupling or standardize: a spec with context_size knows others");
  }
  if (format == Format::v1_0 && coupling != nullptr) {
    bool swapped = false;
    read_fields(value, where, "kind", layers::plain_fields(*coupling, swapped));
    if (swapped) coupling->transformed.name = FeatureSet::Name::first_half;
    LogScale& scale = std::get<Affine>(coupling->transform).log_scale;
    scale.divisor = scale.factor;
  } else {
    if (coupling != nullptr && value.contains("scale_network")) coupling->translation_network.emplace();
    auto* linear = std::get_if<LULinear>(&layer);
    if (linear != nullptr) linear->whitens = value.contains("whitens");
    auto* bounds = std::get_if<Bounds>(&layer);
    if (bounds != nullptr && value.contains("discrete")) bounds->discrete = {0};  // until it is read
    read_fields(value, where, "kind", layers::fields(layer));
  }
  return layer;
}

ordered_json base_to_json(Base base) { return fields_to_json({{"kind", layers::name_of(base)}}, layers::fields(base)); }

Base base_from_json(const json& value, const std::string& where) {
  if (!value.is_object() || !value.contains("kind")) check_keys(value, where, {"kind"});
  Base base = name_from(value["kind"], where + ".", "kind", layers::parse_base);
  read_fields(value, where, "kind", layers::fields(base));
  return base;
}

}  // namespace nvpflow::io
