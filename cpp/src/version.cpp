#include <nvpflow/version.hpp>

namespace nvpflow {

const char* version() { return NVPFLOW_VERSION; }

}  // namespace nvpflow
