#include "staging.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include <nvpflow/error.hpp>

#include "../cpp/src/parallel.hpp"
#include "kernels.hpp"
#include "runtime.hpp"

namespace nvpflow::cuda {
namespace {

/// Below this much a copy in memory is not worth another thread.
constexpr std::int64_t kCopyBytesPerThread = 512 << 10;
constexpr std::int64_t kAlignment = 256;
constexpr std::int64_t kLeast = 64 << 10;

std::int64_t padded(std::int64_t bytes) { return round_up(bytes, kAlignment); }

unsigned char* at(void* base, std::int64_t bytes) { return static_cast<unsigned char*>(base) + bytes; }
const unsigned char* at(const void* base, std::int64_t bytes) {
  return static_cast<const unsigned char*>(base) + bytes;
}

void copy(void* to, const void* from, std::int64_t bytes, int threads) {
  parallel_for(bytes, kCopyBytesPerThread, threads, [&](std::int64_t begin, std::int64_t end) {
    std::memcpy(at(to, begin), at(from, begin), static_cast<std::size_t>(end - begin));
  });
}

}  // namespace

/// What all chunks of a call share.
struct Lane::Call {
  const Inputs& inputs;
  const Outputs& outputs;
  const std::int64_t* index;
  int threads;
  std::int64_t chunk = 0;                   // rows
  std::array<bool, kInputs> direct_in{};    // pinned by the caller: copied from where it is
  std::array<bool, kOutputs> direct_out{};  // the same
  const std::function<void(const Chunk&)>& work;

  std::int64_t in_bytes() const {
    std::int64_t bytes = 0;
    for (const HostInput& in : inputs) bytes += in.data == nullptr ? 0 : padded(in.row_bytes * chunk);
    return bytes;
  }
  std::int64_t out_bytes() const {
    std::int64_t bytes = 0;
    for (const HostOutput& out : outputs) bytes += out.data == nullptr ? 0 : padded(out.row_bytes * chunk);
    return bytes;
  }
};

std::int64_t Lane::chunk_rows(std::int64_t rows, std::int64_t bytes_per_row) {
  const std::int64_t most = std::max<std::int64_t>(256, chunk_bytes() / std::max<std::int64_t>(1, bytes_per_row));
  return std::min(rows, most / 256 * 256);
}

void Lane::reserve(Slot& slot, const Call& call) {
  // In powers of two, so that calls that grow row by row do not allocate each time.
  const auto rounded = [](std::int64_t bytes) {
    return bytes == 0 ? 0
                      : static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(std::max(bytes, kLeast))));
  };
  const std::int64_t in = rounded(call.in_bytes()), out = rounded(call.out_bytes());
  slot.host_in.reserve(in, "staging rows");
  slot.device_in.reserve(in, "a chunk of rows");
  slot.host_out.reserve(out, "staging results");
  slot.device_out.reserve(out, "a chunk of results");
}

void Lane::run(const Inputs& inputs, const Outputs& outputs, const std::int64_t* index, std::int64_t rows, int threads,
               const std::function<void(const Chunk&)>& work) {
  Call call{inputs, outputs, index, threads, 0, {}, {}, work};
  std::int64_t row_bytes = 0;
  for (std::size_t i = 0; i < kInputs; ++i) {
    if (inputs[i].data == nullptr) continue;
    row_bytes += inputs[i].row_bytes;
    call.direct_in[i] = index == nullptr && !inputs[i].make && is_pinned(inputs[i].data);
  }
  for (std::size_t i = 0; i < kOutputs; ++i) {
    if (outputs[i].data == nullptr) continue;
    row_bytes += outputs[i].row_bytes;
    call.direct_out[i] = !outputs[i].take && is_pinned(outputs[i].data);
  }
  call.chunk = chunk_rows(rows, row_bytes);
  const bool alone = call.chunk == rows;
  try {
    int next = 0;
    for (std::int64_t first = 0; first < rows; first += call.chunk, next = (next + 1) % kSlots) {
      Slot& slot = slots_[static_cast<std::size_t>(next)];
      finish(slot, call);
      reserve(slot, call);
      slot.first_row = first;
      slot.rows = std::min(call.chunk, rows - first);
      start(slot, call, alone);
    }
    for (int i = 0; i < kSlots; ++i, next = (next + 1) % kSlots) finish(slots_[static_cast<std::size_t>(next)], call);
  } catch (...) {
    abandon();
    throw;
  }
}

/// The caller's memory and the slots must not be in use any more when an error leaves the call.
void Lane::abandon() noexcept {
  for (Slot& slot : slots_) slot.rows = 0;
  for (const OwnedStream* stream : {&send_, &compute_, &receive_}) {
    try {
      synchronize(static_cast<Stream>(*stream));
    } catch (const Error&) {  // the one on its way out says more
    }
  }
}

