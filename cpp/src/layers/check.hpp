// What the checks of fields share.
#pragma once

#include <cstdint>
#include <string>

#include <nvpflow/error.hpp>
#include <nvpflow/spec.hpp>

namespace nvpflow::layers {

// Far above any useful model, far below where sizes overflow: a wrong number fails with its name, not as bad_alloc.
constexpr std::int64_t kMaxSize = std::int64_t{1} << 20;  // of input, context and hidden layers

[[noreturn]] void refuse(const std::string& message);
/// "field is value, expected lowest to highest".
void check_range(const std::string& field, std::int64_t value, std::int64_t lowest, std::int64_t highest);
/// A number that is finite and > 0, also when it is rounded to dtype.
void check_positive(const std::string& field, double value, DType dtype);
/// An enumerator that has a name; prefix: "layers[3].".
template <class Enum>
void check_named(const std::string& prefix, Enum value) {
  try {
    name_of(value);
  } catch (const Error& error) {
    refuse(prefix + error.what());
  }
}
/// A number that is finite, also when it is rounded to dtype.
void check_finite(const std::string& field, double value, DType dtype);
/// As short as it reads back the same.
std::string text_of(double value);

}  // namespace nvpflow::layers
