// How messages about files name what they met.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace nvpflow::io {

/// Text from a file, safe to print: ASCII, one line, not endless.
std::string quote(std::string_view text);
/// "[3, 4]".
std::string text_of(const std::vector<std::int64_t>& shape);

/// Error(io) with the system's error number.
[[noreturn]] void fail_io(const std::string& path, const std::string& what, int error);
/// Error(file_format).
[[noreturn]] void fail_format(const std::string& path, const std::string& what);
/// Error(out_of_memory).
[[noreturn]] void fail_memory(const std::string& path, std::uint64_t bytes);

}  // namespace nvpflow::io
