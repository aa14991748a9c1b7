// Shapes of tensors, as the operators on every device ask for them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace ernie {

using Shape = std::vector<int64_t>;

constexpr int64_t kAny = -1;

inline std::string text(const Shape& shape) {
  std::string joined;
  for (int64_t size : shape) joined += (joined.empty() ? "" : ", ") + (size == kAny ? "any" : std::to_string(size));
  return "[" + joined + "]";
}

// Whether a shape is the expected one, in which kAny stands for any size.
inline bool fits(const Shape& found, const Shape& expected) {
  return std::equal(found.begin(), found.end(), expected.begin(), expected.end(),
                    [](int64_t size, int64_t wanted) { return wanted == kAny || size == wanted; });
}

// Elements of one row and number of rows of x [..., width], also where one of them is 0.
inline int64_t width_of(const Shape& shape) { return shape.empty() ? 1 : shape.back(); }
inline int64_t rows_of(const Shape& shape) {
  int64_t rows = 1;
  for (size_t axis = 0; axis + 1 < shape.size(); ++axis) rows *= shape[axis];
  return rows;
}

// The same leading axes with another last one, or without.
inline Shape with_width(Shape shape, int64_t width) {
  if (!shape.empty()) shape.back() = width;
  return shape;
}
inline Shape without_width(Shape shape) {
  if (!shape.empty()) shape.pop_back();
  return shape;
}

}  // namespace ernie
