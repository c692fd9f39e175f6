// Names of enumerators: the tables behind name_of() and the parsers.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>

#include <nvpflow/error.hpp>

#include "io/messages.hpp"

namespace nvpflow {

template <class Enum, std::size_t N>
using Names = std::array<std::pair<Enum, std::string_view>, N>;

template <class Enum, std::size_t N>
std::string list_of(const Names<Enum, N>& names) {
  std::string list;
  for (const auto& [value, name] : names) list.append(list.empty() ? "" : ", ").append(name);
  return list;
}

template <class Enum, std::size_t N>
std::string_view find_name(const Names<Enum, N>& names, Enum value, const char* field) {
  for (const auto& [known, name] : names) {
    if (known == value) return name;
  }
  throw Error(ErrorCode::invalid_argument, std::string(field) + " is the enumerator " +
                                               std::to_string(static_cast<int>(value)) + ", expected one of " +
                                               list_of(names));
}

template <class Enum, std::size_t N>
Enum find_value(const Names<Enum, N>& names, std::string_view text, const char* field) {
  for (const auto& [value, name] : names) {
    if (name == text) return value;
  }
  throw Error(ErrorCode::invalid_argument,
              std::string(field) + " is " + io::quote(text) + ", expected one of " + list_of(names));
}

}  // namespace nvpflow
