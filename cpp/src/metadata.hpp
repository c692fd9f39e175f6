// JSON in the metadata of a file, which may come from anybody. Apart from file_format.hpp, whose users need no JSON.
#pragma once

#include <string>

#include <nlohmann/json.hpp>

namespace nvpflow {

/// The document that a metadata value holds. Error(file_format) where it is no JSON, repeats a key, is longer than 16
/// MiB or deeper than eight levels: what walks through it may then do so by recursion.
nlohmann::json parse_metadata_json(const std::string& text);

}  // namespace nvpflow
