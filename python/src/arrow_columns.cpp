#include "arrow_columns.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

#include <nvpflow/error.hpp>

#include "arrow.h"

namespace nvpflow::python {
namespace {

using arrow::ArrowArray;
using arrow::ArrowArrayStream;
using arrow::ArrowSchema;

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

/// Releases a stream, also where reading it fails.
class Stream {
 public:
  explicit Stream(ArrowArrayStream& stream) : stream_(stream) {
    if (stream_.release == nullptr) fail("table gave an Arrow stream that was used before, expected a new one");
  }
  ~Stream() { stream_.release(&stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  void schema(ArrowSchema* out) { require(stream_.get_schema(&stream_, out)); }
  void next(ArrowArray* out) { require(stream_.get_next(&stream_, out)); }

 private:
  void require(int error) {
    if (error == 0) return;
    const char* said = stream_.get_last_error(&stream_);
    fail(std::string("table's Arrow stream failed: ") +
         (said != nullptr ? said : std::generic_category().message(error)));
  }

  ArrowArrayStream& stream_;
};

/// IEEE's 16 bits.
struct Half {
  std::uint16_t bits;

  explicit operator double() const {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double size = 0;
    if (exponent == 31) {
      size = fraction == 0 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
    } else {
      size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    }
    return (bits & 0x8000) != 0 ? -size : size;
  }
  explicit operator float() const { return static_cast<float>(static_cast<double>(*this)); }
};

bool bit_at(const void* bits, std::int64_t i) {
  return (static_cast<const std::uint8_t*>(bits)[i >> 3] >> (i & 7) & 1) != 0;
}

/// A column of one batch, from the batch's first row on.
struct Column {
  char format;
  const void* values;
  const void* valid;  // a bit for each row; null: no nulls
  std::int64_t offset;
};

/// Where the numbers of a column go: every `stride` elements, and whether one has become infinite.
template <class T>
struct Place {
  T* to;
  std::int64_t stride;
  bool overflowed = false;

  template <class S, bool through_double>
  void put(std::int64_t i, S value) {
    if constexpr (through_double) {
      to[i * stride] = static_cast<T>(static_cast<double>(value));
    } else {
      to[i * stride] = static_cast<T>(value);
    }
    if constexpr (std::is_same_v<S, double> && sizeof(T) < sizeof(double)) {
      overflowed |= std::isinf(to[i * stride]) && !std::isinf(value);
    }
  }
};

/// Rows [first, first + count) of a column, which read(row) gives.
template <class S, bool through_double, class T, class Read>
void put_rows(const Column& column, std::int64_t first, std::int64_t count, Place<T>& place, Read read) {
  if (column.valid == nullptr) {
    for (std::int64_t i = 0; i < count; ++i) place.template put<S, through_double>(i, read(first + i));
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    if (bit_at(column.valid, first + i)) {
      place.template put<S, through_double>(i, read(first + i));
    } else {
      place.to[i * place.stride] = std::numeric_limits<T>::quiet_NaN();
    }
  }
}

template <class S, class T>
void put_numbers(const Column& column, std::int64_t first, std::int64_t count, Place<T>& place, bool through_double) {
  const S* values = static_cast<const S*>(column.values);
  const auto read = [values](std::int64_t i) { return values[i]; };
  if constexpr (std::is_integral_v<S> && sizeof(S) == 8) {
    if (through_double) return put_rows<S, true>(column, first, count, place, read);
  }
  put_rows<S, false>(column, first, count, place, read);
}

template <class T>
void put_column(const Column& column, std::int64_t first, std::int64_t count, Place<T>& place, bool through_double) {
  first += column.offset;
  switch (column.format) {
    case 'b':
      return put_rows<std::uint8_t, false>(column, first, count, place, [&column](std::int64_t i) {
        return static_cast<std::uint8_t>(bit_at(column.values, i));
      });
    case 'c':
      return put_numbers<std::int8_t>(column, first, count, place, through_double);
    case 'C':
      return put_numbers<std::uint8_t>(column, first, count, place, through_double);
    case 's':
      return put_numbers<std::int16_t>(column, first, count, place, through_double);
    case 'S':
      return put_numbers<std::uint16_t>(column, first, count, place, through_double);
    case 'i':
      return put_numbers<std::int32_t>(column, first, count, place, through_double);
    case 'I':
      return put_numbers<std::uint32_t>(column, first, count, place, through_double);
    case 'l':
      return put_numbers<std::int64_t>(column, first, count, place, through_double);
    case 'L':
      return put_numbers<std::uint64_t>(column, first, count, place, through_double);
    case 'e':
      return put_numbers<Half>(column, first, count, place, through_double);
    case 'f':
      return put_numbers<float>(column, first, count, place, through_double);
    default:
      return put_numbers<double>(column, first, count, place, through_double);
  }
}

/// Whether a column is of a type that is more than its numbers. Metadata: their count, then the length and the bytes of
/// each key and of its value.
bool is_extension(const char* metadata) {
  if (metadata == nullptr) return false;
  const auto number = [&metadata] {
    std::int32_t value = 0;
    std::memcpy(&value, metadata, sizeof value);
    metadata += sizeof value;
    return value;
  };
  const auto text = [&] {
    const std::int32_t length = number();
    const std::string_view found(metadata, static_cast<std::size_t>(length));
    metadata += length;
    return found;
  };
  for (std::int32_t left = number(); left > 0; --left) {
    if (text() == "ARROW:extension:name") return true;
    text();
  }
  return false;
}

std::vector<Column> columns_of(const ArrowArray& batch, const std::vector<std::string>& formats) {
  std::vector<Column> columns;
  for (std::size_t j = 0; j < formats.size(); ++j) {
    const ArrowArray& child = *batch.children[j];
    const void* valid = child.null_count == 0 ? nullptr : child.buffers[0];
    columns.push_back({formats[j][0], child.buffers[1], valid, batch.offset + child.offset});
  }
  return columns;
}

}  // namespace

ArrowColumns::ArrowColumns(ArrowArrayStream& given) {
  Stream stream(given);
  {
    Released<ArrowSchema> schema;
    stream.schema(schema.get());
    read_schema(*schema.get());
  }
  for (;;) {
    Released<ArrowArray> batch;
    stream.next(batch.get());
    if (batch->release == nullptr) return;  // the end
    check(*batch.get());
    rows_ += batch->length;
    if (batch->length > 0) batches_.push_back(std::move(batch));
  }
}

void ArrowColumns::read_schema(const ArrowSchema& schema) {
  if (schema.format == nullptr || std::string_view(schema.format) != "+s") {
    fail(std::string("table's Arrow stream is of ") + (schema.format != nullptr ? schema.format : "nothing") +
         ", expected record batches");
  }
  constexpr std::string_view kNumbers = "bcCsSiIlLefg";
  for (std::int64_t j = 0; j < schema.n_children; ++j) {
    const ArrowSchema& column = *schema.children[j];
    const std::string_view format = column.format;
    const bool is_plain = format.size() == 1 && kNumbers.find(format[0]) != std::string_view::npos;
    const bool is_more = column.dictionary != nullptr || is_extension(column.metadata);
    formats_.emplace_back(is_plain && !is_more ? format : "");
  }
}

/// What a gather relies on.
void ArrowColumns::check(const ArrowArray& batch) const {
  const auto columns = static_cast<std::int64_t>(formats_.size());
  const bool has_nulls = batch.null_count != 0 && batch.n_buffers > 0 && batch.buffers[0] != nullptr;
  bool good = batch.n_children == columns && batch.length >= 0 && batch.offset >= 0 && !has_nulls;
  for (std::int64_t j = 0; good && j < columns; ++j) {
    const ArrowArray& child = *batch.children[j];
    good = child.offset >= 0 && child.length >= batch.offset + batch.length;
    if (formats_[static_cast<std::size_t>(j)].empty()) continue;
    good = good && child.n_buffers == 2 && (child.buffers[1] != nullptr || batch.length == 0);
  }
  if (!good) fail("table's Arrow stream gave a record batch of an impossible form");
}

template <class T>
bool ArrowColumns::gather(T* out, bool through_double) const {
  const auto width = static_cast<std::int64_t>(formats_.size());
  // Of rows that stay in the cache while column after column is put into them.
  constexpr std::int64_t kBytes = 1 << 14;
  const std::int64_t most = std::clamp<std::int64_t>(
      kBytes / (std::max<std::int64_t>(width, 1) * static_cast<std::int64_t>(sizeof(T))), 16, 1024);
  bool overflowed = false;
  for (const Released<ArrowArray>& batch : batches_) {
    const std::vector<Column> columns = columns_of(*batch.operator->(), formats_);
    for (std::int64_t first = 0; first < batch->length; first += most) {
      const std::int64_t count = std::min(most, batch->length - first);
      for (std::int64_t j = 0; j < width; ++j) {
        Place<T> place{out + j, width};
        put_column(columns[static_cast<std::size_t>(j)], first, count, place, through_double);
        overflowed |= place.overflowed;
      }
      out += count * width;
    }
  }
  return overflowed;
}

template bool ArrowColumns::gather<float>(float*, bool) const;
template bool ArrowColumns::gather<double>(double*, bool) const;

}  // namespace nvpflow::python
