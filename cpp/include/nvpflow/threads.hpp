/// @file
/// How many threads calls use unless they are told.
#pragma once

#include <nvpflow/export.h>

namespace nvpflow {

/// Threads this process may use: its affinity mask, cut to the cgroup's CPU quota and to NVPFLOW_NUM_THREADS, or else
/// OMP_NUM_THREADS, of the environment. At least 1. Counted once, at the first call. Throws
/// Error(unavailable) where NVPFLOW_NUM_THREADS holds no number above 0.
NVPFLOW_API int available_threads();

}  // namespace nvpflow
