// Columns of a table that speaks Arrow's C stream interface, and rows gathered from them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <nvpflow/spec.hpp>

#include "arrow.h"

namespace nvpflow::python {

/// Owns what a producer filled in; releases it once, with the GIL.
template <class Struct>
class Released {
 public:
  Released() = default;
  ~Released() {
    if (held_.release != nullptr) held_.release(&held_);
  }
  Released(Released&& other) noexcept : held_(other.held_) { other.held_.release = nullptr; }
  Released(const Released&) = delete;
  Released& operator=(const Released&) = delete;
  Released& operator=(Released&&) = delete;

  Struct* operator->() { return &held_; }
  const Struct* operator->() const { return &held_; }
  Struct* get() { return &held_; }

 private:
  Struct held_{};
};

/// All of a stream of record batches. Of columns that hold plain numbers it makes rows.
class ArrowColumns {
 public:
  /// Takes everything out of the stream and releases it. Throws where the stream fails or is not of record batches.
  explicit ArrowColumns(arrow::ArrowArrayStream& given);

  std::int64_t rows() const { return rows_; }
  /// A letter of Arrow for each column of plain numbers: b, c, C, s, S, i, I, l, L, e, f or g; "" for any other.
  const std::vector<std::string>& formats() const { return formats_; }
  /// Writes rows [rows, columns], float or double, of columns that all have a format: null is NaN, false and true are 0
  /// and 1. through_double: integers become float64 first. Returns whether a finite number became infinite. Needs no
  /// GIL.
  template <class T>
  bool gather(T* out, bool through_double) const;

 private:
  void read_schema(const arrow::ArrowSchema& schema);
  void check(const arrow::ArrowArray& batch) const;

  std::vector<std::string> formats_;
  std::vector<Released<arrow::ArrowArray>> batches_;
  std::int64_t rows_ = 0;
};

}  // namespace nvpflow::python
