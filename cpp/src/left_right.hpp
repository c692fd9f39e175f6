// Values that are replaced while other threads read them.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

#include "parallel.hpp"

namespace nvpflow {

/// A value in two copies, one of which readers use while the other is rewritten: readers never wait, lock or allocate
/// (Ramalhete and Correia, Brief announcement: Left-Right, PODC 2015).
template <class Value>
class LeftRight {
 public:
  /// A reader holds this while it reads.
  class Reading {
   public:
    explicit Reading(const LeftRight& owner)
        : slot_(owner.shared_.get().readers[static_cast<std::size_t>(owner.version_.load())][shard()].count) {
      slot_.fetch_add(1);
      value_ = owner.values_[static_cast<std::size_t>(owner.side_.load())].get();
    }
    ~Reading() { slot_.fetch_sub(1); }
    Reading(const Reading&) = delete;
    Reading& operator=(const Reading&) = delete;

    const Value& operator*() const { return *value_; }
    const Value* operator->() const { return value_; }

   private:
    std::atomic<std::int64_t>& slot_;
    const Value* value_;
  };

  template <class Make>
  explicit LeftRight(Make make) : values_{make(), nullptr} {}

  /// write: fills the side that no reader sees. make: a new Value, for the second rewrite. The first rewrite fills the
  /// constructor's Value, which has no readers yet, so that a value that never changes is kept once.
  template <class Make, class Write>
  void rewrite(Make make, Write write) {
    Shared& shared = shared_.get();
    const std::lock_guard<std::mutex> lock(shared.mutex);
    if (!written_) {
      write(*values_[0]);
      written_ = true;
      return;
    }
    const int hidden = 1 - side_.load();
    std::unique_ptr<Value>& value = values_[static_cast<std::size_t>(hidden)];
    if (value == nullptr) value = make();
    write(*value);
    side_.store(hidden);
    const int version = version_.load();
    wait_for_readers(shared, 1 - version);
    version_.store(1 - version);
    wait_for_readers(shared, version);
  }

  /// The visible side, to be changed only while there are no readers.
  Value& initial() { return *values_[0]; }

 private:
  static constexpr std::size_t kShards = 16;
  struct alignas(64) Count {
    std::atomic<std::int64_t> count{0};
  };

  /// Threads count on different cache lines, so that readers do not slow each other down.
  static std::size_t shard() {
    static std::atomic<std::size_t> next{0};
    thread_local const std::size_t mine = next.fetch_add(1) % kShards;
    return mine;
  }

  struct Shared {
    std::array<std::array<Count, kShards>, 2> readers{};
    std::mutex mutex;
  };

  static void wait_for_readers(const Shared& shared, int version) {
    for (const Count& c : shared.readers[static_cast<std::size_t>(version)]) {
      while (c.count.load() != 0) std::this_thread::yield();
    }
  }

  std::array<std::unique_ptr<Value>, 2> values_;
  std::atomic<int> side_{0};
  std::atomic<int> version_{0};
  bool written_ = false;
  mutable PerProcess<Shared> shared_;
};

}  // namespace nvpflow
