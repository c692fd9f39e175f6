// Which rows a fit trains on.
#pragma once

#include <cmath>
#include <cstdint>

#include "random.hpp"
#include "row_order.hpp"

namespace nvpflow {

/// Consecutive rows of x that are shuffled on their own.
struct Shard {
  std::int64_t number = 0, first_row = 0;
};

/// Which rows of x, or of a shard of it, train and which validate, and their order in each epoch.
class FitRows {
 public:
  FitRows(std::int64_t total, std::int64_t held_out, std::uint64_t seed, const Shard& shard = {})
      : FitRows(total, 0, held_out, seed, shard) {}

  /// Fold k of so many: every row is held out by one of them.
  static FitRows fold(std::int64_t total, std::int64_t k, std::int64_t folds, std::uint64_t seed) {
    const std::int64_t first = k * total / folds;
    return {total, first, (k + 1) * total / folds - first, seed, {}};
  }

  /// How many of `total` rows a share of them sets aside.
  static std::int64_t held_out_of(std::int64_t total, double share) {
    return static_cast<std::int64_t>(std::floor(share * static_cast<double>(total)));
  }

  std::int64_t train() const { return train_; }
  std::int64_t held_out() const { return held_out_; }
  /// The training rows, as they lie.
  RowOrder training() const {
    RowOrder order;
    if (held_out_ > 0) order.split = true, order.parts = split_;
    order.first_of_part = static_cast<std::uint64_t>(first_ + held_out_);
    order.base = static_cast<std::uint64_t>(shard_.first_row);
    return order;
  }
  /// The training rows in the order of an epoch.
  RowOrder shuffled(std::int64_t epoch) const {
    RowOrder order = training();
    order.shuffled = true;
    order.shuffle = {static_cast<std::uint64_t>(train_), seed_, kStreamShuffle, static_cast<std::uint64_t>(epoch),
                     number()};
    return order;
  }
  RowOrder validating() const {
    RowOrder order;
    order.split = true;
    order.parts = split_;
    order.first_of_part = static_cast<std::uint64_t>(first_);
    order.base = static_cast<std::uint64_t>(shard_.first_row);
    return order;
  }

 private:
  /// Held out: those from place `first` of the split on.
  FitRows(std::int64_t total, std::int64_t first, std::int64_t held_out, std::uint64_t seed, const Shard& shard)
      : first_(first),
        held_out_(held_out),
        seed_(seed),
        shard_(shard),
        split_(static_cast<std::uint64_t>(total), seed, kStreamSplit, 0, number()),
        train_(total - held_out) {}

  std::uint32_t number() const { return static_cast<std::uint32_t>(shard_.number); }

  std::int64_t first_, held_out_;
  std::uint64_t seed_;
  Shard shard_;
  Shuffle split_;
  std::int64_t train_;
};

}  // namespace nvpflow
