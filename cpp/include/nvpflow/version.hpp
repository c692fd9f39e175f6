/// @file
/// Which version of the library this is.
#pragma once

#include <nvpflow/export.h>

namespace nvpflow {

/// Library version, "MAJOR.MINOR.PATCH".
NVPFLOW_API const char* version();

}  // namespace nvpflow
