// round_up, for the kernels and for what packs their weights. Files built with instruction-set flags include this
// header: `static`, because their objects may offer no function.
#pragma once

#include <stdint.h>

namespace nvpflow::cpu {

/// The smallest multiple of `unit` that is not below n.
static constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace nvpflow::cpu
