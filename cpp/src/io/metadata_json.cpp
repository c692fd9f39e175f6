#include "metadata_json.hpp"

#include <algorithm>
#include <cstddef>
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

constexpr std::size_t kMaxJsonDepth = 8;

/// Refuses what the parser takes: deep nesting, and a key twice in one object. A pass of its own, because the parser's
/// callbacks look through all elements of an array at the end of each object in it.
class Strict final : public json::json_sax_t {
 public:
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(std::size_t) override { return open(); }
  bool end_object() override { return close(); }
  bool start_array(std::size_t) override { return open(); }
  bool end_array() override { return close(); }
  bool key(string_t& name) override {
    if (keys_.back().insert(name).second) return true;
    throw Error(ErrorCode::file_format, "the key " + quote(name) + " appears twice in one object");
  }
  bool parse_error(std::size_t, const std::string&, const json::exception&) override { return false; }

 private:
  bool open() {
    if (keys_.size() >= kMaxJsonDepth) throw Error(ErrorCode::file_format, "the JSON is nested too deeply");
    keys_.emplace_back();
    return true;
  }
  bool close() {
    keys_.pop_back();
    return true;
  }

  std::vector<std::set<std::string>> keys_;  // of the objects that are open; empty for an array
};

}  // namespace

json parse_metadata_json(const std::string& text) {
  if (text.size() > kMaxJsonBytes) {
    throw Error(ErrorCode::file_format, "the text is " + std::to_string(text.size()) +
                                            " bytes long, expected at most " + std::to_string(kMaxJsonBytes));
  }
  Strict strict;
  // The parser takes a zero byte for the end of the text.
  if (text.find('\0') != std::string::npos || !json::sax_parse(text, &strict)) {
    throw Error(ErrorCode::file_format, "the text is not valid JSON");
  }
  return json::parse(text);
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
