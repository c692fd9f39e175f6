"""What people try: every public function given what it does not take answers in words that help."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import io
import pathlib
import re
from collections.abc import Iterator
from types import FunctionType

import numpy as np
import nvpflow
import pytest
from nvpflow import cli

X = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
QUICK = {"epochs": 1, "progress": False}
# What a message must not be: pybind11's own text, or an error from inside.
RAW = re.compile(r"incompatible (function|constructor) arguments|Invoked with|pybind|has no attribute|<locals>")


def new_flow(**options: object) -> nvpflow.Flow:
    return nvpflow.build(3, num_flows=2, hidden_sizes=(8,), **options)


def fitted_names(names: list[str]) -> nvpflow.Flow:
    flow = new_flow()
    flow.column_names = names
    return flow


# --------------------------------------------------------------------------------------- every function, odd arguments


def functions() -> dict[str, object]:
    found: dict[str, object] = {}
    flow = new_flow()
    for name in nvpflow.__all__:
        value = getattr(nvpflow, name)
        if callable(value) and not (isinstance(value, type) and issubclass(value, BaseException)):
            found[name] = value
    for owner, value in (
        ("flow", flow),
        ("spec", flow.spec),
        ("functional", nvpflow.functional),
        ("cuda", nvpflow.cuda),
    ):
        for name in dir(value):
            member = getattr(value, name) if not name.startswith("_") else None
            ours = not inspect.ismodule(value) or isinstance(member, FunctionType)  # and not a type of numpy.typing
            if callable(member) and ours:
                found[f"{owner}.{name}"] = member
    return found


FUNCTIONS = functions()


def test_the_walk_finds_the_public_functions() -> None:
    names = {
        "build",
        "load",
        "check_data",
        "FlowSpec",
        "flow.fit",
        "flow.log_prob",
        "flow.vjp",
        "spec.to_json",
        "cpu_isa",
    }
    assert names <= set(FUNCTIONS)
    assert len(FUNCTIONS) > 35


def complaint(function: object, *args: object, **kwargs: object) -> BaseException | None:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_unknown_keyword_is_named(name) -> None:
    error = complaint(FUNCTIONS[name], no_such_argument=1)
    assert isinstance(error, TypeError), error
    assert not RAW.search(str(error)), error
    assert "no_such_argument" in str(error) or "takes no" in str(error) or "missing" in str(error), error


@pytest.mark.parametrize("name", FUNCTIONS)
def test_too_many_arguments_are_counted(name) -> None:
    if any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(FUNCTIONS[name]).parameters.values()):
        pytest.skip("takes any number")
    error = complaint(FUNCTIONS[name], *range(40))
    assert isinstance(error, TypeError), error
    assert "incompatible" not in str(error), error
    assert "takes" in str(error), error


class Odd:
    """An object that nothing knows."""


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("value", [Odd(), None, "text", {}, 1.5, b"\0", [], (5,), True, Odd], ids=repr)
def test_a_value_of_any_type_gets_an_answer(name, value, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # "text" may be a file's name
    error = complaint(FUNCTIONS[name], value)
    if error is not None:
        assert isinstance(error, (TypeError, ValueError, OSError, RuntimeError)), repr(error)
        assert not isinstance(error, RuntimeError) or isinstance(error, nvpflow.CudaError), repr(error)
        assert not RAW.search(str(error)), error


# -------------------------------------------------------------------------------------------------- known other names


HABITS = [
    (lambda flow: flow.log_prob(X, sample_weight=np.ones(200)), "'sample_weight'; weights of rows are for fit, nll"),
    (lambda flow: flow.fit(X, cond=X, **QUICK), "'cond'; what conditions the rows is called context"),
    (lambda flow: flow.fit(X, bounds=(0, 1), **QUICK), "'bounds'; bounds of columns belong to the flow"),
    (lambda flow: flow.fit(X, lr=1e-3), "'lr'; the step size is called learning_rate"),
    (lambda flow: flow.fit(X, verbose=1), "'verbose'; it is called progress"),
    (lambda flow: nvpflow.build(features=3), "'features'; the number of columns is called input_size"),
    (lambda flow: flow.log_prob(X, condition=None), "'condition'; what conditions the rows is called context"),
    (lambda flow: flow.log_probability(X, X), "got 2; a context and options are given by name"),
    (lambda flow: flow.nll(X, None, X), "got 3; a context and options are given by name"),
    (lambda flow: flow.nll(X, w=X), "'w'; a weight for each row is called sample_weight"),
    (lambda flow: flow.fit(X, weights=X), "'weights'; a weight for each row is called sample_weight"),
    (lambda flow: nvpflow.build(3, context=2), "'context'; how many numbers condition a row is called context_size"),
    (lambda flow: flow.fit([[1.0, 2.0, 3.0], [1.0]], **QUICK), "x cannot be read as an array of numbers"),
    (lambda flow: flow.log_prob(value=X), "'value'; the rows are called x"),
    (
        lambda flow: flow.sample((5,)),
        r"n is tuple, expected an integer; rows have one axis, and sample\(5\) draws five",
    ),
    (lambda flow: flow.sample_and_log_prob(np.array([5])), r"n is numpy\.ndarray, expected an integer; rows have one"),
    (lambda flow: flow.sample(num_samples=5), "'num_samples'; the number of rows is called n"),
    (
        lambda flow: nvpflow.build(3, transform="spline", bins=8),
        "'bins'; the number of a spline's bins is called num_b",
    ),
    (lambda flow: nvpflow.build(3, transform="spline", bound=5), "'bound'; how far splines reach is called tail_bound"),
    (lambda flow: nvpflow.build(3, cond_dim=2), "'cond_dim'; how many numbers condition a row is called context_size"),
    (lambda flow: flow.sample(5, generator=None), "'generator'; randomness comes from an integer, seed="),
    (lambda flow: flow.sample(5, sed=1), "'sed'; did you mean 'seed'"),
    (
        lambda flow: flow.fit(X, X),
        r"Flow.fit\(\) takes at most 1 positional argument\(s\), got 2; a context and options are",
    ),
    (
        lambda flow: nvpflow.check_data(X, X),
        r"check_data\(\) takes at most 1 positional .*given by name, context=c$",
    ),
    (lambda flow: flow.fit(X, epoch=1), "Flow.fit.. got an unexpected argument 'epoch'; did you mean 'epochs'"),
    (lambda flow: nvpflow.build(3, hiden_sizes=(4,)), "'hiden_sizes'; did you mean 'hidden_sizes'"),
    (lambda flow: nvpflow.build(3, coupling="spline"), "'coupling'; what couplings do is called transform"),
    (lambda flow: nvpflow.Flow(flow.spec, seeds=1), "Flow.__init__.. got .* 'seeds'; did you mean 'seed'"),
    (lambda flow: flow.sample(5, dtype="x"), "dtype is 'x', expected float32 or float64"),
    (lambda flow: flow.inverse(X, dtype=1.5), "dtype is 1.5, expected float32 or float64"),
    (lambda flow: nvpflow.Flow(3), r"spec is 3 \(int\), expected a FlowSpec; nvpflow.build makes a flow"),
    (lambda flow: flow.swap(flow.spec), "other is FlowSpec.*, expected a Flow"),
]


@pytest.mark.parametrize(("call", "message"), HABITS, ids=[message for _, message in HABITS])
def test_arguments_of_other_libraries_are_answered(call, message) -> None:
    with pytest.raises(TypeError, match=message):
        call(new_flow())


def test_arguments_of_modules_and_distributions_are_answered() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from nvpflow.torch import FlowDistribution, FlowModule, FlowTransform

    module = FlowModule(new_flow())
    x = torch.from_numpy(X)
    for call, message in (
        (lambda: FlowModule(new_flow(), device="cpu"), r"FlowModule.__init__\(\) got an unexpected argument 'device'"),
        (lambda: module(x, cond=x), r"FlowModule.forward\(\) .* 'cond'; what conditions the rows is called context"),
        (lambda: module.log_prob(value=x), "'value'; the rows are called x"),
        (lambda: module.rsample(num_samples=3), "'num_samples'; the number of rows is called n"),
        (
            lambda: module.sample((5,)),
            r"n is \(5,\) \(tuple\), expected an integer; rows have one axis: sample\(5\) draws five",
        ),
        (lambda: module.to_flow(drop_bases=True), "'drop_bases'; did you mean 'drop_base'"),
        (lambda: FlowDistribution(module, validate_arg=True), "'validate_arg'; did you mean 'validate_args'"),
        (
            lambda: FlowDistribution(module).log_prob(x=x),
            r"FlowDistribution.log_prob\(\) got an unexpected argument 'x'",
        ),
        (lambda: FlowTransform(module, cache=1), "'cache'; did you mean 'cache_size'"),
        (lambda: FlowTransform(3), r"module is 3 \(int\), expected an nvpflow.torch.FlowModule$"),
        (lambda: FlowDistribution(new_flow()), r"module is Flow.*FlowModule; wrap the flow: FlowModule\(flow\)$"),
        (lambda: nvpflow.exporters.to_torch(module), r"(?s)flow is FlowModule.*Flow; give module.to_flow\(\)$"),
        (lambda: nvpflow.exporters.to_onnx("a", "b"), "flow is 'a' .*Flow; nvpflow.load reads one from a file$"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_arguments_of_jax_functions_are_answered() -> None:
    pytest.importorskip("jax", minversion="0.5", reason="JAX is not installed")
    import nvpflow.jax as nj

    flow = new_flow()
    parameters = nj.parameters(flow)
    for call, message in (
        (lambda: nj.sample(flow.spec, parameters, seed=1, n=3), "'seed'; randomness comes from a key of JAX, key="),
        (lambda: nj.forward(flow.spec, params=parameters, x=X), "'params'; did you mean 'parameters'"),
        (lambda: nj.sample(flow.spec, parameters, None, (3,)), r"rows have one axis: sample\(5\) draws five"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_arguments_of_estimators_are_answered() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from nvpflow.sklearn import FlowDensity, FlowOutlierDetector

    for call, message in (
        (
            lambda: FlowDensity(context_size=2),
            "'context_size'; an estimator takes contexts in X, and context_features says which of its features",
        ),
        (lambda: FlowDensity(transform="spline"), "'transform'; what couplings do is called coupling"),
        (lambda: FlowDensity(seed=1), "FlowDensity.__init__.. .* 'seed'; randomness comes from random_state="),
        (lambda: FlowOutlierDetector(validation=0.2), "'validation'; it is called validation_fraction"),
        (lambda: FlowDensity().fit(X, weights=X[:, 0]), "'weights'; a weight for each row is called sample_weight"),
        (lambda: FlowDensity().score_samples(x=X), "'x'; the rows are called X"),
        (
            lambda: FlowDensity().fit(X, None, X[:, 0], X),
            r"FlowDensity.fit\(\) takes at most 3 positional argument\(s\), got 4$",
        ),
        (
            lambda: FlowDensity(epochs=1, validation_fraction=None).fit(X).sample((5,)),
            r"rows have one axis: sample\(5\) draws five",
        ),
    ):
        with pytest.raises(TypeError, match=message):
            call()


# ------------------------------------------------------------------------------------------------------ odd tables


NO_TABLES = {
    "a file's name": ("x.npy", "x is a str, .*read the file first"),
    "a path": (pathlib.Path("x.csv"), "x is a PosixPath|WindowsPath, .*read the file first"),
    "an open file": (io.BytesIO(b"1,2,3"), "x is a BytesIO, .*read the file first"),
    "none": (None, "x is a NoneType, expected rows"),
    "a dict": ({"a": X[:, 0]}, r"x is a dict, .*numpy.column_stack"),
    "a generator": ((row for row in X), r"x is a generator, .*numpy.stack\(list\(x\)\)"),
    "a set": ({1.0}, "x is a set, .*a list"),
}


@pytest.mark.parametrize(("value", "message"), NO_TABLES.values(), ids=NO_TABLES)
def test_what_is_no_table_is_refused_with_the_way_out(value, message) -> None:
    flow = new_flow()
    for call in (
        flow.fit,
        flow.certify,
        flow.log_prob,
        flow.forward,
        flow.nll,
        flow.nll_gradient,
        flow.vjp,
        nvpflow.check_data,
    ):
        with pytest.raises(TypeError, match=message):
            call(value)


def test_what_pytorch_iterates_over_is_refused_with_the_way_out() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    data = torch.utils.data.TensorDataset(torch.from_numpy(X))
    normal = torch.distributions.Normal(0.0, 1.0)
    for call in (new_flow().fit, new_flow().log_prob, nvpflow.check_data):
        with pytest.raises(TypeError, match=r"x is a DataLoader, .*torch.cat\(\[batch\[0\] for batch in loader\]\)"):
            call(torch.utils.data.DataLoader(data, 64))
        with pytest.raises(TypeError, match=r"x is a TensorDataset, .*dataset.tensors\[0\]"):
            call(data)
        with pytest.raises(TypeError, match=r"x is a Normal, .*a flow learns from samples"):
            call(normal)


# ------------------------------------------------------------------------------------------------------------ frames


def frames_of(columns: dict[str, np.ndarray]) -> list[object]:
    found = []
    for library in ("pandas", "polars", "pyarrow"):
        try:
            module = __import__(library)
        except ImportError:
            continue
        found.append(module.table(columns) if library == "pyarrow" else module.DataFrame(columns))
    return found


ABC = {name: X[:, i] for i, name in enumerate("abc")}
SCORES = ["log_probability", "log_prob", "forward", "nll", "nll_gradient", "vjp", "certify"]


@pytest.mark.parametrize("frame", frames_of(ABC), ids=lambda frame: type(frame).__module__.partition(".")[0])
def test_a_frame_gives_its_names_and_is_scored_as_its_array(frame) -> None:
    flow = new_flow()
    flow.fit(frame, **QUICK)
    assert flow.column_names == ("a", "b", "c")
    np.testing.assert_array_equal(flow.log_prob(frame), flow.log_prob(X))
    assert flow.nll(frame) == flow.nll(X)
    assert flow.certify(frame) == flow.certify(X)
    other = new_flow()
    other.fit(X, **QUICK)
    assert other == flow
    assert other.column_names is None


@pytest.mark.parametrize("method", SCORES)
@pytest.mark.parametrize("index", range(len(frames_of(ABC))))
def test_another_order_or_other_names_are_refused_everywhere(method, index) -> None:
    call = getattr(fitted_names(["a", "b", "c"]), method)
    call(frames_of(ABC)[index])
    with pytest.raises(
        ValueError, match=r"x has columns in another order: column 1 is 'c', .*x\[list\(flow.column_names\)\]"
    ):
        call(frames_of({name: ABC[name] for name in "cab"})[index])
    with pytest.raises(ValueError, match=r"x lacks columns .*\('c'\) and has others \('d'\); rename them"):
        call(frames_of({"a": X[:, 0], "b": X[:, 1], "d": X[:, 2]})[index])
    with pytest.raises(ValueError, match=r"x has columns that the flow was not trained with \('d'\)"):
        call(frames_of({**ABC, "d": X[:, 2]})[index])
    call(X)  # arrays have no names


def test_fit_refuses_another_order_and_keeps_its_names_where_it_fails() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame(ABC)
    flow = fitted_names(["a", "b", "c"])
    with pytest.raises(ValueError, match="another order"):
        flow.fit(frame[["b", "a", "c"]], **QUICK)
    with pytest.raises(ValueError, match="validation has columns in another order"):
        flow.fit(frame, validation=frame[["b", "a", "c"]], **QUICK)
    fresh = new_flow()
    with pytest.raises(ValueError, match="epochs"):
        fresh.fit(frame, epochs=-1, progress=False)
    assert fresh.column_names is None
    fresh.fit(pandas.DataFrame(X), **QUICK)  # numbers are no names
    assert fresh.column_names is None
    with pytest.raises(TypeError, match="names of several types"):
        fresh.fit(frame.rename(columns={"a": 1}), **QUICK)


def test_columns_that_are_not_numbers_are_named_in_one_message() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    wide = pandas.DataFrame(
        {
            "a": X[:, 0],
            "flag": X[:, 1] > 0,
            "city": pandas.Categorical(np.where(X[:, 1] > 0, "x", "y")),
            "name": ["n"] * 200,
            "day": pandas.date_range("2024", periods=200),
        }
    )
    flow = nvpflow.build(5, num_flows=2, hidden_sizes=(8,))
    for call in (flow.fit, flow.log_prob, flow.vjp, flow.certify):
        with pytest.raises(TypeError, match=r"^x, 3 columns that are not numbers") as refused:
            call(wide)
        for text in ("'city' is category: encode it", "'name' is", "'day' is datetime64"):
            assert text in str(refused.value)
        assert "convert it to seconds" in str(refused.value)
    report = nvpflow.check_data(wide)
    assert [finding.names for finding in report.errors] == [(f"column {name!r}",) for name in wide.columns[2:]]


def test_fit_names_all_that_is_wrong_with_a_frame_in_one_message() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame(ABC).assign(city=["x"] * 200, same=4.0, copy=X[:, 2])
    frame.loc[3, "b"] = np.nan
    fits = [nvpflow.build(6, num_flows=2, hidden_sizes=(8,)).fit]
    if importlib.util.find_spec("sklearn") is not None:
        from nvpflow.sklearn import FlowDensity

        fits.append(FlowDensity(epochs=1).fit)
    for fit, error, name in zip(fits, (TypeError, ValueError), "xX", strict=False):
        with pytest.raises(error, match=f"^{name}, 4 things:") as refused:
            fit(frame)
        for text in (
            "column 'city' is ",
            "1 of 200 rows with NaN or infinite values (row 3, counted from 0; column 'b': 1)",
            "column 'same' is constant",
            "column 'copy' is a copy of column 'c'",
        ):
            assert text in str(refused.value)


def test_columns_of_other_libraries_that_are_not_numbers_are_named() -> None:
    for frame in frames_of({"a": X[:, 0], "s": np.array(["x"] * 200), "b": X[:, 1] > 0}):
        with pytest.raises(TypeError, match=r"^x: column 's' is .*: encode it as numbers, or drop it$"):
            new_flow().log_prob(frame)


def test_false_and_true_are_0_and_1_in_every_table() -> None:
    """As in a CSV and in an array; fit warns of them as of any column with two values."""
    flags = {"a": X[:, 0], "b": X[:, 1] > 0, "c": X[:, 2]}
    rows = np.column_stack([*flags.values()]).astype(np.float32)
    flow = new_flow()
    for frame in frames_of(flags):
        np.testing.assert_array_equal(flow.log_prob(frame), flow.log_prob(rows))
        assert [finding.kind for finding in nvpflow.check_data(frame).findings] == ["few"]
    for frame in frames_of({name: column > 0 for name, column in ABC.items()}):
        np.testing.assert_array_equal(flow.log_prob(frame), flow.log_prob((X > 0).astype(np.float32)))


def test_false_and_true_with_nulls_are_nan_there() -> None:
    pandas = pytest.importorskip("pandas")
    gaps = [True, None, False]
    frames = [pandas.DataFrame({"a": [0.0, 1, 2], "b": pandas.array(gaps, "boolean"), "c": [0.0, 1, 2]})]
    for name, make in (("polars", "DataFrame"), ("pyarrow", "table")):
        library = pytest.importorskip(name)
        frames.append(getattr(library, make)({"a": [0.0, 1, 2], "b": gaps, "c": [0.0, 1, 2]}))
    for frame in frames:
        assert np.isnan(new_flow().log_prob(frame)).tolist() == [False, True, False]


def test_two_columns_of_one_name_are_refused_wherever_they_come_from(tmp_path, capsys) -> None:
    pandas = pytest.importorskip("pandas")
    message = "columns 1 and 3 are both called 'a', expected a name for each"
    pyarrow = pytest.importorskip("pyarrow")
    frames = [
        pandas.DataFrame(X, columns=["a", "b", "a"]),
        pyarrow.table([X[:, 0], X[:, 1], X[:, 2]], names=["a", "b", "a"]),
    ]
    flow = new_flow()
    for frame in frames:
        for call in (flow.fit, flow.log_prob, nvpflow.check_data):
            with pytest.raises(ValueError, match=f"x has two columns of one name: {message}"):
                call(frame)
    with pytest.raises(ValueError, match="column_names holds 'a' twice, for columns 1 and 3"):
        flow.column_names = ["a", "b", "a"]
    np.savetxt(tmp_path / "t.csv", X, delimiter=",", header="a,b,a", comments="")
    flow.save(tmp_path / "m.safetensors")
    for command in (["fit", "-o", str(tmp_path / "new.safetensors")], ["score", str(tmp_path / "m.safetensors")]):
        assert cli.main([*command, str(tmp_path / "t.csv")]) == 1
        assert message in capsys.readouterr().err


def test_an_array_with_an_attribute_columns_is_an_array() -> None:
    class Named:
        columns = ("a", "b", "c")

        def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
            return X

    flow = new_flow()
    np.testing.assert_array_equal(flow.log_prob(Named()), flow.log_prob(X))
    assert nvpflow.check_data(Named()) == nvpflow.check_data(X)


def test_a_frame_without_columns_is_refused_by_its_shape() -> None:
    for frame in frames_of(ABC):
        none = frame.select([]) if hasattr(frame, "select") else frame[[]]
        with pytest.raises(ValueError, match=r"x has shape \(\d+, 0\), expected \[N, 3\]"):
            new_flow().fit(none)
        with pytest.raises(ValueError, match=r"x has shape \(\d+, 0\), expected \[N, D\] with at least one column"):
            nvpflow.check_data(none)


def test_what_polars_and_pyarrow_say_themselves_stays_inside() -> None:
    """A LazyFrame warns where its columns are asked for; NumPy has no 128 bits; names need not be UTF-8."""
    polars = pytest.importorskip("polars", reason="polars is not installed")
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    frame = polars.DataFrame(ABC)
    misnamed = pyarrow.table([X[:, 0], X[:, 1], X[:, 2]], names=[b"\xff", "b", "c"])
    wide = frame.with_columns(polars.col("a").cast(polars.Float64).round().cast(polars.Int128))
    for call in (new_flow().fit, nvpflow.check_data):
        with pytest.raises(TypeError, match=r"x is a LazyFrame, .*x.collect\(\)"):
            call(frame.lazy())
        with pytest.raises(ValueError, match=r"x has a column whose name is not UTF-8 \(b'\\xff'\), .*rename it"):
            call(misnamed)
    with pytest.raises(TypeError, match="x: column 'a' is Int128: encode it as numbers, or drop it"):
        new_flow().fit(wide)
    assert [finding.columns for finding in nvpflow.check_data(wide).errors] == [(1,)]


def test_nullable_columns_are_numbers_and_their_gaps_are_missing_values() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame(ABC)
    nullable = frame.astype({"a": "Float32", "b": "Float32"})
    flow = new_flow()
    flow.fit(nullable, **QUICK)
    np.testing.assert_array_equal(flow.log_prob(nullable), flow.log_prob(X))
    nullable.loc[3, "b"] = pandas.NA
    assert np.flatnonzero(np.isnan(flow.log_prob(nullable))).tolist() == [3]
    message = r"1 of 200 rows with NaN or infinite values \(row 3, counted from 0; column 'b': 1\).*: x\.dropna\(\)$"
    with pytest.raises(ValueError, match=message):
        flow.fit(nullable, **QUICK)
    flow.fit(nullable.dropna(), **QUICK)


def test_estimators_name_the_columns_too() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from nvpflow.sklearn import FlowDensity

    frame = pandas.DataFrame(ABC)
    with pytest.raises(ValueError, match=r"X: column 'city' is .*encode it as numbers, or drop it"):
        FlowDensity(epochs=1).fit(frame.assign(city=["x"] * 200))
    frame.loc[3, "b"] = np.nan
    with pytest.raises(ValueError, match=r"X: 1 of 200 rows with NaN .*\(row 3, counted from 0; column 'b': 1\)"):
        FlowDensity(epochs=1).fit(frame)
    with pytest.raises(TypeError, match="X is a str"):
        FlowDensity(epochs=1).fit("x.csv")


# ------------------------------------------------------------------------------------------------- the form of messages


def raised() -> Iterator[tuple[str, str]]:
    """Yield every message about an argument in the package's sources, with its place."""
    kinds = {"ValueError", "TypeError", "DataError", "ArgumentTypeError", "LinAlgError"}
    for path in sorted(pathlib.Path(nvpflow.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                text = ast.unparse(node.exc)
                if ast.unparse(node.exc.func).rpartition(".")[2] in kinds:
                    yield f"{path.name}:{node.lineno}", text


def test_messages_that_say_what_an_argument_is_say_what_was_expected() -> None:
    """`x is V, expected E; do D`: what a message about a value must not leave out is E, or else D."""
    subject = re.compile(r"""\(f?['"](?:[\w.-]+|\{[^{}]*\})(?:\[[^\]]*\])? (?:is|has|holds|are) """)
    # "expected" may stand in a variable of that name; the others are documented by their words, or follow a colon.
    told = re.compile(r"expected|_LIKE_THIS|\{message\}|; |does not convert|has no rows|Python objects")
    found = [(place, text) for place, text in raised() if subject.search(text)]
    assert len(found) > 100
    assert [at for at in found if not told.search(at[1])] == []
