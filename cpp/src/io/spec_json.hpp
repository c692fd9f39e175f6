// A spec as the JSON text that goes into the metadata of a file, and back.
#pragma once

#include <string>

#include <nvpflow/spec.hpp>

namespace nvpflow {

/// The spec as JSON; from_json throws Error(file_format) that names the field.
std::string spec_to_json(const FlowSpec& spec);
FlowSpec spec_from_json(const std::string& text);

/// "" where they are equal, else the first field of the file's spec that differs.
std::string difference(const FlowSpec& file, const FlowSpec& expected);

}  // namespace nvpflow
