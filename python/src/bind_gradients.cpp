// nll, its gradient, and the vector-Jacobian products.

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include <nvpflow/error.hpp>
#include <nvpflow/execution.hpp>
#include <nvpflow/flow.hpp>

#include "arrays.hpp"
#include "batch_part.hpp"
#include "bindings.hpp"
#include "bound_flow.hpp"
#include "call_context.hpp"
#include "errors.hpp"
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

py::object nll(const Caller& caller, const Arguments& given) {
  const BoundFlow& self = caller.flow;
  const InputArray in = self.rows_of(given[0], "x");
  const InputArray weights = input_weights(given[1], "sample_weight", in);
  const GivenContext context = context_of(caller, given[2], in);
  double result = 0;
  run_beside(self, in, in.rows, context.rows, [&](const Execution& how) {
    result = weights.owner ? self.flow.nll_unchecked(in.data, SampleWeights(view<double>(weights, in.rows)), how)
                           : self.flow.nll_unchecked(in.data, in.rows, how);
  });
  return py::float_(result);
}

py::object nll_gradient(const Caller& caller, const Arguments& given) {
  const BoundFlow& self = caller.flow;
  const InputArray in = self.rows_of(given[0], "x");
  const GivenContext context = context_of(caller, given[6], in);
  const GivenPart part = read_part({given[0], given[1], given[3], given[4], given[5], given[6]}, in, context);
  if (part.part.accumulate && !given.given(2)) {
    throw Error(ErrorCode::invalid_argument, "out is None, expected the gradient to add to where accumulate is True");
  }
  OutputArray gradient = parameter_array(self, "out", in, given[2]);
  refuse_overlap(gradient, "out", in, "x", in.bytes);
  refuse_overlap(gradient, "out", part.weights, "sample_weight", part.weights.bytes);
  refuse_overlap(gradient, "out", context);
  double result = 0;
  run_beside(self, in, kGradientCost * part.part.rows, context.rows, [&](const Execution& how) {
    result = self.flow.nll_gradient_unchecked(in.data, part.part, gradient.data, how);
  });
  return py::make_tuple(result, object_of(std::move(gradient)));
}

/// The cotangents that a vector-Jacobian product is asked for.
struct Wanted {
  bool x, parameters, context;
};

/// One name of wrt=.
Wanted wanted_by(const std::string& name, bool has_context) {
  if (name == "all") return {true, true, has_context};
  if (name == "both") return {true, true, false};
  if (name == "x") return {true, false, false};
  if (name == "parameters") return {false, true, false};
  if (name == "context" && has_context) return {false, false, true};
  throw Error(ErrorCode::invalid_argument, "wrt is '" + name + "', expected 'all', 'both', 'x', 'parameters'" +
                                               (has_context         ? ", 'context'"
                                                : name == "context" ? " (the call has no context=)"
                                                                    : "") +
                                               " or a tuple of them");
}

/// wrt: null for all, a name or a tuple of names.
Wanted wanted_of(PyObject* wrt, bool has_context) {
  if (wrt == nullptr) return wanted_by("all", has_context);
  const auto text = [](PyObject* name) {
    if (PyUnicode_Check(name) == 0) {
      raise(PyExc_TypeError, std::string("wrt is ") + Py_TYPE(name)->tp_name + ", expected a str or a tuple of them");
    }
    return py::reinterpret_borrow<py::str>(name).cast<std::string>();
  };
  if (!PyTuple_Check(wrt)) return wanted_by(text(wrt), has_context);
  Wanted wanted{};
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(wrt); ++i) {
    const Wanted one = wanted_by(text(PyTuple_GET_ITEM(wrt, i)), has_context);
    wanted = {wanted.x || one.x, wanted.parameters || one.parameters, wanted.context || one.context};
  }
  return wanted;
}

struct NamedInput {
  const InputArray& array;
  const char* name;
};

/// Where the cotangents go: new arrays or those of out=; nothing for an unwanted one.
struct Gradients {
  static constexpr const char *kIn = "out[0] (grad_x)", *kParameters = "out[1] (grad_parameters)",
                              *kContext = "out[2] (grad_context)";
  Wanted wanted;
  OutputArray in, parameters, context;

