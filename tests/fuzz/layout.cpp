// Fuzz target: python/src/layout.hpp, which judges the shapes and strides that other libraries write down, against the
// same questions answered element by element.
#include <bitset>
#include <cstring>
#include <span>
#include <vector>

#include <nvpflow/overlap.hpp>

#include "fuzz.hpp"
#include "layout.hpp"

using namespace nvpflow::python;

namespace {

/// The input as numbers, zeros once it is used up.
class Source {
 public:
  Source(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  std::uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  /// Mostly small ones of either sign, now and then any.
  std::int64_t number() {
    const std::uint8_t kind = byte();
    if (kind < 200) return static_cast<std::int8_t>(kind - 60) / 8;
    if (kind < 225) {
      const std::uint64_t size = (std::uint64_t{1} << (byte() % 64)) - kind % 3;
      return static_cast<std::int64_t>(kind % 2 == 0 ? size : ~size + 1);
    }
    std::uint64_t bits = 0;
    for (int i = 0; i < 8; ++i) bits = bits << 8 | byte();
    return static_cast<std::int64_t>(bits);
  }
  std::vector<std::int64_t> numbers(std::size_t count) {
    std::vector<std::int64_t> list(count);
    for (std::int64_t& n : list) n = number();
    return list;
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_, at_ = 0;
};

using Wide = __int128;

/// What elements_of promises, in numbers too wide to overflow.
std::int64_t slow_elements(const std::vector<std::int64_t>& shape) {
  constexpr Wide kMost = Wide{1} << 58;
  Wide count = 1, beside = 1;
  for (const std::int64_t extent : shape) {
    if (extent < 0) return -1;
    count *= extent;
    beside *= extent > 1 ? extent : 1;
    if (beside > kMost) return -1;
  }
  return static_cast<std::int64_t>(count);
}

/// Offsets of all elements in C order, in the units of the strides.
std::vector<Wide> offsets(const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides) {
  std::vector<Wide> all = {0};
  for (std::size_t i = 0; i < shape.size(); ++i) {
    std::vector<Wide> next;
    for (const Wide base : all) {
      for (std::int64_t k = 0; k < shape[i]; ++k) next.push_back(base + Wide{k} * strides[i]);
    }
    all = std::move(next);
  }
  return all;
}

void check_contiguity(const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides,
                      std::int64_t unit) {
  bool expected = true;
  Wide next = 0;
  for (const Wide offset : offsets(shape, strides)) {
    expected = expected && offset == next;
    next += unit;
  }
  require(is_c_contiguous(shape, strides, unit) == expected, "contiguous is what lies in one piece and in order");
}

/// The farthest element lies where an address can tell, for every axis and step taken by itself, too.
void check_strides(const std::vector<std::int64_t>& shape, const std::int64_t* strides, std::int64_t item,
                   bool enumerable) {
  constexpr Wide kFarthest = INT64_MAX;
  const auto absolute = [](Wide n) { return n < 0 ? -n : n; };
  bool expected = true;
  Wide reach = 0, elements = 1;
  std::vector<Wide> wanted(shape.size());
  for (std::size_t i = shape.size(); i-- > 0;) {
    wanted[i] = item * (strides == nullptr ? elements : Wide{strides[i]});
    elements *= shape[i] > 1 ? shape[i] : 1;
    if (absolute(wanted[i]) > kFarthest) {
      expected = false;
      break;
    }
    const Wide steps = shape[i] > 1 ? shape[i] - 1 : 0;
    if (steps > 0 && absolute(wanted[i]) > kFarthest / steps) {
      expected = false;
      break;
    }
    reach += steps * absolute(wanted[i]);
    expected = expected && reach <= kFarthest;
  }
  const auto found = byte_strides(shape, strides, item);
  require(found.has_value() == expected, "strides are refused where an element is out of reach, and there alone");
  if (!found.has_value()) return;
  require(std::equal(found->begin(), found->end(), wanted.begin()), "strides in bytes are those in elements");
  if (strides == nullptr) require(is_c_contiguous(shape, *found, item), "no strides: contiguous");
  if (!enumerable) return;
  for (const Wide offset : offsets(shape, *found)) require(absolute(offset) <= kFarthest, "elements are in reach");
}

void check_overlap(Source& source) {
  static char memory[512];
  const auto piece = [&] {
    const std::int64_t begin = source.byte(), size = source.byte();
    return std::pair(begin, size);
  };
  const auto [a, a_size] = piece();
  const auto [b, b_size] = piece();
  std::bitset<512> taken;
  for (std::int64_t i = 0; i < a_size; ++i) taken.set(static_cast<std::size_t>(a + i));
  bool expected = false;
  for (std::int64_t i = 0; i < b_size; ++i) expected = expected || taken.test(static_cast<std::size_t>(b + i));
  require(nvpflow::overlap(memory + a, a_size, memory + b, b_size) == expected, "overlap is a byte in common");
  require(nvpflow::overlap(memory + b, b_size, memory + a, a_size) == expected, "overlap is mutual");
}

void check_texts(const std::vector<std::int64_t>& shape, std::int64_t features) {
  const std::string text = shape_text(shape);
  require(text.front() == '(' && text.back() == ')' && (shape.size() != 1 || text[text.size() - 2] == ','),
          "shapes look like Python's");
  const bool rows = (shape.size() == 2 && shape[1] == features) || (shape.size() == 1 && shape[0] == features);
  require(are_rows(std::span<const std::int64_t>(shape), features) == rows, "rows are [B, D] or [D]");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Source source(data, size);
  check_overlap(source);
  const std::int64_t item = std::int64_t{1} << (source.byte() % 5);
  const std::size_t axes = source.byte() % (source.byte() < 240 ? 5 : kMostAxes + 1);
  const std::vector<std::int64_t> shape = source.numbers(axes);
  std::vector<std::int64_t> strides = source.numbers(axes);
  const std::int64_t elements = elements_of(shape);
  require(elements == slow_elements(shape), "elements are the product of the sizes");
  check_texts(shape, source.number());
  if (elements < 0) return 0;  // refused; nothing below sees such a shape

  // One in two has strides near C order, which numbers at random hardly meet.
  if (source.byte() % 2 == 0) {
    std::int64_t step = 1;
    for (std::size_t i = axes; i-- > 0;) {
      if (source.byte() < 230) strides[i] = step;
      step *= shape[i] > 1 ? shape[i] : 1;
    }
  }
  constexpr std::int64_t kFew = 256;
  std::int64_t beside = 1;  // no more than 2^58, as `elements` is known
  for (const std::int64_t extent : shape) beside *= std::max<std::int64_t>(1, extent);
  const bool enumerable = beside <= kFew;
  check_strides(shape, strides.data(), item, enumerable);
  check_strides(shape, nullptr, item, false);
  if (enumerable) {
    check_contiguity(shape, strides, 1);
    if (const auto bytes = byte_strides(shape, strides.data(), item)) check_contiguity(shape, *bytes, item);
  }
  require(!is_c_contiguous(shape, std::span(strides).first(axes == 0 ? 0 : axes - 1), 1) || axes == 0,
          "as many strides as axes");
  return 0;
}
