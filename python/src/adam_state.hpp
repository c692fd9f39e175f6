// nvpflow.AdamState, there and back.
#pragma once

#include <optional>

#include <nvpflow/train.hpp>

#include "array_types.hpp"

namespace nvpflow::python {

/// The state that an nvpflow.AdamState holds; null for None.
std::optional<AdamState> adam_from(const py::object& given);
/// Writes a state to one.
void give_adam(const AdamState& state, const py::object& to);

}  // namespace nvpflow::python
