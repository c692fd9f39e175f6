"""In greenlets, and in sub-interpreters: one thread, more than one Python at a time."""

import importlib.util
import re

import pytest
from nvpflow import _core

needs_greenlet = pytest.mark.skipif(importlib.util.find_spec("greenlet") is None, reason="greenlet is not installed")

# What the calls below meet: each gives way to the other greenlet in the middle of its call.
GREENLETS = """
import sys, tempfile
import greenlet, numpy as np, nvpflow

x = np.random.default_rng(0).normal(size=(100, 3)).astype("f4")
flows = [nvpflow.build(3, 2, (8,), seed=seed) for seed in range(2)]
expected = [flow.log_prob(x) for flow in flows]
folder = tempfile.mkdtemp()
other = []

def give_way(*_):
    if other:
        other.append(greenlet.getcurrent())
        other.pop(0).switch()

class Lazy:
    def __array__(self, dtype=None, copy=None):
        give_way()
        return x

class Path:
    def __init__(self, name):
        self.name = name
    def __fspath__(self):
        give_way()
        return f"{folder}/{self.name}"

class Number:
    def __index__(self):
        give_way()
        return 2

for seed, flow in enumerate(flows):
    flow.save(f"{folder}/{seed}")
ones = np.ones(len(x), "f4")
calls = {
    "fit": lambda flow: flow.fit(x, epochs=3, progress=False, batch_size=20, callback=give_way),
    "fit rows": lambda flow: flow.fit(Lazy(), epochs=1, progress=False, batch_size=20),
    "log_prob": lambda flow: flow.log_prob(Lazy()),
    "forward": lambda flow: flow.forward(Lazy()),
    "inverse": lambda flow: flow.inverse(Lazy()),
    "sample": lambda flow: flow.sample(Number()),
    "nll": lambda flow: flow.nll(Lazy()),
    "nll_gradient": lambda flow: flow.nll_gradient(Lazy()),
    "vjp": lambda flow: flow.vjp(Lazy(), grad_out=Lazy()),
    "log_prob_vjp": lambda flow: flow.log_prob_vjp(Lazy(), ones),
    "num_threads": lambda flow: setattr(flow, "num_threads", Number()),
    "save": lambda flow: flow.save(Path("new")),
    "reload": lambda flow: flow.reload(Path("0")),
    "load": lambda flow: nvpflow.load(Path("0")),
    "certify": lambda flow: flow.certify(Lazy()),
}
call = calls[sys.argv[1]]
switches = 0

def run(flow):
    global switches
    call(flow)
    switches += 1

first, second = (greenlet.greenlet(lambda flow=flow: run(flow)) for flow in flows)
other.append(second)
first.switch()  # gives way in its call to the second, which gives way in its own, so that the first one's ends first
for _ in range(20):
    for one in (first, second):
        if not one.dead:
            one.switch()
assert first.dead and second.dead and switches == 2, (first.dead, second.dead, switches)
if sys.argv[1] != "fit" and sys.argv[1] not in ("fit rows", "reload"):
    for flow, log_p in zip(flows, expected):
        assert (flow.log_prob(x) == log_p).all()
print("ok")
"""


@needs_greenlet
@pytest.mark.parametrize(
    "call",
    re.findall(r'^    "([a-z_ ]+)": lambda', GREENLETS, re.MULTILINE),
)
def test_two_greenlets_in_one_call_at_once(run_python, call) -> None:
    assert run_python(GREENLETS, call) == "ok\n"


def test_what_takes_an_object_of_the_callers_is_no_function_of_pybind11() -> None:
    """Such an object may run Python code, which may switch greenlets: see python/src/plain_methods.hpp."""
    signature = re.compile(r"^\w+\((.*)\) -> ", re.MULTILINE)
    bound_to_own_types = {"__eq__", "__dlpack__", "__setstate__"}  # called by Python, with what has no code of its own
    for owner in (_core, _core.Flow):
        for name, value in vars(owner).items():
            found = signature.search(value.__doc__ or "") if callable(value) and not isinstance(value, type) else None
            if found is None or name in bound_to_own_types:
                continue
            takes = [
                part for part in found[1].split(", ") if part.endswith((": object", "= None")) and "self" not in part
            ]
            assert not takes, f"{owner.__name__}.{name} takes {takes}: bind it with plain<>, as those beside it"


SUBINTERPRETER = """
import sys
try:
    import _interpreters as interpreters        # from 3.13 on
except ImportError:
    import _xxsubinterpreters as interpreters
code = '''
try:
    import nvpflow
except ImportError as error:
    message = str(error)
else:
    message = "imported"
open({!r}, "w").write(message)
'''.format(sys.argv[1])
if sys.argv[2] == "after":
    import nvpflow
made = interpreters.create()
interpreters.run_string(made, code)
interpreters.destroy(made)
import nvpflow
print(nvpflow.build(2).sample(1).shape)
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_sub_interpreter_is_told(run_python, tmp_path, when) -> None:
    assert run_python(SUBINTERPRETER, tmp_path / "message", when) == "(1, 2)\n"
    message = (tmp_path / "message").read_text()
    assert "nvpflow cannot be imported in a sub-interpreter, expected the main" in message
    assert "Is it not built" not in message
