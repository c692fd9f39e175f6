// The gradients of a sharded run's shards, added up exactly: exact_sum.hpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include <nvpflow/spec.hpp>

#include "cpu/cpu_flow.hpp"
#include "cpu/kernels.hpp"
#include "exact_sum.hpp"
#include "parallel.hpp"

namespace nvpflow {

/// The gradients of some shards, of what is trained, added up as integers. Every tensor has a grid of its own:
/// 2^exponent bounds an addend. An element keeps all bits of a float32 if it is above 2^-(30 - log2(shards)) of that
/// bound.
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
      if (!layout.tensors()[t].trained) continue;
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
  /// Of log p; infinite where that of a shard is beyond 2^92 / shards.
  double sum_log_prob() {
    if (counter(kBadSums) > 0) return -std::numeric_limits<double>::infinity();
    return std::ldexp(static_cast<double>(counter(kHigh)), kHighBits) + static_cast<double>(counter(kWhole)) +
           std::ldexp(static_cast<double>(counter(kFraction)), -kFractionBits);
  }

 private:
  static constexpr std::int64_t kRoom = 12;    // an addend may be 2^12 times as large as the last sum
  static constexpr std::int64_t kMost = 1024;  // of a float64
  static constexpr int kFractionBits = 40;     // 2^22 of them fit
  static constexpr int kHighBits = 32;
  enum Counter : std::size_t { kHigh, kWhole, kFraction, kBadSums, kNotFinite, kStops, kFailures, kCounters };
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
    const auto count = static_cast<std::int64_t>(piece.end - piece.begin);
    Found found;
    found.outside = kernels_.add_to_grid(values + piece.begin, count, factor, limit, &words_[piece.begin]);
    for (std::size_t i = piece.begin; found.outside > 0 && i < piece.end; ++i) {
      found.not_finite += std::isfinite(values[i]) ? 0 : 1;
    }
    return found;
  }

  void add_sum(double sum) {
    if (!(std::abs(sum) < std::ldexp(1.0, static_cast<int>(bits_) + kHighBits - 2))) {
      ++counter(std::isnan(sum) ? kNotFinite : kBadSums);
      return;
    }
    const double whole = std::floor(sum);
    const double high = std::floor(std::ldexp(whole, -kHighBits));
    counter(kHigh) += static_cast<std::int64_t>(high);
    counter(kWhole) += static_cast<std::int64_t>(whole - std::ldexp(high, kHighBits));
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
  const cpu::Kernels<T>& kernels_ = cpu::chosen_kernels<T>();
  std::vector<Piece> pieces_;
  std::vector<std::int64_t> exponents_, needed_, words_;
};

}  // namespace nvpflow
