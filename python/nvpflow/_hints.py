"""What to say where somebody passes an argument that other libraries have: what works here instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_WEIGHTS = "a weight for each row is called sample_weight"
_NO_WEIGHTS = "weights of rows are for fit, nll, nll_gradient and score; here weigh the result for each row"
_BOUNDS = "bounds of columns belong to the flow: nvpflow.build(bounds={'share': (0, 1)})"
_DISCRETE = "columns of integers belong to the flow: nvpflow.build(discrete=['rooms'])"
_BASE = "the base belongs to the flow: nvpflow.build(base=)"
_ABOUT = {
    **dict.fromkeys(("sample_weight", "sample_weights", "weight", "weights", "w", "importance"), _NO_WEIGHTS),
    **dict.fromkeys(("bounds", "low", "high", "lower", "upper", "support", "limits"), _BOUNDS),
    **dict.fromkeys(("discrete", "integers", "counts", "dequantize", "dequantization"), _DISCRETE),
    **dict.fromkeys(("base", "prior", "latent"), _BASE),
    "temperature": "Flow.sample, Flow.sample_and_log_prob and Flow.log_prob have a temperature",
    "context": "a view of Flow.condition has its context already, and an estimator takes it in X",
    # By position, behind the arguments that there are.
    "": "a context and options are given by name, context=c",
}
# What others call an argument, for functions that have it under its own name.
_RENAMED = {
    "sample_weight": (("sample_weights", "weight", "weights", "w", "importance"), _WEIGHTS),
    "n": (("n_samples", "num_samples", "size", "shape", "sample_shape"), "the number of rows is called n"),
    "x": (("X", "data", "value", "inputs", "input", "theta", "samples"), "the rows are called x"),
    "X": (("x", "data", "value", "inputs", "input", "theta", "samples"), "the rows are called X"),
    "seed": (("rng", "generator", "random_state", "key"), "randomness comes from an integer, seed="),
    "random_state": (("rng", "generator", "seed", "key"), "randomness comes from random_state="),
    "key": (("rng", "generator", "random_state", "seed"), "randomness comes from a key of JAX, key="),
    "learning_rate": (("lr",), "the step size is called learning_rate"),
    "epochs": (("num_epochs", "n_epochs", "max_epochs", "max_iter"), "passes over the rows are called epochs"),
    "validation": (("validation_fraction", "validation_split", "val", "X_val"), "it is called validation"),
    "validation_fraction": (("validation", "validation_split", "val"), "it is called validation_fraction"),
    "progress": (("verbose",), "it is called progress"),
    "verbose": (("progress",), "it is called verbose"),
    "input_size": (("features", "dim", "n_features"), "the number of columns is called input_size"),
    "num_flows": (("num_layers", "n_layers", "transforms"), "the number of coupling layers is called num_flows"),
    "context": (
        ("cond", "condition", "conditions", "conditional", "conditioner", "labels", "y", "c"),
        "what conditions the rows is called context",
    ),
    "context_size": (
        ("context", "context_features", "cond_dim", "condition_size", "conditions", "num_classes"),
        "how many numbers condition a row is called context_size",
    ),
    "context_features": (
        ("context_size", "cond_dim", "condition_size", "conditions", "num_classes"),
        "an estimator takes contexts in X, and context_features says which of its features these are",
    ),
    "num_bins": (("bins", "n_bins", "count_bins", "knots"), "the number of a spline's bins is called num_bins"),
    "transform": (("coupling", "spline", "splines"), "what couplings do is called transform, such as 'spline'"),
    "coupling": (("transform", "spline", "splines"), "what couplings do is called coupling, such as 'spline'"),
    "bounds": (("support", "limits", "low", "high", "lower", "upper"), "intervals of columns are called bounds"),
    "discrete": (("integers", "counts", "dequantize", "dequantization"), "columns of integers are called discrete"),
    "tail_bound": (("bound", "B", "tails"), "how far splines reach is called tail_bound"),
    "hidden_sizes": (
        ("hidden_features", "hidden_size", "n_hidden"),
        "widths of hidden layers are called hidden_sizes",
    ),
}


def about(name: str, known: Iterable[str] = ()) -> str:
    """Return what to say of an argument that is not among those known; "" where there is nothing to say.

    "" as the name stands for one more by position.
    """
    arguments = list(known)
    for target, (names, text) in _RENAMED.items():
        if name in names and target in arguments:
            return text
    if name in _ABOUT:
        return _ABOUT[name]
    import difflib  # on the way to an error only

    nearest = difflib.get_close_matches(name, arguments, 1)
    return f"did you mean {nearest[0]!r}?" if nearest else ""


def _refuse(called: str, name: str, known: Iterable[str]) -> NoReturn:
    hint = about(name, known)
    raise TypeError(f"{called}() got an unexpected argument {name!r}{'; ' if hint else ''}{hint}")


def explained(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function say of an argument that it does not have, but others do, what works instead."""
    signature = inspect.signature(function).parameters
    parameters = list(signature)
    is_method = parameters[0] == "self"
    known = parameters[is_method:]
    by_position = sum(parameter.kind == parameter.POSITIONAL_OR_KEYWORD for parameter in signature.values())

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        # Of a method the class that the caller knows, which may inherit it.
        called = f"{type(args[0]).__name__}.{call.__name__}" if is_method and args else call.__qualname__
        if len(args) > by_position:
            most, given = by_position - is_method, len(args) - is_method
            hint = about("") if "context" in known else ""
            raise TypeError(
                f"{called}() takes at most {most} positional argument(s), got {given}{'; ' if hint else ''}{hint}"
            )
        for name in kwargs:
            if name not in known:
                _refuse(called, name, known)
        return function(*args, **kwargs)

    return call
