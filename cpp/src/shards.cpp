#include "shards.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <nvpflow/communicator.hpp>
#include <nvpflow/error.hpp>

#include "exact_sum.hpp"

namespace nvpflow {
namespace {

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

/// One process.
class Alone final : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  void sum(std::span<std::int64_t>) override {}
  void max(std::span<std::int64_t>) override {}
};

Communicator* alone() {
  static Alone one;
  return &one;
}

/// factor * part / parts, where the product may not fit.
std::int64_t share(std::int64_t value, std::int64_t part, std::int64_t parts) {
  return value / parts * part + value % parts * part / parts;
}

/// A message as words that a collective adds to zeros.
constexpr std::size_t kMessageBytes = 2048;
constexpr std::size_t kWords = kMessageBytes / sizeof(std::int64_t) + 1;  // the first one is the error's code

struct Failure {
  ErrorCode code = ErrorCode::unavailable;
  std::string message;
};

Failure describe(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const Error& e) {
    return {e.code(), e.what()};
  } catch (const std::exception& e) {
    return {ErrorCode::unavailable, e.what()};
  } catch (...) {
    return {ErrorCode::unavailable, "an error of a kind that is not known"};
  }
}

/// What is told of a message: without the trace that Python's errors bring, and no half characters of UTF-8.
std::size_t told_bytes(const std::string& message) {
  std::size_t bytes = std::min({message.size(), message.find("\n\nAt:"), kMessageBytes - 1});
  while (bytes > 0 && bytes < message.size() && (static_cast<unsigned char>(message[bytes]) & 0xC0u) == 0x80u) --bytes;
  return bytes;
}

/// from_last: the number of processes from the first that failed on; 0: none did. Throws this process's error, or that
/// of the other one.
void tell_failure(Communicator& communicator, std::int64_t from_last, const std::exception_ptr& error) {
  if (from_last == 0) return;
  const std::int64_t whose = communicator.size() - from_last;
  std::vector<std::int64_t> message(kWords);
  if (whose == communicator.rank()) {
    const Failure own = describe(error);
    // An error of the system comes with a number, which others do not have.
    message[0] = static_cast<std::int64_t>(own.code == ErrorCode::io ? ErrorCode::unavailable : own.code);
    std::memcpy(message.data() + 1, own.message.data(), told_bytes(own.message));
  }
  communicator.sum(message);
  if (error) std::rethrow_exception(error);
  throw Error(static_cast<ErrorCode>(message[0]),
              "process " + std::to_string(whose) + " of " + std::to_string(communicator.size()) +
                  ", counted from 0, stopped: " + reinterpret_cast<const char*>(message.data() + 1));
}

constexpr std::int64_t kNoShards = -(std::int64_t{1} << 40);  // below all numbers of shards and their negatives

}  // namespace

std::pair<std::int64_t, std::int64_t> rows_of_process(std::int64_t rows, std::int64_t shards, int rank, int size) {
  if (rows < 0) fail("rows is " + std::to_string(rows) + ", expected at least 0");
  if (size < 1 || rank < 0 || rank >= size) {
    fail("rank is " + std::to_string(rank) + " of " + std::to_string(size) +
         " processes, expected at least one process, and ranks from 0 below their number");
  }
  constexpr std::int64_t kMostShards = 1 << 20;
  if (shards < size || shards > kMostShards) {
    fail("shards is " + std::to_string(shards) + ", expected at least one for each of " + std::to_string(size) +
         " processes and at most " + std::to_string(kMostShards));
  }
  return {share(rows, share(shards, rank, size), shards), share(rows, share(shards, rank + 1, size), shards)};
}

void fail_together(Communicator& communicator, const Error& error) {
  if (communicator.size() == 1) return;
  std::int64_t words[] = {communicator.size() - communicator.rank(), kNoShards, kNoShards};
  communicator.max(words);
  tell_failure(communicator, words[0], std::make_exception_ptr(error));
}

Shards::Shards(Communicator* communicator, std::int64_t shards)
    : count_(std::max<std::int64_t>(shards, 1)), together_(communicator != nullptr ? communicator : alone()) {
  if (together_->size() > 1) {
    std::int64_t words[] = {0, shards, -shards};
    together_->max(words);
    tell_failure(*together_, words[0], nullptr);
    if (words[1] != -words[2]) {
      fail("shards is " + std::to_string(-words[2]) + " in one process and " + std::to_string(words[1]) +
           " in another, expected the same number in all");
    }
  }
  if (shards == 0 && together_->size() > 1) {
    fail("shards is 0 beside " + std::to_string(together_->size()) +
         " processes, expected a number of shards that they share, at least one for each");
  }
  (void)rows_of_process(0, count_, together_->rank(), together_->size());  // throws
}

std::pair<std::int64_t, std::int64_t> Shards::own() const {
  return {share(count_, rank(), size()), share(count_, rank() + 1, size())};
}

