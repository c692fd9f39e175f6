"""The layers that flows are made of.

`FlowSpec.layers` holds them in order, the one first applied to data first. `FlowSpec.from_layers` takes them.

>>> from nvpflow.layers import Coupling, Standardize
>>> import nvpflow
>>> first = Coupling(hidden_sizes=(8,))
>>> second = Coupling(swapped=True, hidden_sizes=(16, 16), activation="silu")
>>> spec = nvpflow.FlowSpec.from_layers(4, [Standardize(), first, second])
>>> spec.layers[2].activation
'silu'
"""

from nvpflow._spec import Coupling, Standardize

__all__ = ["Coupling", "Standardize"]
