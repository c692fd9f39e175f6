// Bounds of a flow's columns, in front of any backend: rows of data go through them on the host, in float64. Samples of
// discrete columns are rounded there.
#pragma once

#include <memory>

#include <nvpflow/spec.hpp>

#include "backend.hpp"

namespace nvpflow {

/// The backend of a flow that begins with bounds, from that of the flow behind them.
std::unique_ptr<Backend> make_bounded_backend(const FlowSpec& spec, std::unique_ptr<Backend> behind);

}  // namespace nvpflow
