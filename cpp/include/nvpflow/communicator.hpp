/// @file
/// What the processes of one training run exchange.
#pragma once

#include <cstdint>
#include <span>
#include <utility>

#include <nvpflow/export.h>
#include <nvpflow/error.hpp>

namespace nvpflow {

/// The collective operations of fit(). Every process makes the same calls in the same order, on arrays of the same
/// sizes. Only integers travel, whose sums are exact. So neither the order in which an engine adds nor the number of
/// processes shows in a result. MPI, gloo, NCCL and others have both operations.
///
/// An exception that a member throws passes through fit() of that process alone.
class NVPFLOW_API Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;  ///< of this process, from 0
  virtual int size() const = 0;  ///< processes
  /// Each value becomes the sum of those of all processes.
  virtual void sum(std::span<std::int64_t> values) = 0;
  /// Each value becomes the largest of those of all processes.
  virtual void max(std::span<std::int64_t> values) = 0;
};

/// The rows [first, second) of process `rank` of `size`, of `rows` in all that are cut into `shards` consecutive parts.
/// Throws Error(invalid_argument) where there are fewer shards than processes, or a number is not possible.
NVPFLOW_API std::pair<std::int64_t, std::int64_t> rows_of_process(std::int64_t rows, std::int64_t shards, int rank,
                                                                  int size);

/// Takes part in the first exchange of a fit() that this process cannot begin, so that the others do not wait for it.
/// Throws `error` here; the others throw it, too, with this process's rank. Returns where there are no others.
NVPFLOW_API void fail_together(Communicator& communicator, const Error& error);

}  // namespace nvpflow
