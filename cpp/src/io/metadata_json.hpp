// JSON in the metadata of a file, which may come from anybody.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>
#include <nvpflow/error.hpp>

namespace nvpflow::io {

/// The longest text of a metadata value.
inline constexpr std::size_t kMaxJsonBytes = std::size_t{1} << 24;

/// The document that a metadata value holds. Error(file_format) where it is not JSON, repeats a key, is longer than 16
/// MiB or deeper than eight levels. Functions may therefore walk through it by recursion.
nlohmann::json parse_metadata_json(const std::string& text);

/// Error(file_format).
[[noreturn]] void fail_field(const std::string& field, const nlohmann::json& value, const std::string& expected);
/// The object has these keys and no other. `where` is empty for the document itself, else "layers[3]".
void check_keys(const nlohmann::json& object, const std::string& where, const std::vector<std::string_view>& keys);
std::int64_t integer_of(const nlohmann::json& value, const std::string& field);
double number_of(const nlohmann::json& value, const std::string& field);
const std::string& string_of(const nlohmann::json& value, const std::string& field);

/// parse(text), whose message begins with the field's name; prefix says of which object it is a field: "layers[3]." or
/// nothing.
template <class Parse>
auto name_from(const nlohmann::json& value, const std::string& prefix, const std::string& field, Parse parse) {
  const std::string& text = string_of(value, prefix + field);
  if (text.size() > 80) fail_field(prefix + field, value, "a known name");  // an error below quotes the whole text
  try {
    return parse(text);
  } catch (const Error& error) {
    throw Error(ErrorCode::file_format, prefix + error.what());
  }
}

}  // namespace nvpflow::io
