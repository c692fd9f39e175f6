// Names of devices, precisions and ways to store weights.

#include <nvpflow/device.hpp>

#include <charconv>
#include <string>
#include <string_view>
#include <system_error>

#include <nvpflow/error.hpp>

namespace nvpflow {

std::string name_of(const Device& device) {
  return device.kind == DeviceKind::cpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

std::string_view name_of(Precision precision) {
  switch (precision) {
    case Precision::tf32:
      return "tf32";
    case Precision::bfloat16:
      return "bfloat16";
    default:
      return "float32";
  }
}

std::string_view name_of(Weights weights) { return weights == Weights::bfloat16 ? "bfloat16" : "full"; }

Device parse_device(std::string_view name) {
  if (name == "cpu") return {};
  if (name == "cuda") return {DeviceKind::cuda, 0};
  constexpr std::string_view kPrefix = "cuda:";
  if (name.starts_with(kPrefix)) {
    const std::string_view digits = name.substr(kPrefix.size());
    int index = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), index);
    if (error == std::errc() && end == digits.data() + digits.size() && index >= 0) return {DeviceKind::cuda, index};
  }
  throw Error(ErrorCode::invalid_argument,
              "device is '" + std::string(name) + "', expected 'cpu', 'cuda' or 'cuda:N' with N from 0");
}

Precision parse_precision(std::string_view name) {
  for (const Precision p : {Precision::float32, Precision::tf32, Precision::bfloat16}) {
    if (name == name_of(p)) return p;
  }
  throw Error(ErrorCode::invalid_argument,
              "precision is '" + std::string(name) + "', expected 'float32', 'tf32' or 'bfloat16'");
}

Weights parse_weights(std::string_view name) {
  for (const Weights w : {Weights::full, Weights::bfloat16}) {
    if (name == name_of(w)) return w;
  }
  throw Error(ErrorCode::invalid_argument, "weights is '" + std::string(name) + "', expected 'full' or 'bfloat16'");
}

}  // namespace nvpflow
