"""Flows of the default family give the bits that are stored, on every instruction set that runs here."""

from __future__ import annotations

import pytest
from golden_bits import stored
from nvpflow import _core


@pytest.mark.parametrize("isa", _core.cpu_isas_available())
def test_no_bit_of_the_default_family_has_moved(run_python, isa) -> None:
    if not stored(isa).exists():
        pytest.skip(
            f"no results of {isa} are stored; NVPFLOW_ISA={isa} python tests/python/golden_bits.py --write stores them"
        )
    output = run_python("import golden_bits; print(golden_bits.differences())", env={"NVPFLOW_ISA": isa})
    assert output.strip() == "[]"


def test_a_bit_that_moves_is_seen(run_python) -> None:
    """One weight in its last bit: the results of that flow differ, and those of no other flow."""
    script = """
import golden_bits, numpy as np
make = golden_bits.make_flow
def moved(name):
    flow = make(name)
    if name == "wide":
        parameters = {key: value.copy() for key, value in flow.parameters().items()}
        kernel = parameters["flow_1_scale.kernel"]
        kernel[3, 2] = np.nextafter(kernel[3, 2], np.float32(9))
        flow.set_parameters(parameters)
    return flow
golden_bits.make_flow = moved
found = golden_bits.differences()
assert {"wide/log_det", "wide/nll_gradient", "wide/file"} <= set(found), found
assert all(name.startswith("wide/") for name in found), found
print("seen")
"""
    isa = _core.cpu_isas_available()[-1]
    assert run_python(script, env={"NVPFLOW_ISA": isa}).strip() == "seen"
