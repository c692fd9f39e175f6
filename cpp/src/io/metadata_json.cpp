#include "metadata_json.hpp"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>
#include <nvpflow/error.hpp>

#include "messages.hpp"

namespace nvpflow::io {

using nlohmann::json;

namespace {

constexpr int kMaxJsonDepth = 8;

}  // namespace

json parse_metadata_json(const std::string& text) {
  if (text.size() > kMaxJsonBytes) {
    throw Error(ErrorCode::file_format, "the text is " + std::to_string(text.size()) +
                                            " bytes long, expected at most " + std::to_string(kMaxJsonBytes));
  }
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto check = [&](int depth, json::parse_event_t event, json& parsed) {
    using Event = json::parse_event_t;
    if ((event == Event::object_start || event == Event::array_start) && depth >= kMaxJsonDepth) {
      throw Error(ErrorCode::file_format, "the JSON is nested too deeply");
    }
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event == Event::key && !keys.back().insert(parsed.get_ref<const std::string&>()).second) {
      throw Error(ErrorCode::file_format,
                  "the key " + quote(parsed.get_ref<const std::string&>()) + " appears twice in one object");
    }
    return true;
  };
  json document = json::parse(text, check, /*allow_exceptions=*/false);
  // The parser takes a zero byte for the end of the text.
  if (document.is_discarded() || text.find('\0') != std::string::npos)
    throw Error(ErrorCode::file_format, "the text is not valid JSON");
  return document;
}

void fail_field(const std::string& field, const json& value, const std::string& expected) {
  throw Error(ErrorCode::file_format, field + " is " + quote(value.dump(-1, ' ', true)) + ", expected " + expected);
}

void check_keys(const json& object, const std::string& where, const std::vector<std::string_view>& keys) {
  const std::string prefix = where.empty() ? "" : where + ".";
  if (!object.is_object()) fail_field(where.empty() ? "the spec" : where, object, "an object");
  for (const std::string_view key : keys) {
    if (!object.contains(key)) throw Error(ErrorCode::file_format, prefix + std::string(key) + " is missing");
  }
  for (const auto& [key, value] : object.items()) {
    if (std::find(keys.begin(), keys.end(), key) == keys.end()) {
      throw Error(ErrorCode::file_format, prefix + quote(key) + " is not a field of this version of the format");
    }
  }
}

std::int64_t integer_of(const json& value, const std::string& field) {
  constexpr auto kLargest = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  if (!value.is_number_integer() || (value.is_number_unsigned() && value.get<std::uint64_t>() > kLargest)) {
    fail_field(field, value, "a whole number");
  }
  return value.get<std::int64_t>();
}

double number_of(const json& value, const std::string& field) {
  if (!value.is_number()) fail_field(field, value, "a number");
  return value.get<double>();
}

const std::string& string_of(const json& value, const std::string& field) {
  if (!value.is_string()) fail_field(field, value, "a string");
  return value.get_ref<const std::string&>();
}

}  // namespace nvpflow::io
