// Open files, and calls of the system that a signal may interrupt.
#pragma once

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <string>
#include <utility>

namespace nvpflow::io {

/// Bytes per read or write; Linux stops short of 2^31.
inline constexpr std::size_t kMaxTransfer = std::size_t{1} << 30;

/// Error(invalid_argument) where it cannot name a file.
void check_path(const std::string& path);
/// Error(io) unless it is a regular file.
void check_regular(const std::string& path, const struct stat& status);

/// The call's result, once no signal interrupts it.
template <class Call>
auto uninterrupted(Call call) {
  for (;;) {
    const auto result = call();
    if (result >= 0 || errno != EINTR) return result;
  }
}

/// An open file; closed with it.
class Descriptor {
 public:
  explicit Descriptor(int number) : number_(number) {}
  ~Descriptor() { close(); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  int number() const { return number_; }
  /// 0, or -1 and errno. A signal does no harm: Linux has given the number back by then, and a second try might close a
  /// file that another thread has just opened.
  int close() {
    if (number_ < 0 || ::close(std::exchange(number_, -1)) == 0 || errno == EINTR) return 0;
    return -1;
  }

 private:
  int number_;
};

}  // namespace nvpflow::io
