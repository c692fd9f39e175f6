// What options of training may be, for messages that name them.
#pragma once

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <type_traits>

#include <nvpflow/error.hpp>
#include <nvpflow/train.hpp>

namespace nvpflow::options {

inline std::string short_text(double value) {
  std::ostringstream text;
  text.precision(3);
  text << value;
  return text.str();
}

inline void require(bool good, const char* name, const std::string& value, const char* expected) {
  if (good) return;
  throw Error(ErrorCode::invalid_argument, std::string(name) + " is " + value + ", expected " + expected);
}

inline void check(const char* name, double value, const OptionRange* range) {
  require(range->holds(value), name, short_text(value), range->expected);
}
inline void check(const char* name, std::int64_t value, const OptionRange* range) {
  require(range->holds(static_cast<double>(value)), name, std::to_string(value), range->expected);
}
inline void check(const char* name, int value, const OptionRange* range) { check(name, std::int64_t{value}, range); }
inline void check(const char* name, const std::optional<double>& value, const OptionRange* range) {
  if (value.has_value()) check(name, *value, range);
}
inline void check(const char*, std::uint64_t, const OptionRange*) {}
inline void check(const char*, bool, const OptionRange*) {}
inline void check(const char*, const std::string&, const OptionRange*) {}
/// An enumerator, whose name_of() throws for another one.
template <class Choice>
  requires std::is_enum_v<Choice>
void check(const char*, Choice choice, const OptionRange*) {
  (void)name_of(choice);
}

/// Every field of Options.
template <class Options>
void check_all(const Options& options) {
  Options::fields(
      [&](const char* name, auto member, const OptionRange* range) { check(name, options.*member, range); });
}

}  // namespace nvpflow::options
