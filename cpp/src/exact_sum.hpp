// Sums that have the same bits in whatever order they are formed: addends are rounded to multiples of one power of two
// for each group of elements, and the multiples are added up as integers. (Climate models call it a reproducible sum.)
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include <nvpflow/spec.hpp>

#include "parallel.hpp"

namespace nvpflow {

/// The least exponent that is used: finer multiples tell nothing.
inline constexpr std::int64_t kLeastExponent = -900;

/// |value| < 2^exponent_of(value) of a finite value.
inline std::int64_t exponent_of(double value) {
  int exponent = 0;
  std::frexp(value, &exponent);
  return value == 0 || !std::isfinite(value) ? kLeastExponent : std::max<std::int64_t>(exponent, kLeastExponent);
}

/// Bits that an addend may have where so many are added up in 63.
inline std::int64_t bits_of_addend(std::int64_t addends) {
  return 62 -
         static_cast<std::int64_t>(std::bit_width(static_cast<std::uint64_t>(std::max<std::int64_t>(addends, 1)) - 1));
}

/// An order of integers that is that of doubles, for an exact maximum; its own inverse, by from_ordered.
inline std::int64_t ordered(double value) {
  const auto bits = std::bit_cast<std::int64_t>(value);
  return bits >= 0 ? bits : std::numeric_limits<std::int64_t>::min() - bits;
}
inline double from_ordered(std::int64_t order) {
  return std::bit_cast<double>(order >= 0 ? order : std::numeric_limits<std::int64_t>::min() - order);
}

/// llrint(v) of |v| < 2^62 without a conversion, for which most instruction sets have no vector form: the upper and the
/// lower 32 bits are each left in the mantissa of a double.
inline std::int64_t rounded(double v) {
  constexpr double kInteger = 0x1.8p52, kUpper = 0x1p32;
  const double upper = (v * (1 / kUpper) + kInteger) - kInteger;
  constexpr auto kZero = std::bit_cast<std::int64_t>(kInteger);
  const std::int64_t high = std::bit_cast<std::int64_t>(upper + kInteger) - kZero;
  const std::int64_t low = std::bit_cast<std::int64_t>(v - upper * kUpper + kInteger) - kZero;
  return static_cast<std::int64_t>((static_cast<std::uint64_t>(high) << 32) + static_cast<std::uint64_t>(low));
}

/// The gradients of some shards, added up as integers. Every tensor has a grid of its own: 2^exponent bounds an
/// addend. An element keeps all bits of a float32 if it is above 2^-(30 - log2(shards)) of that bound.
template <class T>
class ExactGradient {
 public:
  ExactGradient(const ParamLayout& layout, std::int64_t shards, int threads)
      : size_(static_cast<std::size_t>(layout.size())),
        tensors_(layout.tensors().size()),
        bits_(bits_of_addend(shards)),
        threads_(threads),
        exponents_(tensors_, kLeastExponent),
        words_(size_ + tensors_ + kCounters) {
    constexpr std::int64_t kPiece = 1 << 14;
    for (std::size_t t = 0; t < tensors_; ++t) {
      const std::int64_t end = layout.tensors()[t].offset + layout.tensors()[t].size;
      for (std::int64_t first = layout.tensors()[t].offset; first < end; first += kPiece) {
        pieces_.push_back(
            {t, static_cast<std::size_t>(first), static_cast<std::size_t>(std::min(end, first + kPiece))});
      }
    }
  }

  /// Sets the grids by Adam's mean square of each element, times `factor`: a function of what a checkpoint holds.
  void expect(const T* mean_square, double factor) {
    std::fill(exponents_.begin(), exponents_.end(), kLeastExponent);
    for (const Piece& piece : pieces_) look(piece, mean_square, factor, exponents_);
    for (std::int64_t& exponent : exponents_) exponent = (exponent + 1) / 2;
    make_room();
  }

  /// Before the gradients of a step.
  void clear() {
    std::fill(words_.begin(), words_.end(), 0);
    needed_ = exponents_;
  }
  /// A shard's gradient and its sum of log p.
  void add(const T* values, double sum_log_prob) {
    std::vector<Found> found(pieces_.size());
    each_piece([&](std::size_t i) { found[i] = add(pieces_[i], values); });
    for (std::size_t i = 0; i < pieces_.size(); ++i) {
      if (found[i].outside == 0) continue;
      word(pieces_[i].tensor) += found[i].outside;
      counter(kNotFinite) += found[i].not_finite;
      look(pieces_[i], values, 1, needed_);
    }
    add_sum(sum_log_prob);
  }