void Shards::agree(const std::exception_ptr& error, bool stopped) {
  if (!on()) {
    if (error) std::rethrow_exception(error);
    if (stopped) throw Stopped();
    return;
  }
  std::int64_t words[] = {error ? size() - rank() : 0, stopped ? 1 : 0};
  together_->max(words);
  if (words[0] == 0 && words[1] > 0) throw Stopped();
  tell_failure(*together_, words[0], error);
}

bool Shards::any(bool here) { return on() ? sum(here ? 1 : 0) > 0 : here; }

void Shards::require_same(const std::vector<Agreement>& values) {
  if (!on()) return;
  // The largest of the values, and of what is left of 2^62: equal where all are.
  constexpr std::int64_t kMask = (std::int64_t{1} << 62) - 1;
  std::vector<std::int64_t> words;
  for (const Agreement& of : values) {
    const std::int64_t value = static_cast<std::int64_t>(of.value) & kMask;
    words.push_back(value), words.push_back(kMask - value);
  }
  together_->max(words);
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (words[2 * i] != kMask - words[2 * i + 1]) fail(values[i].what);
  }
}

std::int64_t Shards::total_rows(const char* name, std::int64_t own_rows) {
  if (!on()) return own_rows;
  const std::int64_t total = sum(own_rows);
  const auto [begin, end] = rows_of_process(total, count_, rank(), size());
  const std::int64_t expected = end - begin, first = begin;
  all([&] {
    if (own_rows == expected) return;
    fail(std::string(name) + " has " + std::to_string(own_rows) + " rows in process " + std::to_string(rank()) +
         " of " + std::to_string(size()) + ", expected " + std::to_string(expected) + ", from row " +
         std::to_string(first) + " of the " + std::to_string(total) + " of all on: its part of " +
         std::to_string(count_) + " shards; rows_of_process names it");
  });
  return total;
}

std::vector<std::int64_t> Shards::bounds(std::int64_t total) const {
  std::vector<std::int64_t> found;
  const auto [first, last] = own();
  const std::int64_t begin = share(total, first, count_);
  for (std::int64_t shard = first; shard <= last; ++shard) found.push_back(share(total, shard, count_) - begin);
  return found;
}

std::vector<std::int64_t> Shards::of_all(std::span<const std::int64_t> own_values) {
  std::vector<std::int64_t> all_values(static_cast<std::size_t>(count_));
  std::copy(own_values.begin(), own_values.end(), all_values.begin() + own().first);
  if (on()) together_->sum(all_values);
  return all_values;
}

std::int64_t Shards::sum(std::int64_t value) {
  if (on()) together_->sum({&value, 1});
  return value;
}

double Shards::max(double value) {
  if (!on()) return value;
  std::int64_t word = ordered(value);
  together_->max({&word, 1});
  return from_ordered(word);
}

std::vector<double> Shards::sums(std::span<const double> own_values, std::size_t width) {
  if (!on()) return {own_values.begin(), own_values.end()};
  // The last word counts what is not finite.
  std::vector<std::int64_t> exponents(width, kLeastExponent), words(width + 1);
  for (std::size_t i = 0; i < own_values.size(); ++i) {
    exponents[i % width] = std::max(exponents[i % width], exponent_of(own_values[i]));
  }
  together_->max(exponents);
  const std::int64_t bits = bits_of_addend(count_);
  for (std::size_t i = 0; i < own_values.size(); ++i) {
    const bool finite = std::isfinite(own_values[i]);
    words[width] += finite ? 0 : 1;
    const double scaled = std::ldexp(own_values[i], static_cast<int>(bits - exponents[i % width]));
    words[i % width] += finite ? std::llrint(scaled) : 0;
  }
  together_->sum(words);
  std::vector<double> found(width, std::numeric_limits<double>::quiet_NaN());
  for (std::size_t j = 0; words[width] == 0 && j < width; ++j) {
    found[j] = std::ldexp(static_cast<double>(words[j]), static_cast<int>(exponents[j] - bits));
  }
  return found;
}

std::vector<double> Shards::gather(std::span<const double> own_values, const std::vector<std::int64_t>& lengths) {
  const std::int64_t before = std::accumulate(lengths.begin(), lengths.begin() + own().first, std::int64_t{0});
  const std::int64_t total = std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0});
  std::vector<std::int64_t> words(static_cast<std::size_t>(total));
  for (std::size_t i = 0; i < own_values.size(); ++i) {
    words[static_cast<std::size_t>(before) + i] = std::bit_cast<std::int64_t>(own_values[i]);
  }
  if (on()) together_->sum(words);
  std::vector<double> found(words.size());
  std::transform(words.begin(), words.end(), found.begin(),
                 [](std::int64_t word) { return std::bit_cast<double>(word); });
  return found;
}

}  // namespace nvpflow
