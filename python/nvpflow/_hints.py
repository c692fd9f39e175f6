"""What to say where somebody passes an argument that other libraries have: what works here instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_NO_CONDITIONS = (
    "flows here have no conditions yet, p(x) and not p(x | context): train one flow for each condition, or one of the "
    "joint columns, log p(x, c) - log p(c)"
)
_NO_WEIGHTS = (
    "rows have no weights yet: draw rows in proportion to their weights, x[rng.choice(len(x), len(x), p=w / w.sum())], "
    "or weight the loss of nvpflow.torch.FlowModule"
)
_NO_BOUNDS = (
    "columns have no bounds yet: fit the logarithm or the logit of a bounded column, and add the transform's "
    "log-derivative to log p"
)
_NO_OTHER_BASE = "latents are standard normal: there is no other base yet"
_ABOUT = {
    **dict.fromkeys(
        ("context", "cond", "condition", "conditions", "conditional", "conditioner", "labels"), _NO_CONDITIONS
    ),
    **dict.fromkeys(("context_size", "context_features", "cond_dim", "num_classes"), _NO_CONDITIONS),
    **dict.fromkeys(("sample_weight", "sample_weights", "weight", "w", "importance"), _NO_WEIGHTS),
    **dict.fromkeys(("bounds", "low", "high", "lower", "upper", "support", "limits"), _NO_BOUNDS),
    **dict.fromkeys(("base", "prior", "latent", "temperature"), _NO_OTHER_BASE),
    **dict.fromkeys(("n_samples", "num_samples", "size", "shape", "sample_shape"), "the number of rows is called n"),
    **dict.fromkeys(("X", "data", "value", "inputs", "input", "theta", "samples"), "the rows are called x"),
    **dict.fromkeys(("rng", "generator", "random_state", "key"), "randomness comes from an integer, seed="),
    **dict.fromkeys(("lr",), "the step size is called learning_rate"),
    **dict.fromkeys(("num_epochs", "n_epochs", "max_epochs", "max_iter"), "passes over the rows are called epochs"),
    **dict.fromkeys(("validation_fraction", "validation_split", "val", "X_val"), "it is called validation"),
    **dict.fromkeys(("verbose",), "it is called progress"),
    **dict.fromkeys(("features", "dim", "n_features"), "the number of columns is called input_size"),
    **dict.fromkeys(("num_layers", "n_layers", "transforms"), "the number of coupling layers is called num_flows"),
    **dict.fromkeys(("hidden_features", "hidden_size", "n_hidden"), "widths of hidden layers are called hidden_sizes"),
    # By position, behind the arguments that there are.
    "": "rows have neither weights nor conditions yet; options are given by name",
}


def about(name: str) -> str:
    """Return what to say of an argument of this name ("": of one more by position); "" where nothing is known of it."""
    return _ABOUT.get(name, "")


def explained(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function say of an argument that it does not have, but others do, what works instead."""
    known = frozenset(inspect.signature(function).parameters)
    is_method = "self" in known

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                hint = about(name)
                # Of a method the class that the caller knows, which may inherit it.
                called = f"{type(args[0]).__name__}.{call.__name__}" if is_method and args else call.__qualname__
                raise TypeError(f"{called}() got an unexpected argument {name!r}{'; ' if hint else ''}{hint}")
        return function(*args, **kwargs)

    return call
