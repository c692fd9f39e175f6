/// @file
/// A flow's spec as JSON text, which is what model files keep.
#pragma once

#include <string>

#include <nvpflow/export.h>
#include <nvpflow/spec.hpp>

namespace nvpflow {

/// The spec as JSON text on one line, in format 1.0 where that can say it, else in 1.1. The same spec gives the same
/// text.
NVPFLOW_API std::string to_json(const FlowSpec& spec);
/// The spec as JSON text of format 1.1, which names every field of every layer.
NVPFLOW_API std::string to_full_json(const FlowSpec& spec);
/// The spec that the text describes, validated. Throws Error(file_format) that names the field which is missing,
/// unknown or wrong.
NVPFLOW_API FlowSpec parse_spec(const std::string& text);

}  // namespace nvpflow
