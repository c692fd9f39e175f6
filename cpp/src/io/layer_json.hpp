// Layers and the base as JSON, in both versions of the format.
#pragma once

#include <cstdint>
#include <string>

#include <nlohmann/json.hpp>
#include <nvpflow/base.hpp>
#include <nvpflow/layers.hpp>

namespace nvpflow::io {

/// 1.0 knows couplings of halves, F tanh(u / F), one mlp without a context, and standardize layers. 1.1 knows all.
enum class Format { v1_0, v1_1 };

/// The layer has a text in format 1.0.
bool is_of_1_0(const LayerSpec& layer);
/// Every field, in order.
nlohmann::ordered_json layer_to_json(LayerSpec layer, Format format);
/// where: "layers[3]". Throws Error(file_format) that names the field.
LayerSpec layer_from_json(const nlohmann::json& value, const std::string& where, Format format);

/// Every field, in order.
nlohmann::ordered_json base_to_json(Base base);
/// where: "base". Throws Error(file_format) that names the field.
Base base_from_json(const nlohmann::json& value, const std::string& where);

}  // namespace nvpflow::io
