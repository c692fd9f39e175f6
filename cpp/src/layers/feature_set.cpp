#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <nvpflow/layers.hpp>

namespace nvpflow {
namespace {

/// A set of features by name: first, first + step, ... before end.
struct Span {
  std::int64_t first, step, end;
};

Span span_of(FeatureSet::Name name, std::int64_t input_size) {
  switch (name) {
    case FeatureSet::Name::first_half:
      return {0, 1, input_size / 2};
    case FeatureSet::Name::second_half:
      return {input_size / 2, 1, input_size};
    case FeatureSet::Name::even:
      return {0, 2, input_size};
    case FeatureSet::Name::odd:
      return {1, 2, input_size};
    case FeatureSet::Name::all:
      return {0, 1, input_size};
    case FeatureSet::Name::indices:
      break;
  }
  return {0, 1, 0};
}

}  // namespace

std::vector<std::int64_t> FeatureSet::of(std::int64_t input_size) const {
  if (name == Name::indices) return indices;
  std::vector<std::int64_t> members;
  const Span span = span_of(name, input_size);
  members.reserve(static_cast<std::size_t>(count(input_size)));
  for (std::int64_t i = span.first; i < span.end; i += span.step) members.push_back(i);
  return members;
}

std::int64_t FeatureSet::count(std::int64_t input_size) const {
  if (name == Name::indices) return static_cast<std::int64_t>(indices.size());
  const Span span = span_of(name, input_size);
  return std::max<std::int64_t>(0, (span.end - span.first + span.step - 1) / span.step);
}

}  // namespace nvpflow
