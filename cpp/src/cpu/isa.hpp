// The choice of instruction set, made once, on first use.
#pragma once

#include <vector>

#include "kernels.hpp"

namespace nvpflow::cpu {

/// The best set that is built in and that this processor supports, or the one that the environment variable NVPFLOW_ISA
/// names. Throws Error(unavailable) where that is unknown or not supported here.
const IsaEntry& chosen_isa();

/// Whether this processor's multiply-adds wait for loads, so that larger register blocks are worth what they cost
/// (Dense::wide_blocks). Results do not depend on it.
bool prefers_wide_blocks();

/// Every set that is built in and that this processor supports, best first.
std::vector<const IsaEntry*> supported_isas();

}  // namespace nvpflow::cpu
