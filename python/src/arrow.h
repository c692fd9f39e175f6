// The structures of Arrow's C data interface and C stream interface (https://arrow.apache.org/docs/format), written
// from their specifications: the layout is the interface.
#pragma once

#include <cstdint>

namespace nvpflow::python::arrow {

struct ArrowSchema {
  const char* format;
  const char* name;
  const char* metadata;
  std::int64_t flags;
  std::int64_t n_children;
  ArrowSchema** children;
  ArrowSchema* dictionary;
  void (*release)(ArrowSchema* self);
  void* private_data;
};

struct ArrowArray {
  std::int64_t length;
  std::int64_t null_count;  // -1: not counted
  std::int64_t offset;
  std::int64_t n_buffers;
  std::int64_t n_children;
  const void** buffers;
  ArrowArray** children;
  ArrowArray* dictionary;
  void (*release)(ArrowArray* self);
  void* private_data;
};

struct ArrowArrayStream {
  int (*get_schema)(ArrowArrayStream* self, ArrowSchema* out);
  int (*get_next)(ArrowArrayStream* self, ArrowArray* out);
  const char* (*get_last_error)(ArrowArrayStream* self);
  void (*release)(ArrowArrayStream* self);
  void* private_data;
};

}  // namespace nvpflow::python::arrow