  /// What a collective adds up.
  std::span<std::int64_t> words() { return words_; }
  /// @{
  /// Processes that wish to stop, and that failed; to be counted before words() are added up.
  std::int64_t& stops() { return counter(kStops); }
  std::int64_t& failures() { return counter(kFailures); }
  /// @}
  bool is_finite() { return counter(kNotFinite) == 0; }
  /// Whether an addend of any shard lay outside its grid, and the sum is of no use.
  bool is_outside() const {
    return std::any_of(words_.begin() + static_cast<std::ptrdiff_t>(size_),
                       words_.begin() + static_cast<std::ptrdiff_t>(size_ + tensors_),
                       [](std::int64_t n) { return n > 0; });
  }
  /// The exponents that the addends of this process need. Their largest among all are to be taken over by widen().
  std::span<std::int64_t> needed() { return needed_; }
  void widen() { exponents_ = needed_; }

  /// Writes the sum, and sets the grids for the next one.
  void take(T* values) {
    std::vector<std::int64_t> own(pieces_.size());
    each_piece([&](std::size_t i) { own[i] = take(pieces_[i], values); });
    std::fill(exponents_.begin(), exponents_.end(), kLeastExponent);
    for (std::size_t i = 0; i < pieces_.size(); ++i) {
      exponents_[pieces_[i].tensor] = std::max(exponents_[pieces_[i].tensor], own[i]);
    }
    make_room();
  }
  /// Of log p; infinite where it is beyond 2^53.
  double sum_log_prob() {
    if (counter(kBadSums) > 0) return -std::numeric_limits<double>::infinity();
    return static_cast<double>(counter(kWhole)) + std::ldexp(static_cast<double>(counter(kFraction)), -kFractionBits);
  }

 private:
  static constexpr std::int64_t kRoom = 12;    // an addend may be 2^12 times as large as the last sum
  static constexpr std::int64_t kMost = 1024;  // of a float64
  static constexpr int kFractionBits = 40;     // 2^22 of them fit
  enum Counter : std::size_t { kWhole, kFraction, kBadSums, kNotFinite, kStops, kFailures, kCounters };
  struct Piece {
    std::size_t tensor, begin, end;
  };
  struct Found {
    std::int64_t outside = 0, not_finite = 0;
  };

  std::int64_t& word(std::size_t tensor) { return words_[size_ + tensor]; }
  std::int64_t& counter(Counter which) { return words_[size_ + tensors_ + which]; }

  void make_room() {
    for (std::int64_t& exponent : exponents_) exponent = std::min<std::int64_t>(exponent + kRoom, kMost);
  }

  template <class F>
  void each_piece(F&& f) {
    parallel_for(static_cast<std::int64_t>(pieces_.size()), 1, threads_, [&](std::int64_t begin, std::int64_t end) {
      for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i) f(i);
    });
  }

  Found add(const Piece& piece, const T* values) {
    const double factor = std::ldexp(1.0, static_cast<int>(bits_ - exponents_[piece.tensor]));
    const double limit = std::ldexp(1.0, static_cast<int>(bits_));
    std::int64_t* const words = words_.data();
    Found found;
    for (std::size_t i = piece.begin; i < piece.end; ++i) {
      const double v = static_cast<double>(values[i]) * factor;
      const bool fits = std::abs(v) < limit;  // not a NaN
      words[i] += rounded(fits ? v : 0.0);
      found.outside += fits ? 0 : 1;
    }
    for (std::size_t i = piece.begin; found.outside > 0 && i < piece.end; ++i) {
      found.not_finite += std::isfinite(values[i]) ? 0 : 1;
    }
    return found;
  }

  void add_sum(double sum) {
    if (!(std::abs(sum) < 0x1p53)) {
      ++counter(std::isnan(sum) ? kNotFinite : kBadSums);
      return;
    }
    const double whole = std::floor(sum);
    counter(kWhole) += static_cast<std::int64_t>(whole);
    counter(kFraction) += std::llrint(std::ldexp(sum - whole, kFractionBits));
  }

  void look(const Piece& piece, const T* values, double factor, std::vector<std::int64_t>& exponents) const {
    T most = 0;
    for (std::size_t i = piece.begin; i < piece.end; ++i) {
      const T size = std::abs(values[i]);
      if (std::isfinite(size)) most = std::max(most, size);
    }
    exponents[piece.tensor] = std::max(exponents[piece.tensor], exponent_of(static_cast<double>(most) * factor));
  }

  std::int64_t take(const Piece& piece, T* values) const {
    const double unit = std::ldexp(1.0, static_cast<int>(exponents_[piece.tensor] - bits_));
    T most = 0;
    for (std::size_t i = piece.begin; i < piece.end; ++i) {
      values[i] = static_cast<T>(static_cast<double>(words_[i]) * unit);
      most = std::max(most, std::abs(values[i]));
    }
    return exponent_of(static_cast<double>(most));
  }

  std::size_t size_, tensors_;
  std::int64_t bits_;
  int threads_;
  std::vector<Piece> pieces_;
  std::vector<std::int64_t> exponents_, needed_, words_;
};

}  // namespace nvpflow
