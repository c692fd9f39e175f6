// Overloaded{f, g, ...}: one callable of several, for std::visit.
#pragma once

namespace nvpflow {

template <class... Functions>
struct Overloaded : Functions... {
  using Functions::operator()...;
};
template <class... Functions>
Overloaded(Functions...) -> Overloaded<Functions...>;

}  // namespace nvpflow
