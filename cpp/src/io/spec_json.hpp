// What differs between a spec and the one that was expected. Specs as JSON: <nvpflow/spec_json.hpp>.
#pragma once

#include <string>

#include <nvpflow/spec.hpp>

namespace nvpflow {

/// "" where they are equal, else the first field that differs. where: what `came` is the spec of, "the file".
std::string difference(const FlowSpec& came, const FlowSpec& expected, const std::string& where);
/// to_json() has to use format 1.1.
bool needs_format_1_1(const FlowSpec& spec);

}  // namespace nvpflow
