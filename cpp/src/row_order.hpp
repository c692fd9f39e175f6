// The order in which a pass visits rows, computed point by point: no array of the data's length, on any hardware.
#pragma once

#include <algorithm>
#include <cstdint>

#include "random.hpp"

namespace nvpflow {

/// Place i of a pass -> row of the data: shuffled among the rows of one part, the part taken from a random split. Plain
/// data, so that a device can take a copy.
struct RowOrder {
  bool shuffled = false, split = false;
  std::uint64_t first_of_part = 0;  // where the part begins in the split, which it goes round
  std::uint64_t base = 0;           // the row that all of this is counted from: the first of a shard
  Shuffle shuffle, parts;

  NVPFLOW_HOST_DEVICE std::int64_t operator()(std::int64_t place) const {
    auto i = static_cast<std::uint64_t>(place);
    if (shuffled) i = shuffle(i);
    if (split) i = parts(parts.wrapped(i + first_of_part));
    return static_cast<std::int64_t>(i + base);
  }

  /// f(i, (*this)(first + i)) for i < count, in order: faster than one by one.
  template <class F>
  void each(std::int64_t first, std::int64_t count, F&& f) const {
    std::uint64_t places[Shuffle::kBlock];
    for (std::int64_t done = 0; done < count; done += Shuffle::kBlock) {
      const std::int64_t size = std::min(Shuffle::kBlock, count - done);
      for (std::int64_t i = 0; i < size; ++i) places[i] = static_cast<std::uint64_t>(first + done + i);
      if (shuffled) shuffle.apply(places, size);
      for (std::int64_t i = 0; split && i < size; ++i) places[i] = parts.wrapped(places[i] + first_of_part);
      if (split) parts.apply(places, size);
      for (std::int64_t i = 0; i < size; ++i) f(done + i, static_cast<std::int64_t>(places[i] + base));
    }
  }
};

}  // namespace nvpflow
