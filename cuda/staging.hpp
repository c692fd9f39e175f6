// Calls on arrays of the host: chunks of rows go through pinned memory to the device and back, while the device works
// on the chunk before. Arrays may be larger than the device's memory; what a call needs does not grow with its rows.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.hpp"
#include "runtime.hpp"

namespace nvpflow::cuda {

/// An array of the host with so many bytes a row; null: the call has none.
struct HostInput {
  const void* data = nullptr;
  std::int64_t row_bytes = 0;
  /// Where the device's rows are not the host's (row_bytes is theirs): makes `rows` of them, from first_row on.
  std::function<void(std::int64_t first_row, std::int64_t rows, void* to)> make = {};
};
struct HostOutput {
  void* data = nullptr;
  std::int64_t row_bytes = 0;
  /// The same, on the way back.
  std::function<void(std::int64_t first_row, std::int64_t rows, const void* from)> take = {};
};

/// Streams and buffers for one call at a time.
class Lane {
 public:
  static constexpr std::size_t kInputs = 5, kOutputs = 5;  // of a call, at most
  static constexpr std::size_t kContext = kInputs - 1;     // which of the inputs is the context
  static constexpr std::size_t kWeights = kInputs - 2;     // which are weights
  using Inputs = std::array<HostInput, kInputs>;
  using Outputs = std::array<HostOutput, kOutputs>;
  /// Where one chunk's rows are on the device; null where the call has no such array.
  struct Chunk {
    std::int64_t first_row = 0, rows = 0;
    std::array<const void*, kInputs> inputs{};
    std::array<void*, kOutputs> outputs{};
  };

  /// Rows of a chunk for arrays of so many bytes a row in all.
  static std::int64_t chunk_rows(std::int64_t rows, std::int64_t bytes_per_row);

  /// work(chunk) queues a chunk's launches on stream(). index: null, or the rows of the inputs to take. Returns when
  /// all results are there. threads: for the copies in the host's memory.
  void run(const Inputs& inputs, const Outputs& outputs, const std::int64_t* index, std::int64_t rows, int threads,
           const std::function<void(const Chunk&)>& work);

  Stream stream() const { return compute_; }
  /// Kept for the next call.
  void* workspace(std::int64_t bytes) { return workspace_.reserve(bytes, "the kernels' workspace"); }
  /// Device memory for a result that is not one value a row, kept for the next call.
  void* result(std::int64_t bytes) { return result_.reserve(bytes, "a result"); }
  /// Device memory for a context that is one for all rows, kept for the next call.
  void* context(std::int64_t bytes) { return context_.reserve(bytes, "a context"); }
  /// Device memory for two sums, kept for the next call; read_sum() waits for stream() and reads the first.
  double* sum() { return static_cast<double*>(sum_.reserve(2 * sizeof(double), "a sum")); }
  double read_sum();
  /// Copies of whole arrays, in chunks; they return when they are done.
  void send(void* device, const void* host, std::int64_t bytes);
  void receive(void* host, const void* device, std::int64_t bytes);

 private:
  static constexpr int kSlots = 3;
  struct Slot {
    Memory host_in{Memory::Kind::pinned}, host_out{Memory::Kind::pinned};
    Memory device_in{Memory::Kind::device}, device_out{Memory::Kind::device};
    OwnedEvent sent, computed, received;
    std::int64_t first_row = 0, rows = 0;  // rows > 0: results are on their way
  };
  struct Call;

  static void reserve(Slot& slot, const Call& call);
  void start(Slot& slot, const Call& call, bool alone);
  static void finish(Slot& slot, const Call& call);
  void abandon() noexcept;

  OwnedStream send_, compute_, receive_;
  std::array<Slot, kSlots> slots_;
  Memory workspace_{Memory::Kind::device}, result_{Memory::Kind::device}, sum_{Memory::Kind::device};
  Memory context_{Memory::Kind::device};
};

/// Lanes of one device, handed out to calls that run at the same time.
class Lanes {
 public:
  class Loan {
   public:
    explicit Loan(Lanes& owner);
    ~Loan();
    Loan(const Loan&) = delete;
    Loan& operator=(const Loan&) = delete;
    Lane* operator->() const { return lane_.get(); }
    Lane& operator*() const { return *lane_; }

   private:
    Lanes& owner_;
    std::unique_ptr<Lane> lane_;
  };

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Lane>> free_;
};

}  // namespace nvpflow::cuda
