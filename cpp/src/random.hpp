// Counter-based random numbers, as scalar integer formulas: the same everywhere, for every chunk and thread.
//
// Every number is a function of (seed, counter). The counter's words are {row low, row high, column block, stream};
// the streams below keep the uses of one seed apart.
#pragma once

#include <cstddef>
#include <cstdint>

#include "host_device.hpp"

namespace nvpflow {

inline constexpr std::uint32_t kStreamNoise = 0;       // sample(): standard normals
inline constexpr std::uint32_t kStreamInitialize = 1;  // initialize_parameters()
inline constexpr std::uint32_t kStreamShuffle = 2;     // fit(): order of the rows in each epoch
inline constexpr std::uint32_t kStreamSplit = 3;       // fit(): rows set aside for validation
inline constexpr std::uint32_t kStreamDither = 4;      // fit(): noise on discrete columns of x ...
inline constexpr std::uint32_t kStreamComponent = 5;   // sample(): the component of a mixture that a row comes from
inline constexpr std::uint32_t kStreamDitherValidation = 6;  // ... and of validation

/// Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011).
inline void philox4x32(std::uint64_t key, const std::uint32_t counter[4], std::uint32_t out[4]) {
  std::uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  auto k0 = static_cast<std::uint32_t>(key);
  auto k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * c0;
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<std::uint32_t>(product1);
    c3 = static_cast<std::uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

/// A pseudo-random permutation of [0, size) that is computed point by point: no array, no state, any row at any time.
/// A balanced Feistel network (Luby and Rackoff 1988) over the next even power of two, walked along its cycles until it
/// lands inside (Black and Rogaway 2002). The round function is the 64-bit finaliser of MurmurHash3 on half and key.
class Shuffle {
 public:
  Shuffle() = default;
  /// part: tells apart the shuffles of one epoch; below 2^30.
  Shuffle(std::uint64_t size, std::uint64_t seed, std::uint32_t stream, std::uint64_t epoch, std::uint32_t part = 0)
      : size_(size) {
    while (half_bits_ < 32 && (std::uint64_t{1} << (2 * half_bits_)) < size) ++half_bits_;
    mask_ = (std::uint64_t{1} << half_bits_) - 1;
    for (std::uint32_t pair = 0; pair < kRounds / 2; ++pair) {
      const std::uint32_t counter[4] = {static_cast<std::uint32_t>(epoch), static_cast<std::uint32_t>(epoch >> 32),
                                        pair + 4 * part, stream};
      std::uint32_t word[4];
      philox4x32(seed, counter, word);
      keys_[std::size_t{2} * pair] = (std::uint64_t{word[1]} << 32) | word[0];
      keys_[std::size_t{2} * pair + 1] = (std::uint64_t{word[3]} << 32) | word[2];
    }
  }

  NVPFLOW_HOST_DEVICE std::uint64_t operator()(std::uint64_t i) const {
    do {
      i = encrypt(i);
    } while (i >= size_);
    return i;
  }

  /// i of a walk that goes on at 0 behind the last place.
  NVPFLOW_HOST_DEVICE std::uint64_t wrapped(std::uint64_t i) const { return i < size_ ? i : i - size_; }

  /// places[i] = (*this)(places[i]) for at most kBlock places. All advance in step: the rounds of one place wait
  /// for each other, and a processor cannot predict which places land outside.
  static constexpr std::int64_t kBlock = 64;
  void apply(std::uint64_t* places, std::int64_t count) const {
    std::int64_t outside[kBlock];
    for (std::int64_t i = 0; i < count; ++i) outside[i] = i;
    while (count > 0) count = walk(places, outside, count);
  }

 private:
  static constexpr int kRounds = 6;

  /// One step of the places that `outside` names; leaves the names of those that landed outside again, and returns how
  /// many they are.
  std::int64_t walk(std::uint64_t* places, std::int64_t* outside, std::int64_t count) const {
    std::int64_t left = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t at = outside[i];
      places[at] = encrypt(places[at]);
      outside[left] = at;
      left += places[at] >= size_ ? 1 : 0;
    }
    return left;
  }

  NVPFLOW_HOST_DEVICE std::uint64_t encrypt(std::uint64_t value) const {
    std::uint64_t left = value >> half_bits_;
    std::uint64_t right = value & mask_;
    for (const std::uint64_t key : keys_) {
      std::uint64_t mixed = right + key;
      mixed = (mixed ^ (mixed >> 33)) * 0xFF51AFD7ED558CCDull;
      mixed = (mixed ^ (mixed >> 33)) * 0xC4CEB9FE1A85EC53ull;
      const std::uint64_t next = left ^ ((mixed >> 33) & mask_);
      left = right;
      right = next;
    }
    return (left << half_bits_) | right;
  }

  std::uint64_t size_ = 0;
  std::uint64_t mask_ = 0;
  int half_bits_ = 1;
  std::uint64_t keys_[kRounds] = {};
};

}  // namespace nvpflow
