// What Python's calls can take: until they pass a context on, no flow may be called that reads one.
#pragma once

#include <string>

#include <nvpflow/error.hpp>
#include <nvpflow/spec.hpp>

namespace nvpflow::python {

/// The spec itself; throws Error(unavailable) where it has a context.
inline const FlowSpec& without_context(const FlowSpec& spec) {
  if (spec.context_size == 0) return spec;
  throw Error(ErrorCode::unavailable, "context_size is " + std::to_string(spec.context_size) +
                                          ", expected 0: flows in Python take no context yet");
}

}  // namespace nvpflow::python
