// Options and records of training as dictionaries of Python.
#pragma once

#include <pybind11/stl.h>

#include <string>

#include <nvpflow/density.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/train.hpp>

#include "plain_methods.hpp"

namespace nvpflow::python {

template <class V>
void assign(V& option, py::handle value) {
  option = py::cast<V>(value);
}
inline void assign(Schedule& option, py::handle value) { option = parse_schedule(value.cast<std::string>()); }
inline void assign(Statistics& option, py::handle value) { option = parse_statistics(value.cast<std::string>()); }
inline void assign(Estimator& option, py::handle value) { option = parse_estimator(value.cast<std::string>()); }
inline void assign(std::string& option, py::handle value) {
  option = path_of(py::reinterpret_borrow<py::object>(value));
}

template <class Options>
Options options_from(const py::dict& dict) {
  Options options;
  for (const auto& [key, value] : dict) {
    const auto name = py::cast<std::string>(key);
    bool known = false;
    Options::fields([&, given = value](const char* field, auto member, const OptionRange*) {
      if (name != field) return;
      assign(options.*member, given);
      known = true;
    });
    if (!known) throw Error(ErrorCode::invalid_argument, "unknown training option '" + name + "'");
  }
  return options;
}

template <class Record>
py::dict record_dict(const Record& record) {
  py::dict values;
  Record::fields([&](const char* name, auto member) { values[name] = record.*member; });
  return values;
}

}  // namespace nvpflow::python