  Gradients(const BoundFlow& self, const InputArray& x, const GivenContext& given, PyObject* wrt, PyObject* out)
      : wanted(wanted_of(wrt, given.given())), has_context_(given.given()) {
    std::array<PyObject*, 3> outs{};
    if (has_context_) {
      outs = out_members<3>(out, "for grad_x, grad_parameters and grad_context");
    } else {
      const auto two = out_members<2>(out, "the second for grad_parameters");
      outs = {two[0], two[1], nullptr};
    }
    if (wanted.x) in = output_array(outs[0], kIn, self.dtype, self.features, x);
    if (wanted.parameters) parameters = parameter_array(self, kParameters, x, outs[1]);
    if (!wanted.context) return;
    InputArray like = x;
    like.single = given.array.single;
    context = output_array(outs[2], kContext, self.dtype, self.context_size, like);
  }

  void refuse_overlaps(std::initializer_list<NamedInput> inputs) const {
    for (const auto& [out, name] :
         {std::pair(&in, kIn), std::pair(&parameters, kParameters), std::pair(&context, kContext)}) {
      for (const NamedInput& input : inputs) refuse_overlap(*out, name, input.array, input.name, input.array.bytes);
    }
    refuse_overlap(in, kIn, parameters, kParameters);
    refuse_overlap(in, kIn, context, kContext);
    refuse_overlap(parameters, kParameters, context, kContext);
  }

  /// A tuple with None for an unwanted one; of three where the call has a context.
  py::object results() && {
    const auto or_none = [](bool there, OutputArray& array) {
      return there ? object_of(std::move(array)) : py::object(py::none());
    };
    py::object first = or_none(wanted.x, in), second = or_none(wanted.parameters, parameters);
    if (!has_context_) return py::make_tuple(first, second);
    return py::make_tuple(first, second, or_none(wanted.context, context));
  }

 private:
  bool has_context_;
};

/// Calls f(grads, execution), which writes them.
template <class F>
py::object gradients(const BoundFlow& self, const InputArray& in, const GivenContext& context, Gradients&& grads,
                     F&& f) {
  ContextRows rows = context.rows;
  rows.gradient = grads.context.data;
  run_beside(self, in, kGradientCost * in.rows, rows, [&](const Execution& how) { f(grads, how); });
  return std::move(grads).results();
}

Direction direction_of(const std::string& name) {
  if (name == "forward") return Direction::forward;
  if (name == "inverse") return Direction::inverse;
  throw Error(ErrorCode::invalid_argument, "direction is '" + name + "', expected 'forward' or 'inverse'");
}

py::object vjp(const Caller& caller, const Arguments& given) {
  const BoundFlow& self = caller.flow;
  const Direction way = direction_of(given.text(3, "forward"));
  const InputArray in = way == Direction::forward ? self.rows_of(given[0], "x")
                                                  : input_rows(given[0], "x", self.dtype, self.features, self.device,
                                                               Kind::other, &self.flow);
  const GivenContext context = context_of(caller, given[6], in);
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
  Gradients out(self, in, context, given[4], given[5]);
  out.refuse_overlaps({{in, "x"}, {g_out, "grad_out"}, {g_log_det, "grad_log_det"}, {context.array, "context"}});
  return gradients(self, in, context, std::move(out), [&](Gradients& grads, const Execution& how) {
    self.flow.vjp_unchecked(way, in.data, in.rows, g_out.data, g_log_det.data, grads.in.data, grads.parameters.data,
                            false, how);
  });
}

py::object log_prob_vjp(const Caller& caller, const Arguments& given) {
  const BoundFlow& self = caller.flow;
  const InputArray in = self.rows_of(given[0], "x");
  const GivenContext context = context_of(caller, given[4], in);
  const InputArray g = input_vector(given[1], "grad_log_prob", self.dtype, in);
  Gradients out(self, in, context, given[2], given[3]);
  out.refuse_overlaps({{in, "x"}, {g, "grad_log_prob"}, {context.array, "context"}});
  return gradients(self, in, context, std::move(out), [&](Gradients& grads, const Execution& how) {
    self.flow.log_prob_vjp_unchecked(in.data, in.rows, g.data, nullptr, grads.in.data, grads.parameters.data, false,
                                     how);
  });
}

