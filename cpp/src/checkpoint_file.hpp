// A checkpoint as a file, whatever was run: the container of io/safetensors.hpp with what the run is, its optimizer's
// state and its records.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <nvpflow/spec.hpp>

#include "io/safetensors.hpp"

namespace nvpflow {

/// Flat arrays of `count` elements of the spec's dtype, read or written in place.
struct CheckpointArrays {
  void* parameters;
  void* best;
  void* first_moment;
  void* second_moment;
  void* average;  // null where there is none
  std::int64_t count;
};

/// What a run has done.
struct CheckpointState {
  std::int64_t adam_steps = 0, best = 0;  // the number of the best record, 0: none
  double best_loss = 0;
  std::optional<double> begun;  // of fit(): the sum of log p of an epoch that is not finished
  std::vector<double> records;  // [records, fields]
};

/// `key`: everything that decides what the next step does, by the names users know.
void write_checkpoint(const std::string& path, const nlohmann::json& key, DType dtype, const CheckpointState& state,
                      std::int64_t fields, const CheckpointArrays& arrays);

/// A checkpoint that has been read; its arrays are looked at by take().
struct ReadCheckpoint {
  std::string path;
  DType dtype;
  TensorFile file;
  CheckpointState state;

  /// Checks all arrays, then copies them.
  void take(const CheckpointArrays& arrays) const;
};

/// Throws Error(invalid_argument) where it is of another key, naming the difference, those of `first` before others,
/// and Error(file_format) where it is damaged. What its state may be is checked by the caller.
ReadCheckpoint read_checkpoint(const std::string& path, const nlohmann::json& key, std::span<const char* const> first,
                               DType dtype, std::int64_t fields);

/// Throws Error(file_format).
[[noreturn]] void checkpoint_damaged(const std::string& path, const std::string& what);

/// Whether there is a file; throws Error(io) where that cannot be told.
bool checkpoint_exists(const std::string& path);
/// Throws Error(io) where its folder cannot be used: found out now rather than after the first epoch.
void check_checkpoint_folder(const std::string& path);

/// FNV-1a over 64-bit words: tells data sets apart, nothing more. Calls poll() often enough for a person.
template <class Poll>
std::uint64_t fingerprint(const void* data, std::size_t bytes, Poll poll) {
  constexpr std::size_t kPollBytes = std::size_t{1} << 24;
  std::uint64_t hash = 0xCBF29CE484222325ull;
  const auto* p = static_cast<const unsigned char*>(data);
  while (bytes >= 8) {
    poll();
    for (std::size_t words = std::min(bytes, kPollBytes) / 8; words > 0; --words, bytes -= 8, p += 8) {
      std::uint64_t word = 0;
      std::memcpy(&word, p, 8);
      hash = (hash ^ word) * 0x100000001B3ull;
      hash ^= hash >> 29;
    }
  }
  for (; bytes > 0; --bytes, ++p) hash = (hash ^ *p) * 0x100000001B3ull;
  return hash;
}

}  // namespace nvpflow
