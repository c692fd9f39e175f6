// Methods as plain C functions, with the vectorcall convention: those that programs call a million times a second, and
// all that take an object of the caller's or call back.
//
// pybind11 keeps a frame for each function of its own that runs, in one stack per thread. What runs Python code in
// between (a callback; __array__, __dlpack__ or __fspath__ of an argument) may switch greenlets, each of which has a
// stack of its own in the same thread. pybind11's frames then end in another order than they began, which it answers
// with std::terminate.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include <nvpflow/execution.hpp>

#include "arrays.hpp"
#include "bound_flow.hpp"
#include "errors.hpp"

namespace nvpflow::python {

/// The C++ object behind `self`, whose type Python has checked; not initialised where Python made it without that.
template <class Bound>
Bound& bound_as(PyObject* self) {
  auto* instance = reinterpret_cast<py::detail::instance*>(self);
  auto* made = instance->simple_layout ? static_cast<Bound*>(instance->simple_value_holder[0]) : nullptr;
  if (made == nullptr || !made->ready) raise_uninitialised(Bound::kName);
  return *made;
}
inline BoundFlow& bound(PyObject* self) { return bound_as<BoundFlow>(self); }

/// Who is called: a flow, or a view of one, whose methods do not have the last argument of the flow's, context.
struct Caller {
  const BoundFlow& flow;
  const ContextRows* condition = nullptr;  // of a view

  /// self: of nvpflow._core.Flow or ConditionedFlow (call_context.hpp).
  template <class Self>
  static Caller of(PyObject* self);

  /// Names of a method's arguments, context last; they live as long as the list.
  std::span<PyObject* const> known(std::initializer_list<PyObject*> names) const {
    return {names.begin(), names.size() - (condition != nullptr ? 1 : 0)};
  }
};

template <>
inline Caller Caller::of<BoundFlow>(PyObject* self) {
  return {bound(self)};
}

/// "; " and what nvpflow._hints says of an argument that is not among those known, if anything; "" stands for one by
/// position.
std::string hint_about(const std::string& name, std::span<PyObject* const> known = {});

/// A Python number; TypeError with the argument's name for what is none.
double real_number(PyObject* given, const char* name);

/// The bytes of a str, bytes or os.PathLike, as the file system wants them.
std::string path_of(const py::object& path);

/// Splits a vectorcall into at most kMax named arguments. Names after `positional` are keyword-only.
template <int kMax>
class ArgumentsOf {
 public:
  /// names: interned strings, which require() looks at again.
  ArgumentsOf(const char* method, int positional, std::span<PyObject* const> names, PyObject* const* args,
              Py_ssize_t count, PyObject* keywords)
      : method_(method), names_(names) {
    if (count > positional) {
      fail("takes at most " + std::to_string(positional) + " positional argument(s), got " + std::to_string(count) +
           hint_about(""));
    }
    for (Py_ssize_t i = 0; i < count; ++i) values_[i] = args[i];
    const Py_ssize_t keyword_count = keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords);
    for (Py_ssize_t k = 0; k < keyword_count; ++k) {
      const int i = index_of(PyTuple_GET_ITEM(keywords, k));
      if (values_[i] != nullptr) fail("got argument '" + name(i) + "' twice");
      values_[i] = args[count + k];
    }
    if (values_[0] == nullptr) fail("is missing its argument '" + name(0) + "'");
  }

  PyObject* operator[](int i) const { return values_[i]; }
  bool given(int i) const { return values_[i] != nullptr && values_[i] != Py_None; }
  /// None where it is left out.
  py::object object(int i) const { return py::reinterpret_borrow<py::object>(given(i) ? values_[i] : Py_None); }
  /// A str; `otherwise` where it is left out.
  std::string text(int i, const char* otherwise) const {
    if (values_[i] == nullptr) return otherwise;
    if (PyUnicode_Check(values_[i]) == 0) {
      raise(PyExc_TypeError, name(i) + " is " + Py_TYPE(values_[i])->tp_name + ", expected a str");
    }
    return py::reinterpret_borrow<py::str>(values_[i]);
  }
  void require(int i) const {
    if (values_[i] == nullptr) fail("is missing its argument '" + name(i) + "'");
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    PyErr_SetString(PyExc_TypeError, (std::string(method_) + "() " + what).c_str());
    throw py::error_already_set();
  }
  std::string name(int i) const { return PyUnicode_AsUTF8(names_[static_cast<std::size_t>(i)]); }
  int index_of(PyObject* keyword) const {
    const int count = static_cast<int>(names_.size());
    for (int i = 0; i < count; ++i) {  // interned in practice: the pointers are equal
      if (names_[static_cast<std::size_t>(i)] == keyword) return i;
    }
    for (int i = 0; i < count; ++i) {
      if (PyUnicode_Compare(names_[static_cast<std::size_t>(i)], keyword) == 0) return i;
    }
    fail("got an unexpected argument " + py::repr(keyword).cast<std::string>() +
         hint_about(py::reinterpret_borrow<py::str>(keyword), names_));
  }

  const char* method_;
  std::span<PyObject* const> names_;
  PyObject* values_[kMax] = {};
};

/// What most methods take their arguments as.
inline constexpr int kMostArguments = 11;
using Arguments = ArgumentsOf<kMostArguments>;

/// The names of a function's arguments; those from `positional` on are keyword-only, those before `required` must be
/// given.
struct Signature {
  const char* name;
  int required, positional;
  std::vector<PyObject*> names;

  Arguments parse(PyObject* const* args, Py_ssize_t count, PyObject* keywords) const {
    Arguments given(name, positional, std::span(names.data(), names.size()), args, count, keywords);
    for (int i = 1; i < required; ++i) given.require(i);
    return given;
  }
};

/// f(flow, given) as a method of Flow, f(caller, given) as one of Self, f(given) as a function of the module.
template <auto f, class Self>
struct Plain {
  inline static const Signature* signature = nullptr;

  static PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
    return guarded([&] {
      py::object result;
      if constexpr (std::is_invocable_v<decltype(f), BoundFlow&, const Arguments&>) {
        BoundFlow& flow = bound(self);
        result = f(flow, signature->parse(args, count, keywords));
      } else if constexpr (std::is_invocable_v<decltype(f), const Caller&, const Arguments&>) {
        const auto caller = Caller::of<Self>(self);
        result = f(caller, signature->parse(args, count, keywords));
      } else {
        result = f(signature->parse(args, count, keywords));
      }
      return result.release().ptr();
    });
  }
};

/// The definition of a plain function, never freed: the interpreter may call it until its last moment. doc begins with
/// the signature, as Python's own do.
template <auto f, class Self = BoundFlow>
PyMethodDef* plain(const char* name, int required, int positional, std::initializer_list<const char*> names,
                   const char* doc) {
  auto* made = new Signature{name, required, positional, {}};
  if (names.size() > kMostArguments) throw std::logic_error(std::string(name) + " has more than kMostArguments");
  for (const char* argument : names) made->names.push_back(PyUnicode_InternFromString(argument));
  Plain<f, Self>::signature = made;
  return new PyMethodDef{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Plain<f, Self>::call)),
                         METH_FASTCALL | METH_KEYWORDS, doc};
}

/// To a class of pybind11's.
void add_method(const py::object& type, PyMethodDef* method);
void add_function(py::module_& module, PyMethodDef* function);

}  // namespace nvpflow::python