/// The gradient of log p(x) by x.
py::object score(const Caller& caller, const Arguments& given) {
  const BoundFlow& self = caller.flow;
  const InputArray in = self.rows_of(given[0], "x");
  const GivenContext context = context_of(caller, given[2], in);
  OutputArray out = output_array(given[1], "out", self.dtype, self.features, in);
  refuse_overlap(out, "out", in, "x", in.bytes);
  refuse_overlap(out, "out", context);
  run_beside(self, in, kGradientCost * in.rows, context.rows, [&](const Execution& how) {
    self.flow.log_prob_vjp_unchecked(in.data, in.rows, nullptr, nullptr, out.data, nullptr, false, how);
  });
  return object_of(std::move(out));
}

/// log_prob, and the tuple that log_prob_vjp gives, in one pass.
py::object log_prob_and_vjp(const Caller& caller, const Arguments& given) {
  const BoundFlow& self = caller.flow;
  const InputArray in = self.rows_of(given[0], "x");
  const GivenContext context = context_of(caller, given[3], in);
  const InputArray g = input_vector(given[1], "grad_log_prob", self.dtype, in);
  OutputArray log_prob = output_array(nullptr, "log_prob", self.dtype, 0, in);
  const py::object grads = gradients(self, in, context, Gradients(self, in, context, given[2], nullptr),
                                     [&](Gradients& out, const Execution& how) {
                                       self.flow.log_prob_vjp_unchecked(in.data, in.rows, g.data, log_prob.data,
                                                                        out.in.data, out.parameters.data, false, how);
                                     });
  return py::make_tuple(object_of(std::move(log_prob)), grads);
}

}  // namespace

void add_gradient_methods(py::class_<BoundFlow>& type) {
  for (PyMethodDef* method : {
           plain<&nll>("nll", 1, 2, {"x", "sample_weight", "context"},
                       "nll($self, x, sample_weight=None, *, context=None)\n--\n\n"
                       "Mean negative log-likelihood of x [B, D], nats, summed in float64.\n\n"
                       "sample_weight [B]: the mean is by weight, -sum(w * log_prob(x)) / sum(w); finite numbers of at "
                       "least 0, not all 0.\nA row of weight 0 is not looked at. None: all rows count alike. context: "
                       "as of log_probability."),
           plain<&nll_gradient>(
               "nll_gradient", 1, 2, {"x", "sample_weight", "out", "total_rows", "accumulate", "index", "context"},
               "nll_gradient($self, x, sample_weight=None, *, out=None, total_rows=None, accumulate=False, index=None, "
               "context=None)\n--\n\n"
               "Mean negative log-likelihood, nats, and its gradient, in the order of `parameters_flat`.\n\n"
               "Parameters\n----------\n"
               "x : array, [B, D]\n    Rows, as of `log_probability`.\n"
               "sample_weight : array of float64, [B], optional\n"
               "    As of `nll`; a row of weight 0 changes no bit.\n"
               "out : array of the flow's dtype, [num_parameters], optional\n"
               "    What the gradient is written to, and returned. None: a new array.\n"
               "total_rows : float, optional\n"
               "    What the sums are divided by in place of the number of rows, or of the sum of their weights: that "
               "of the\n"
               "    whole batch. The losses and gradients of its pieces then add up to those of the batch, and a "
               "piece may\n"
               "    have no rows.\n"
               "accumulate : bool\n    Add the gradient to `out` in place of overwriting it.\n"
               "index : array of integers, [N], optional\n"
               "    The rows of x to take, in this order, as ``x[index]`` without a copy of rows. It also picks from "
               "contexts\n"
               "    [B, C] and sample_weight. All of these must then be arrays that need no conversion.\n"
               "context : as of `log_probability`\n\n"
               "Returns\n-------\n"
               "tuple of float and array, [num_parameters]\n\n"
               "Raises\n------\n"
               "TypeError, ValueError\n    An argument is not as above; the message names it, and `out` is as it "
               "was.\n\n"
               "Examples\n--------\n"
               ">>> import numpy as np, nvpflow\n"
               ">>> flow, x = nvpflow.build(2, dtype=\"float64\"), np.random.default_rng(0).normal(size=(100, 2))\n"
               ">>> loss, gradient = flow.nll_gradient(x)\n"
               ">>> first, _ = flow.nll_gradient(x[:30], total_rows=100, out=gradient)\n"
               ">>> second, _ = flow.nll_gradient(x[30:], total_rows=100, out=gradient, accumulate=True)\n"
               ">>> bool(np.isclose(first + second, loss))\nTrue\n"),
           plain<&vjp>(
               "vjp", 1, 3, {"x", "grad_out", "grad_log_det", "direction", "wrt", "out", "context"},
               "vjp($self, x, grad_out=None, grad_log_det=None, *, direction='forward', wrt='all', out=None, "
               "context=None)\n--\n\n"
               "Vector-Jacobian product of forward (or inverse), from the cotangents of the output [B, D] and of "
               "log_det [B]\n"
               "(None: zero). A tuple of the cotangents of x [B, D] and of the flat parameters [num_parameters]. With "
               "a "
               "context,\n"
               "[B, C] or [C], a third is that of the context, in its shape.\n\n"
               "wrt: 'all', or 'x', 'parameters', 'context' or a tuple of these. The others are then None, which saves "
               "up to\n"
               "half of the work. 'both' stands for ('x', 'parameters'). out: a tuple of arrays to write to, in the "
               "order of\n"
               "the results."),
           plain<&log_prob_vjp>(
               "log_prob_vjp", 2, 2, {"x", "grad_log_prob", "wrt", "out", "context"},
               "log_prob_vjp($self, x, grad_log_prob, *, wrt='all', out=None, context=None)\n--\n\n"
               "Vector-Jacobian product of log_prob, from its cotangent [B]. Results, wrt and out are those of `vjp`.\n"
               "With ones, wrt='x' is `score`."),
           plain<&score>(
               "score", 1, 1, {"x", "out", "context"},
               "score($self, x, *, out=None, context=None)\n--\n\n"
               "The gradient of log p(x) by x, in nats per unit of x: Stein's score, which Langevin and Hamiltonian "
               "samplers\nfollow.\n\n"
               "Parameters\n----------\n"
               "x : array, [B, D] or [D]\n    Rows, as of `log_probability`.\n"
               "out : array, as returned, optional\n"
               "context : as of `log_probability`\n    It is held: `log_prob_vjp` has its gradient, and that of the "
               "parameters.\n\n"
               "Returns\n-------\narray, [B, D] or [D], of the flow's dtype\n"
               "    Of a row with NaN or inf NaN; of a finite row whose density is 0, NaN or infinite, but 0 outside "
               "of a "
               "uniform base.\n\n"
               "Notes\n-----\n"
               "It takes two to three times as long as `log_probability`. The estimators' ``score``, of scikit-learn, "
               "is "
               "the mean of\nlog p.\n"),
           plain<&log_prob_and_vjp>("_log_prob_and_vjp", 2, 2, {"x", "grad_log_prob", "wrt", "context"}, nullptr),
       }) {
    add_method(type, method);
  }
}

