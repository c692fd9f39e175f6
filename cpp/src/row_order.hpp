// The order in which a pass visits rows, computed point by point: no array of the data's length, on any hardware.
#pragma once

#include <cstdint>

#include "math.hpp"

namespace nvpflow {

/// Place i of a pass -> row of the data: shuffled among the rows of one part, the part taken from a random split. Plain
/// data, so that a device can take a copy.
struct RowOrder {
  bool shuffled = false, split = false;
  std::uint64_t first_of_part = 0;  // where the part begins in the split
  Permutation shuffle, parts;

  NVPFLOW_ANYWHERE std::int64_t operator()(std::int64_t place) const {
    auto i = static_cast<std::uint64_t>(place);
    if (shuffled) i = shuffle(i);
    if (split) i = parts(i + first_of_part);
    return static_cast<std::int64_t>(i);
  }
};

}  // namespace nvpflow
