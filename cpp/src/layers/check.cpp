#include "check.hpp"

#include <charconv>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include <nvpflow/error.hpp>
#include <nvpflow/spec.hpp>

namespace nvpflow::layers {

void refuse(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

void check_range(const std::string& field, std::int64_t value, std::int64_t lowest, std::int64_t highest) {
  if (value >= lowest && value <= highest) return;
  refuse(field + " is " + std::to_string(value) + ", expected " + std::to_string(lowest) + " to " +
         std::to_string(highest));
}

namespace {

double highest(DType dtype) {
  return dtype == DType::float32 ? double{std::numeric_limits<float>::max()} : std::numeric_limits<double>::max();
}

}  // namespace

void check_positive(const std::string& field, double value, DType dtype) {
  // 1e300 would be infinite and 1e-300 zero in float32.
  const bool narrow = dtype == DType::float32;
  const double lowest = narrow ? double{std::numeric_limits<float>::min()} : std::numeric_limits<double>::min();
  if (value >= lowest && value <= highest(dtype)) return;  // false for NaN
  refuse(field + " is " + text_of(value) + ", expected finite and > 0 in " + std::string(name_of(dtype)));
}

void check_finite(const std::string& field, double value, DType dtype) {
  if (std::abs(value) <= highest(dtype)) return;  // false for NaN
  refuse(field + " is " + text_of(value) + ", expected finite in " + std::string(name_of(dtype)));
}

std::string text_of(double value) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof text, value).ptr};
}

}  // namespace nvpflow::layers
