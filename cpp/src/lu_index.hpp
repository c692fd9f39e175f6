// Where the elements of the factors of an lu_linear layer lie in its tensors.
#pragma once

#include <cstdint>

#include "random.hpp"

namespace nvpflow {

/// L[i][j], i > j.
NVPFLOW_HOST_DEVICE constexpr std::int64_t lower_index(std::int64_t i, std::int64_t j) { return i * (i - 1) / 2 + j; }

/// U[i][j], i < j.
NVPFLOW_HOST_DEVICE constexpr std::int64_t upper_index(std::int64_t features, std::int64_t i, std::int64_t j) {
  return i * features - i * (i + 1) / 2 + (j - i - 1);
}

}  // namespace nvpflow
