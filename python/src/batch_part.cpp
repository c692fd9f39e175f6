#include "batch_part.hpp"

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <nvpflow/error.hpp>
#include <nvpflow/execution.hpp>

#include "array_types.hpp"
#include "arrays.hpp"
#include "call_context.hpp"
#include "errors.hpp"
#include "host_arrays.hpp"
#include "outside.hpp"
#include "plain_methods.hpp"

namespace nvpflow::python {
namespace {

/// Within it neither a loss times a weight nor the inverse of a sum overflows.
constexpr double kLeastTotal = 1e-150, kLargestTotal = 1e150;

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

bool is_given(PyObject* object) { return object != nullptr && object != Py_None; }

std::string text_of(double value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

void require_total(const char* what, double total) {
  if (std::isfinite(total) && total >= kLeastTotal && total <= kLargestTotal) return;
  fail(std::string(what) + text_of(total) + ", expected a number from 1e-150 to 1e150");
}

/// total_rows=; 0 where it is left out.
double total_of(PyObject* given) {
  if (!is_given(given)) return 0;
  const double total = real_number(given, "total_rows");
  require_total("total_rows is ", total);
  return total;
}

bool accumulate_of(PyObject* given) {
  if (given == nullptr) return false;
  if (PyBool_Check(given) == 0) {
    raise(PyExc_TypeError, std::string("accumulate is ") + Py_TYPE(given)->tp_name + ", expected True or False");
  }
  return given == Py_True;
}

/// Refuses a table that was converted: with an index that would be done anew for all its rows in each call.
void require_in_place(PyObject* given, const char* name, const InputArray& array) {
  if (array.in_place && (is_numpy_array(given) || place_of(given, name) == Place::host)) return;
  fail(std::string(name) + " is " + Py_TYPE(given)->tp_name +
       " that a call must convert or copy whole, expected a C-contiguous array of the flow's dtype beside index=; "
       "convert it once, before the loop");
}

/// The numbers of an array of integers as int64; those beyond it are below 0.
template <class Integer>
std::vector<std::int64_t> widened(const HostValues& values) {
  const auto* begin = static_cast<const Integer*>(values.data);
  const auto count = static_cast<std::size_t>(values.bytes) / sizeof(Integer);
  std::vector<std::int64_t> numbers(count);
  for (std::size_t i = 0; i < count; ++i) {
    const bool beyond = std::cmp_greater(begin[i], std::numeric_limits<std::int64_t>::max());
    numbers[i] = beyond ? -1 : static_cast<std::int64_t>(begin[i]);
  }
  return numbers;
}

std::vector<std::int64_t> integers_of(PyObject* object) {
  const HostValues values = host_values(object);
  if (values.dtype == "bool") {
    raise(PyExc_TypeError, "index has dtype bool, expected integers; np.flatnonzero(index) are the rows of a mask");
  }
  using Read = std::vector<std::int64_t> (*)(const HostValues&);
  constexpr std::array<std::pair<const char*, Read>, 8> kKnown{{{"int64", widened<std::int64_t>},
                                                                {"int32", widened<std::int32_t>},
                                                                {"int16", widened<std::int16_t>},
                                                                {"int8", widened<std::int8_t>},
                                                                {"uint64", widened<std::uint64_t>},
                                                                {"uint32", widened<std::uint32_t>},
                                                                {"uint16", widened<std::uint16_t>},
                                                                {"uint8", widened<std::uint8_t>}}};
  for (const auto& [dtype, read] : kKnown) {
    if (values.dtype != dtype) continue;
    if (values.shape.size() != 1) {
      fail("index has " + std::to_string(values.shape.size()) + " axes, expected one: the rows of x to take");
    }
    return read(values);
  }
  raise(PyExc_TypeError, "index has dtype " + values.dtype + ", expected integers, the rows of x to take");
}

std::vector<std::int64_t> index_of(PyObject* object, std::int64_t rows) {
  if (!is_numpy_array(object) && place_of(object, "index") == Place::device) {
    raise(PyExc_ValueError, "index is on a CUDA device, expected an array of the host");
  }
  std::vector<std::int64_t> index = integers_of(object);
  for (std::size_t i = 0; i < index.size(); ++i) {
    if (index[i] >= 0 && index[i] < rows) continue;
    fail("index[" + std::to_string(i) + "] is no row of x, expected " +
         (rows == 0 ? "none: x has no rows" : "a number from 0 to " + std::to_string(rows - 1)));
  }
  return index;
}

/// Of the rows that are taken, where they are fewer than those of x or the total is not theirs.
void check_weights(const GivenPart& given) {
  const BatchPart& part = given.part;
  double sum = 0;
  for (std::int64_t i = 0; i < part.rows; ++i) {
    const std::int64_t row = part.index == nullptr ? i : part.index[i];
    const double weight = part.weights[static_cast<std::size_t>(row)];
    if (!std::isfinite(weight) || weight < 0) {
      fail("sample_weight[" + std::to_string(row) + "] is " + text_of(weight) +
           ", expected a finite number, at least 0");
    }
    sum += weight;
  }
  if (part.total > 0) {
    if (sum > 0) require_total("sample_weight adds up to ", sum);
  } else if (sum == 0 && part.rows > 0) {
    fail("sample_weight is zero for all " + std::to_string(part.rows) + " rows of index, expected a weight above 0");
  } else if (part.rows > 0) {
    require_total("sample_weight adds up to ", sum);
  }
}

}  // namespace

GivenPart read_part(const PartArguments& given, const InputArray& x, const GivenContext& context) {
  GivenPart read;
  BatchPart& part = read.part;
  part.rows = x.rows;
  part.total = total_of(given.total_rows);
  part.accumulate = accumulate_of(given.accumulate);
  const bool has_index = is_given(given.index), whole = !has_index && part.total == 0;
  if (has_index) {
    if (x.on_device) raise(PyExc_ValueError, "x is on a CUDA device, expected an array of the host beside index=");
    if (x.single) fail("x has one axis, expected two beside index=");
    require_in_place(given.x, "x", x);
    if (context.given() && !context.array.single) require_in_place(given.context, "context", context.array);
    read.index = index_of(given.index, x.rows);
    part.rows = static_cast<std::int64_t>(read.index.size());
    part.index = read.index.data();
    if (part.rows == 0 && part.total == 0) {
      fail("index is empty, expected at least one row: the mean over an empty batch is not defined; give total_rows=");
    }
  }
  if (!is_given(given.sample_weight)) return read;
  read.weights = whole ? input_weights(given.sample_weight, "sample_weight", x)
                       : unchecked_weights(given.sample_weight, "sample_weight", x);
  if (has_index) require_in_place(given.sample_weight, "sample_weight", read.weights);
  part.weights = view<double>(read.weights, x.rows);
  if (!whole) check_weights(read);
  return read;
}

}  // namespace nvpflow::python