void add_gradient_methods(py::class_<BoundCondition>& type) {
  for (PyMethodDef* method : {
           plain<&nll, BoundCondition>("nll", 1, 2, {"x", "sample_weight"},
                                       "nll($self, x, sample_weight=None)\n--\n\n"
                                       "Mean negative log-likelihood of x [B, D] under the context, nats; "
                                       "sample_weight as of `Flow.nll`."),
           plain<&nll_gradient, BoundCondition>(
               "nll_gradient", 1, 2, {"x", "sample_weight", "out", "total_rows", "accumulate", "index"},
               "nll_gradient($self, x, sample_weight=None, *, out=None, total_rows=None, accumulate=False, "
               "index=None)\n--\n\n"
               "The same, and its gradient [num_parameters]: as `Flow.nll_gradient`."),
           plain<&vjp, BoundCondition>(
               "vjp", 1, 3, {"x", "grad_out", "grad_log_det", "direction", "wrt", "out"},
               "vjp($self, x, grad_out=None, grad_log_det=None, *, direction='forward', wrt='all', out=None)\n--\n\n"
               "As `Flow.vjp`, without a cotangent of the context."),
           plain<&score, BoundCondition>("score", 1, 1, {"x", "out"},
                                         "score($self, x, *, out=None)\n--\n\n"
                                         "The gradient [B, D] of log p(x | context) by x, as `Flow.score`."),
           plain<&log_prob_vjp, BoundCondition>("log_prob_vjp", 2, 2, {"x", "grad_log_prob", "wrt", "out"},
                                                "log_prob_vjp($self, x, grad_log_prob, *, wrt='all', out=None)\n--\n\n"
                                                "As `Flow.log_prob_vjp`, without a cotangent of the context."),
       }) {
    add_method(type, method);
  }
}

}  // namespace nvpflow::python
