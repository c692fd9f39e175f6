"""Density estimators and posteriors of sbi, whose flows are nflows' or zuko's."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

import nvpflow.importers._nflows as _nflows
import nvpflow.importers._torch as _torch
import nvpflow.importers._zuko as _zuko
from nvpflow.flow import Flow
from nvpflow.importers._parity import imported
from nvpflow.importers._recipe import Array, Recipe
from nvpflow.importers._refusal import described, kind_of, refused_kind


def from_sbi(model: Any, *, dtype: DTypeLike = "float32", check: bool = True) -> tuple[Flow, Any]:
    """Return the flow of a density estimator of sbi, and the network that embeds what it is conditioned on.

    Parameters
    ----------
    model
        What ``NPE(...).train()`` returns, of a ``density_estimator`` "nsf", "zuko_nice", or "zuko_maf" and "zuko_nsf"
        with ``passes=2``; or the ``DirectPosterior`` of one. It stays as it is.
    dtype
        Of the flow, "float32" or "float64".
    check
        Raise `ParityError` where the two differ. False: the report says so, and the flow is returned.

    Returns
    -------
    flow : Flow
        Its rows are the parameters, and its context what they are inferred from. The standardization of both is part
        of it. It is the density that the estimator learned: a ``DirectPosterior`` also leaves out what is outside of
        the prior.
    embedding_net : torch.nn.Module or None
        Where the estimator has one of its own: the context of `flow` is what it makes of an observation. None: the
        context is the observation.

    Raises
    ------
    TypeError
        `model` is neither.
    ValueError
        A part of it has no counterpart here; the message begins with its path.
    ParityError
        The flow is not `model`.
    """
    name, estimator = "estimator", model
    if hasattr(model, "posterior_estimator"):
        name, estimator = "posterior.posterior_estimator", model.posterior_estimator
    net = getattr(estimator, "net", None)
    if net is None:
        raise TypeError(
            f"model is {described(model)}, expected a density estimator of sbi or a DirectPosterior; NPE(...).train() "
            "returns an estimator"
        )
    if hasattr(net, "_transform"):
        embedding = net._embedding_net
        recipe = _nflows.recipe_of(net, f"{name}.net")
    elif hasattr(net, "transform"):
        embedding = estimator._embedding_net
        recipe, latents = _zuko.recipe_of(net, f"{name}.net")
    else:
        raise refused_kind(f"{name}.net", net, "a flow of nflows or zuko", "train with density_estimator='nsf'")
    recipe.library, recipe.version = "sbi", _torch.version_of("sbi")
    apart = _standardization(recipe, embedding)
    embed = None if apart is not None else embedding
    peer = _nflows.NflowsPeer(net, recipe, embed) if hasattr(net, "_transform") else _zuko.ZukoPeer(net, latents, embed)
    return imported(recipe, peer, dtype=dtype, check=check), apart


def _standardization(recipe: Recipe, embedding: Any) -> Any:
    """Make a standardization of the context part of the recipe; return the embedding where there is more to it."""
    parts = list(embedding) if kind_of(embedding) == "Sequential" else [embedding]
    rest = [part for part in parts if kind_of(part) != "Identity"]
    if not rest:
        return None
    if len(rest) > 1 or kind_of(rest[0]) != "Standardize":
        return embedding
    mean, std = (_broadcast(getattr(rest[0], f"_{name}"), recipe.context_size) for name in ("mean", "std"))
    recipe.context = mean, np.log(std)
    recipe.folded.append("the standardization of the context, which is standardize_context here")
    return None


def _broadcast(value: Any, size: int) -> Array:
    return np.broadcast_to(_torch.array(value).ravel(), (size,)).copy()
