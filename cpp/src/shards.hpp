// The shards of a training run, and what the processes that share them agree on.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nvpflow/communicator.hpp>

namespace nvpflow {

/// Thrown through the preparation of a fit when the observer asks to stop.
struct Stopped {};

/// A training run cut into shards, of which this process has some; or, without shards, a run of one process, where
/// nothing is exchanged and every value is what went in.
///
/// What is summed over shards is summed exactly, as integers: the result does not depend on who has which shard. Every
/// member but the constructor and those that are const is a collective operation: all processes call it.
class Shards {
 public:
  /// shards: 0 or 1 for none. Throws Error(invalid_argument) where that does not suit the processes.
  Shards(Communicator* communicator, std::int64_t shards);

  bool on() const { return count_ > 1; }
  std::int64_t count() const { return count_; }
  int rank() const { return together_->rank(); }
  int size() const { return together_->size(); }
  /// The shards [first, second) of this process.
  std::pair<std::int64_t, std::int64_t> own() const;
  Communicator& together() { return *together_; }

  /// f() in every process. An error or a stop in one becomes that of all; another process's message says whose it is.
  template <class F>
  void all(F&& f) {
    if (!on()) return f();
    std::exception_ptr error;
    bool stopped = false;
    try {
      f();
    } catch (const Stopped&) {
      stopped = true;
    } catch (...) {
      error = std::current_exception();
    }
    agree(error, stopped);
  }
  /// Throws in every process where one has an error, or Stopped where one stopped.
  void agree(const std::exception_ptr& error, bool stopped);
  /// Whether one process says so.
  bool any(bool here);

  /// Throws Error(invalid_argument) in every process where one has another value than the rest. `what`: "seed differs
  /// among the processes; ...".
  struct Agreement {
    std::string what;
    std::uint64_t value;
  };
  void require_same(const std::vector<Agreement>& values);

  /// The rows of all processes, each of which must have those of its shards.
  std::int64_t total_rows(const char* name, std::int64_t own_rows);
  /// Rows of this process's shards, of so many in all: where each begins, and the end.
  std::vector<std::int64_t> bounds(std::int64_t total) const;

  /// Of every shard, in order, from the values of this process's.
  std::vector<std::int64_t> of_all(std::span<const std::int64_t> own);
  std::int64_t sum(std::int64_t value);
  double max(double value);
  /// The sums of [shards][width] values, of which this process has those of its own shards.
  std::vector<double> sums(std::span<const double> own, std::size_t width);
  double sum(std::span<const double> own) { return sums(own, 1).front(); }

  /// Arrays of different lengths, by shard, one behind the other: [sum of lengths] doubles with their bits.
  std::vector<double> gather(std::span<const double> own, const std::vector<std::int64_t>& lengths);

 private:
  std::int64_t count_;
  Communicator* together_;
};

}  // namespace nvpflow
