// nll, its gradient, and the vector-Jacobian products.

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include <nvpflow/error.hpp>
#include <nvpflow/execution.hpp>
#include <nvpflow/flow.hpp>

#include "arrays.hpp"
#include "bindings.hpp"
#include "bound_flow.hpp"
#include "device_arrays.hpp"
#include "plain_methods.hpp"

namespace nvpflow::python {
namespace {

/// What a gradient costs, in forward passes.
constexpr std::int64_t kGradientCost = 5;

/// An array of the flow's parameters' size, in the memory and of the library of x.
OutputArray parameter_array(const BoundFlow& self, const char* name, const InputArray& x, PyObject* given = nullptr) {
  InputArray like = x;
  like.rows = self.flow.num_parameters();
  like.single = false;
  return output_array(given, name, self.dtype, 0, like);
}

py::object nll(const BoundFlow& self, const Arguments& given) {
  const InputArray in = self.rows_of(given[0], "x");
  double result = 0;
  run_beside(self, in, in.rows, [&](const Execution& how) { result = self.flow.nll_unchecked(in.data, in.rows, how); });
  return py::float_(result);
}

py::object nll_gradient(const BoundFlow& self, const Arguments& given) {
  const InputArray in = self.rows_of(given[0], "x");
  OutputArray gradient = parameter_array(self, "gradient", in);
  double result = 0;
  run_beside(self, in, kGradientCost * in.rows, [&](const Execution& how) {
    result = self.flow.nll_gradient_unchecked(in.data, in.rows, gradient.data, how);
  });
  return py::make_tuple(result, object_of(std::move(gradient)));
}

void require_beside(const InputArray& array, const char* name, const InputArray& x) {
  if (array.on_device == x.on_device) {
    if (x.on_device) wait_beside(array, x);
    return;
  }
  throw Error(ErrorCode::invalid_argument, std::string(x.on_device ? "x" : name) + " is on a CUDA device, " +
                                               (x.on_device ? name : "x") +
                                               " in the host's memory; expected both in one place");
}

/// The cotangents that a vector-Jacobian product is asked for.
struct Wanted {
  bool x, parameters;
};

Wanted wanted_of(const std::string& wrt) {
  if (wrt != "both" && wrt != "x" && wrt != "parameters") {
    throw Error(ErrorCode::invalid_argument, "wrt is '" + wrt + "', expected 'both', 'x' or 'parameters'");
  }
  return {wrt != "parameters", wrt != "x"};
}

struct NamedInput {
  const InputArray& array;
  const char* name;
};

/// Arrays for the wanted ones, new or given in out=(grad_x, grad_parameters); the call f(grad_x, grad_parameters) fills
/// them. None for an unwanted one.
template <class F>
py::object gradients(const BoundFlow& self, const InputArray& in, const std::string& wrt, PyObject* out,
                     std::initializer_list<NamedInput> inputs, F&& f) {
  constexpr const char *first = "out[0] (grad_x)", *second = "out[1] (grad_parameters)";
  const Wanted wanted = wanted_of(wrt);
  const auto [out_first, out_second] = out_pair(out, "grad_parameters");
  OutputArray grad_in, parameters;
  if (wanted.x) grad_in = output_array(out_first, first, self.dtype, self.features, in);
  if (wanted.parameters) parameters = parameter_array(self, second, in, out_second);
  for (const NamedInput& input : inputs) {
    refuse_overlap(grad_in, first, input.array, input.name, input.array.bytes);
    refuse_overlap(parameters, second, input.array, input.name, input.array.bytes);
  }
  refuse_overlap(grad_in, first, parameters, second);
  run_beside(self, in, kGradientCost * in.rows, [&](const Execution& how) { f(grad_in.data, parameters.data, how); });
  return py::make_tuple(wanted.x ? object_of(std::move(grad_in)) : py::none(),
                        wanted.parameters ? object_of(std::move(parameters)) : py::none());
}

py::object vjp(const BoundFlow& self, const Arguments& given) {
  const std::string direction = given.text(3, "forward"), wrt = given.text(4, "both");
  if (direction != "forward" && direction != "inverse") {
    throw Error(ErrorCode::invalid_argument, "direction is '" + direction + "', expected 'forward' or 'inverse'");
  }
  const Direction way = direction == "forward" ? Direction::forward : Direction::inverse;
  const InputArray in = way == Direction::forward ? self.rows_of(given[0], "x")
                                                  : input_rows(given[0], "x", self.dtype, self.features, self.device,
                                                               Kind::other, &self.flow);
  InputArray g_out, g_log_det;
  if (given.given(1)) {
    g_out = input_rows(given[1], "grad_out", self.dtype, self.features, self.device);
    require_beside(g_out, "grad_out", in);
    if (g_out.rows != in.rows || g_out.single != in.single) {
      throw Error(ErrorCode::invalid_argument, "grad_out has " + std::to_string(g_out.rows) +
                                                   " rows or another number of axes than x, expected the shape of x");
    }
  }
  if (given.given(2)) g_log_det = input_vector(given[2], "grad_log_det", self.dtype, in);
  const std::initializer_list<NamedInput> inputs = {{in, "x"}, {g_out, "grad_out"}, {g_log_det, "grad_log_det"}};
  return gradients(self, in, wrt, given[5], inputs, [&](void* grad_in, void* parameters, const Execution& how) {
    self.flow.vjp_unchecked(way, in.data, in.rows, g_out.data, g_log_det.data, grad_in, parameters, false, how);
  });
}

py::object log_prob_vjp(const BoundFlow& self, const Arguments& given) {
  const InputArray in = self.rows_of(given[0], "x");
  const InputArray g = input_vector(given[1], "grad_log_prob", self.dtype, in);
  const std::initializer_list<NamedInput> inputs = {{in, "x"}, {g, "grad_log_prob"}};
  return gradients(self, in, given.text(2, "both"), given[3], inputs, [&](void* grad_in, void* parameters, auto& how) {
    self.flow.log_prob_vjp_unchecked(in.data, in.rows, g.data, nullptr, grad_in, parameters, false, how);
  });
}

/// log_prob, and what log_prob_vjp gives for the parameters, in one pass; `out` (None: a new array) takes the latter
/// and must not overlap the others.
py::object log_prob_and_vjp(const BoundFlow& self, const Arguments& given) {
  const InputArray in = self.rows_of(given[0], "x");
  const InputArray g = input_vector(given[1], "grad_log_prob", self.dtype, in);
  OutputArray log_prob = output_array(nullptr, "log_prob", self.dtype, 0, in);
  OutputArray parameters = parameter_array(self, "grad_parameters", in, given[2]);
  run_beside(self, in, kGradientCost * in.rows, [&](const Execution& how) {
    self.flow.log_prob_vjp_unchecked(in.data, in.rows, g.data, log_prob.data, nullptr, parameters.data, false, how);
  });
  return py::make_tuple(object_of(std::move(log_prob)), object_of(std::move(parameters)));
}

}  // namespace

void add_gradient_methods(py::class_<BoundFlow>& type) {
  for (PyMethodDef* method : {
           plain<&nll>("nll", 1, 1, {"x"},
                       "nll($self, x)\n--\n\n"
                       "Mean negative log-likelihood of x [B, D], nats, summed in float64."),
           plain<&nll_gradient>("nll_gradient", 1, 1, {"x"},
                                "nll_gradient($self, x)\n--\n\n"
                                "Mean negative log-likelihood of x [B, D], nats, and its gradient [num_parameters] "
                                "(order of parameters())."),
           plain<&vjp>(
               "vjp", 1, 3, {"x", "grad_out", "grad_log_det", "direction", "wrt", "out"},
               "vjp($self, x, grad_out=None, grad_log_det=None, *, direction='forward', wrt='both', out=None)\n--\n\n"
               "Vector-Jacobian product of forward (or inverse): from the cotangents of the output [B, D] and of "
               "log_det\n"
               "[B] (None: zero) to those of x [B, D] and of the flat parameters [num_parameters]. wrt: 'both', or 'x' "
               "or\n"
               "'parameters' where the other is not wanted (None), which saves up to half of the work. out: a tuple\n"
               "(grad_x, grad_parameters) of arrays to write to."),
           plain<&log_prob_vjp>(
               "log_prob_vjp", 2, 2, {"x", "grad_log_prob", "wrt", "out"},
               "log_prob_vjp($self, x, grad_log_prob, *, wrt='both', out=None)\n--\n\n"
               "Vector-Jacobian product of log_prob: from its cotangent [B] to those of x [B, D] and of the flat "
               "parameters\n"
               "[num_parameters]; wrt and out as in vjp. With ones, wrt='x' is the score, the gradient of log p(x) by "
               "x."),
           plain<&log_prob_and_vjp>("_log_prob_and_vjp", 3, 3, {"x", "grad_log_prob", "out"}, nullptr),
       }) {
    add_method(type, method);
  }
}

}  // namespace nvpflow::python
