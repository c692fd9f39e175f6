#include "messages.hpp"

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <nvpflow/error.hpp>

namespace nvpflow::io {

std::string quote(std::string_view text) {
  constexpr std::size_t kLongest = 80;
  std::string quoted = "'";
  for (const char c : text.substr(0, kLongest)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      quoted += c;
    } else {
      constexpr const char* kDigits = "0123456789abcdef";
      quoted.append("\\x").append(1, kDigits[byte >> 4]).append(1, kDigits[byte & 15]);
    }
  }
  return quoted + (text.size() > kLongest ? "..'" : "'");
}

std::string text_of(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (const std::int64_t extent : shape) text.append(text.size() > 1 ? ", " : "").append(std::to_string(extent));
  return text + "]";
}

void fail_io(const std::string& path, const std::string& what, int error) {
  throw Error(ErrorCode::io, path + ": " + what + ": " + std::generic_category().message(error), error);
}

void fail_format(const std::string& path, const std::string& what) {
  throw Error(ErrorCode::file_format, path + ": " + what);
}

void fail_memory(const std::string& path, std::uint64_t bytes) {
  throw Error(ErrorCode::out_of_memory, path + ": no memory for " + std::to_string(bytes) + " bytes of tensor data");
}

}  // namespace nvpflow::io
