// What differs between the spec of a file and the one that was expected. Specs as JSON: <nvpflow/spec_json.hpp>.
#pragma once

#include <string>

#include <nvpflow/spec.hpp>

namespace nvpflow {

/// "" where they are equal, else the first field of the file's spec that differs.
std::string difference(const FlowSpec& file, const FlowSpec& expected);
/// to_json() has to use format 1.1.
bool needs_format_1_1(const FlowSpec& spec);

}  // namespace nvpflow
