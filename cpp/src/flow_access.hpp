// What training and tests may see of a flow's inside.
#pragma once

#include <nvpflow/flow.hpp>

#include "backend.hpp"

namespace nvpflow {

struct FlowAccess {
  static const Backend& backend(const Flow& flow);
  /// Threads of a batch call: what num_threads() says, or as many as there are.
  static int threads(const Flow& flow);
};

}  // namespace nvpflow
