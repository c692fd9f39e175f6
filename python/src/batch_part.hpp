// The rows of a batch that a gradient is asked for: index=, sample_weight=, total_rows= and accumulate=.
#pragma once

#include <cstdint>
#include <vector>

#include <nvpflow/execution.hpp>

#include "array_types.hpp"
#include "call_context.hpp"

namespace nvpflow::python {

/// What a call on a part of a batch was given, and what keeps it alive.
struct GivenPart {
  InputArray weights;
  std::vector<std::int64_t> index;  // a copy: what has been checked stays as it is while other threads run
  BatchPart part;
};

/// The objects as they came; null or None: not given.
struct PartArguments {
  PyObject *x, *sample_weight, *total_rows, *accumulate, *index, *context;
};

/// Throws where they are not what nll_gradient takes beside these rows and their context.
GivenPart read_part(const PartArguments& given, const InputArray& x, const GivenContext& context);

}  // namespace nvpflow::python