void Lane::start(Slot& slot, const Call& call, bool alone) {
  const Stream sending = alone ? compute_ : send_, receiving = alone ? compute_ : receive_;
  Chunk chunk;
  chunk.first_row = slot.first_row;
  chunk.rows = slot.rows;
  std::int64_t offset = 0;
  for (std::size_t i = 0; i < kInputs; ++i) {
    const HostInput& in = call.inputs[i];
    if (in.data == nullptr) continue;
    void* device = at(slot.device_in.data(), offset);
    void* staged = at(slot.host_in.data(), offset);
    const void* from = staged;
    if (call.direct_in[i]) {
      from = at(in.data, slot.first_row * in.row_bytes);
    } else if (in.make) {
      in.make(slot.first_row, slot.rows, staged);
    } else if (call.index == nullptr) {
      copy(staged, at(in.data, slot.first_row * in.row_bytes), slot.rows * in.row_bytes, call.threads);
    } else {
      for (std::int64_t r = 0; r < slot.rows; ++r) {
        std::memcpy(at(staged, r * in.row_bytes), at(in.data, call.index[slot.first_row + r] * in.row_bytes),
                    static_cast<std::size_t>(in.row_bytes));
      }
    }
    copy_to_device(device, from, slot.rows * in.row_bytes, sending);
    chunk.inputs[i] = device;
    offset += padded(in.row_bytes * call.chunk);
  }
  if (!alone) {
    record(slot.sent, send_);
    wait(compute_, slot.sent);
  }
  offset = 0;
  for (std::size_t i = 0; i < kOutputs; ++i) {
    if (call.outputs[i].data == nullptr) continue;
    chunk.outputs[i] = at(slot.device_out.data(), offset);
    offset += padded(call.outputs[i].row_bytes * call.chunk);
  }
  call.work(chunk);
  if (!alone) {
    record(slot.computed, compute_);
    wait(receive_, slot.computed);
  }
  offset = 0;
  for (std::size_t i = 0; i < kOutputs; ++i) {
    const HostOutput& out = call.outputs[i];
    if (out.data == nullptr) continue;
    void* to = call.direct_out[i] ? at(out.data, slot.first_row * out.row_bytes) : at(slot.host_out.data(), offset);
    copy_to_host(to, chunk.outputs[i], slot.rows * out.row_bytes, receiving);
    offset += padded(out.row_bytes * call.chunk);
  }
  record(slot.received, receiving);
}

void Lane::finish(Slot& slot, const Call& call) {
  if (slot.rows == 0) return;
  synchronize(static_cast<Event>(slot.received));
  std::int64_t offset = 0;
  for (std::size_t i = 0; i < kOutputs; ++i) {
    const HostOutput& out = call.outputs[i];
    if (out.data == nullptr) continue;
    if (out.take) {
      out.take(slot.first_row, slot.rows, at(slot.host_out.data(), offset));
    } else if (!call.direct_out[i]) {
      copy(at(out.data, slot.first_row * out.row_bytes), at(slot.host_out.data(), offset), slot.rows * out.row_bytes,
           call.threads);
    }
    offset += padded(out.row_bytes * call.chunk);
  }
  slot.rows = 0;
}

double Lane::read_sum() {
  double value = 0;
  receive(&value, sum_.data(), sizeof value);
  return value;
}

void Lane::send(void* device, const void* host, std::int64_t bytes) {
  const std::int64_t chunk = std::min(bytes, chunk_bytes());
  for (std::int64_t done = 0; done < bytes; done += chunk) {
    const std::int64_t here = std::min(chunk, bytes - done);
    void* staged = slots_[0].host_in.reserve(chunk, "staging rows");
    std::memcpy(staged, at(host, done), static_cast<std::size_t>(here));
    copy_to_device(at(device, done), staged, here, compute_);
    synchronize(static_cast<Stream>(compute_));
  }
}

void Lane::receive(void* host, const void* device, std::int64_t bytes) {
  const std::int64_t chunk = std::min(bytes, chunk_bytes());
  for (std::int64_t done = 0; done < bytes; done += chunk) {
    const std::int64_t here = std::min(chunk, bytes - done);
    void* staged = slots_[0].host_out.reserve(chunk, "staging results");
    copy_to_host(staged, at(device, done), here, compute_);
    synchronize(static_cast<Stream>(compute_));
    std::memcpy(at(host, done), staged, static_cast<std::size_t>(here));
  }
}

Lanes::Loan::Loan(Lanes& owner) : owner_(owner) {
  {
    const std::lock_guard<std::mutex> lock(owner_.mutex_);
    if (!owner_.free_.empty()) {
      lane_ = std::move(owner_.free_.back());
      owner_.free_.pop_back();
    }
  }
  if (lane_ == nullptr) lane_ = std::make_unique<Lane>();
}

Lanes::Loan::~Loan() {
  const std::lock_guard<std::mutex> lock(owner_.mutex_);
  owner_.free_.push_back(std::move(lane_));
}

}  // namespace nvpflow::cuda
