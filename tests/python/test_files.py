"""Model files: what was written once loads for ever, what is damaged is refused, and no failure loses the old file."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import nvpflow
import pytest
from oracle import assert_same_bits, assert_within_budget, oracle_of, unit_data

GOLDEN = Path(__file__).parents[1] / "data"
DTYPES = ("float32", "float64")


def read_container(path: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file, by its published layout."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_container(path: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture(params=DTYPES)
def saved(make_flow, request, tmp_path):
    flow, _ = make_flow(5, 3, (7, 6), "gelu", dtype=request.param, standardize=True, scale_bound=1.25)
    path = tmp_path / "flow.safetensors"
    flow.save(path)
    return flow, path


# ---------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("as_text", [False, True], ids=["Path", "str"])
def test_what_is_saved_is_loaded(saved, as_text) -> None:
    flow, path = saved
    again = nvpflow.load(str(path) if as_text else path)
    assert again == flow
    assert again.spec == flow.spec
    for name, value in flow.parameters().items():
        assert_same_bits(again.parameters()[name], value, name)
    x = unit_data(40, 5, 1, flow.spec.dtype)
    assert_same_bits(again.log_prob(x), flow.log_prob(x), "log_prob")


def test_saving_twice_gives_the_same_bytes(saved, tmp_path) -> None:
    _, path = saved
    second = tmp_path / "second.safetensors"
    nvpflow.load(path).save(second)
    assert second.read_bytes() == path.read_bytes()


def test_names_of_columns_go_where_the_flow_goes(saved, tmp_path) -> None:
    flow, path = saved
    assert flow.column_names is None
    assert "nvpflow.column_names" not in read_container(path)[0]["__metadata__"]
    before = flow.log_prob(unit_data(9, 5, 1, flow.spec.dtype))
    names = ("east", "Höhe, m", "", 'a "b"', "")  # two columns may lack a name, not share one
    flow.column_names = names
    flow.save(path)
    assert json.loads(read_container(path)[0]["__metadata__"]["nvpflow.column_names"]) == list(names)
    others = [nvpflow.load(path), copy.copy(flow), copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))]
    for other in [*others, flow.to("cpu"), flow.astype("float64")]:
        assert other.column_names == names
    assert_same_bits(others[0].log_prob(unit_data(9, 5, 1, flow.spec.dtype)), before, "log_prob")
    others[0].column_names = None
    assert others[0].column_names is None
    assert flow.column_names == names
    assert others[0] == flow


def test_names_of_contexts_go_where_the_flow_goes(saved, tmp_path) -> None:
    plain, path = saved
    bytes_before = path.read_bytes()
    plain.context_names = None
    plain.save(path)
    assert path.read_bytes() == bytes_before
    with pytest.raises(ValueError, match="context_names holds 1 names, expected none: the flow has no context"):
        plain.context_names = ["a"]

    flow = nvpflow.build(3, 1, (4,), context_size=2, dtype=plain.spec.dtype, seed=3)
    flow.save(path)
    unnamed = read_container(path)[0]["__metadata__"]
    flow.context_names = names = ("Höhe, m", "")
    assert flow.column_names is None
    flow.save(path)
    named = read_container(path)[0]["__metadata__"]
    assert json.loads(named.pop("nvpflow.context_names")) == list(names)
    assert named == unnamed
    others = [nvpflow.load(path), copy.copy(flow), copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))]
    for other in [*others, flow.to("cpu"), flow.astype("float64")]:
        assert other.context_names == names
        assert other.column_names is None
    others[0].context_names = None
    assert others[0].context_names is None
    assert others[0] == flow
    for wrong, error, message in (
        ("ab", TypeError, r"context_names is 'ab' \(str\), expected a sequence of strings or None"),
        (["a", "a"], ValueError, "context_names holds 'a' twice, for columns 1 and 2"),
        (["a", "b", "c"], ValueError, "context_names holds 3 names, expected 2 or none"),
    ):
        with pytest.raises(error, match=message):
            flow.context_names = wrong
    assert flow.context_names == names


def test_damaged_names_of_contexts_are_refused(tmp_path) -> None:
    path = tmp_path / "flow.safetensors"
    flow = nvpflow.build(3, 1, (4,), context_size=2)
    flow.save(path)
    header, data = read_container(path)
    for text, message in (
        ('["a"]', "the array holds 1 values, expected an array of 2 strings"),
        ('["a",5]', "value 1 is not a string"),
        ("7", "the text is not an array"),
    ):
        header["__metadata__"]["nvpflow.context_names"] = text
        write_container(path, header, data)
        with pytest.raises(nvpflow.FileFormatError, match=f"nvpflow.context_names: {message}"):
            nvpflow.load(path)


def test_a_column_and_a_context_of_one_name_are_refused(tmp_path) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    flow = nvpflow.build(3, 1, (4,), context_size=2)
    flow.column_names, flow.context_names = ["a", "b", ""], ["c", ""]
    with pytest.raises(ValueError, match="'c' is the name of column 2 and of context column 1, expected names that di"):
        flow.column_names = ["a", "c", ""]
    with pytest.raises(ValueError, match="'b' is the name of column 2 and of context column 2, expected names that di"):
        flow.context_names = ["c", "b"]
    assert (flow.column_names, flow.context_names) == (("a", "b", ""), ("c", ""))
    flow.save(tmp_path / "flow")
    header, data = read_container(tmp_path / "flow")
    header["__metadata__"]["nvpflow.context_names"] = '["b","c"]'
    write_container(tmp_path / "flow", header, data)
    with pytest.raises(nvpflow.FileFormatError, match=r"nvpflow\.context_names: 'b' is the name of column 2 and"):
        nvpflow.load(tmp_path / "flow")
    rows = np.random.default_rng(0).normal(size=(60, 5))
    x, c = pandas.DataFrame(rows[:, :3], columns=list("pqr")), pandas.DataFrame(rows[:, 3:], columns=list("sq"))
    flow.column_names = flow.context_names = None
    with pytest.raises(ValueError, match="'q' is the name of column 2 and of context column 2"):
        flow.fit(x, context=c, epochs=1, progress=False)
    assert flow.column_names is flow.context_names is None


def test_reload_compares_names_of_contexts_where_both_have_some(tmp_path) -> None:
    flow = nvpflow.build(3, 1, (4,), context_size=2)
    other = nvpflow.Flow(flow.spec, seed=5)
    other.save(tmp_path / "unnamed")
    other.context_names = ["a", "b"]
    other.save(tmp_path / "named")
    flow.context_names = ["a", "c"]
    with pytest.raises(nvpflow.FileFormatError, match="named: context column 2 is 'b', expected 'c'"):
        flow.reload(tmp_path / "named")
    assert flow != other
    flow.reload(tmp_path / "unnamed")
    assert flow == other
    assert flow.context_names == ("a", "c")


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("abcde", TypeError, r"column_names is 'abcde' \(str\), expected a sequence of strings or None"),
        (5, TypeError, r"column_names is 5 \(int\), expected a sequence of strings or None"),
        ({"a", "b"}, TypeError, r"column_names is {.*} \(set\), expected a sequence of strings or None"),
        (["a", "b", 3, "d", "e"], TypeError, r"column_names\[2\] is 3 \(int\), expected a string"),
        (["a", "b"], ValueError, "column_names holds 2 names, expected 5 or none"),
        (["a", "b", "c", "d", "b"], ValueError, "column_names holds 'b' twice, for columns 2 and 5, expected a name"),
        (["a", "b", "c", "d", "\ud800"], ValueError, r"column_names\[4\] is .* expected valid Unicode"),
        (
            ["x" * (1 << 24), "b", "c", "d", "e"],
            ValueError,
            "column_names takes 16777236 bytes as JSON, expected at most",
        ),
    ],
)
def test_wrong_names_of_columns_change_nothing(saved, names, error, message) -> None:
    flow, _ = saved
    flow.column_names = tuple("abcde")
    with pytest.raises(error, match=message):
        flow.column_names = names
    assert flow.column_names == tuple("abcde")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["a","b","c","d"]', "the array holds 4 values, expected an array of 5 strings"),
        ('["a","b","c","d",5]', "value 4 is not a string"),
        ('{"a":1}', "the text is not an array"),
        ('["a","b"', "the text is not valid JSON"),
        ("[[[[[[[[[[]]]]]]]]]]", "the JSON is nested too deeply"),
    ],
)
def test_damaged_names_of_columns_are_refused(saved, text, message) -> None:
    _, path = saved
    header, data = read_container(path)
    header["__metadata__"]["nvpflow.column_names"] = text
    write_container(path, header, data)
    with pytest.raises(nvpflow.FileFormatError, match=f"nvpflow.column_names: {message}"):
        nvpflow.load(path)


def test_reload_compares_names_of_columns_where_both_have_some(saved, tmp_path) -> None:
    flow, unnamed = saved
    other = nvpflow.Flow(flow.spec, seed=5)
    other.column_names = tuple("abcde")
    other.save(tmp_path / "named")
    flow.column_names = tuple("abdce")
    kept = nvpflow.load(unnamed)
    with pytest.raises(nvpflow.FileFormatError, match="named: column 3 is 'c', expected 'd'"):
        flow.reload(tmp_path / "named")
    assert flow == kept
    flow.column_names = tuple("abcde")
    flow.reload(tmp_path / "named")
    assert flow == other
    flow.reload(unnamed)
    assert flow == kept
    assert flow.column_names == tuple("abcde")


@pytest.mark.filterwarnings("ignore:the flow is worse than a Gaussian")  # of one epoch
def test_a_threshold_goes_where_its_weights_go(saved, tmp_path) -> None:
    flow, path = saved
    assert flow.threshold is None
    before = path.read_bytes()
    x = unit_data(300, 5, 1, flow.spec.dtype)
    log_p = flow.log_prob(x).astype(np.float64)
    expected = (np.quantile(log_p, 0.05), 0.05)
    assert flow.fit_threshold(x, quantile=0.05) == flow.threshold == expected
    assert np.mean(flow.log_prob(x) < flow.threshold.log_p) == 0.05
    flow.save(path)
    kept = json.loads(read_container(path)[0]["__metadata__"]["nvpflow.threshold"])
    assert (kept["log_prob"], kept["quantile"]) == expected
    others = [nvpflow.load(path), copy.copy(flow), copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))]
    for other in [*others, flow.to("cpu"), flow.astype("float64")]:
        assert other.threshold == expected
    other = nvpflow.Flow(flow.spec, seed=5)
    other.swap(others[0])
    assert other.threshold == expected
    assert others[0].threshold is None
    others[0].reload(path)
    assert others[0].threshold == expected
    others[0].set_parameters(others[0].parameters())
    assert others[0].threshold is None
    others[1].fit(x, epochs=1, batch_size=50, progress=False)
    assert others[1].threshold is None
    flow.set_threshold(-3)
    flow.save(tmp_path / "unknown")
    assert nvpflow.load(tmp_path / "unknown").threshold == (-3.0, None)
    flow.set_threshold(None)
    assert flow.threshold is None
    flow.save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda flow, x: flow.set_threshold(np.nan), ValueError, "log_p is nan, expected a finite number of nats"),
        (lambda flow, x: flow.set_threshold("-3"), TypeError, r"log_p is '-3' \(str\), expected a real number"),
        (lambda flow, x: flow.set_threshold(-3, 1.5), ValueError, r"quantile is 1.5, expected a share .* in \[0, 1\]"),
        (lambda flow, x: flow.set_threshold(None, 0.5), ValueError, "quantile is 0.5 .*, expected None where log_p is"),
        (lambda flow, x: flow.fit_threshold(x, 2), ValueError, "quantile is 2.0, expected a share"),
        (lambda flow, x: flow.fit_threshold(x[:0]), ValueError, "x has no rows, expected at least one"),
        (lambda flow, x: flow.fit_threshold(x[:, :2]), ValueError, "x has shape"),
        (lambda flow, x: flow.fit_threshold(x * np.nan), ValueError, "x has 9 of 9 rows whose log p is not finite"),
    ],
)
def test_wrong_thresholds_change_nothing(saved, change, error, message) -> None:
    flow, _ = saved
    flow.set_threshold(-1, 0.5)
    with pytest.raises(error, match=message):
        change(flow, unit_data(9, 5, 1, flow.spec.dtype))
    assert flow.threshold == (-1, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"log_prob":-1}', "quantile is missing"),
        ('{"log_prob":"-1","quantile":null}', "log_prob is .*, expected a number"),
        ('{"log_prob":1e999,"quantile":null}', "the text is not valid JSON|log_prob is inf"),
        ('{"log_prob":-1,"quantile":-0.5}', "quantile is -0.5"),
        ('{"log_prob":-1,"quantile":0.5,"rows":3}', "'rows' is not a field"),
        ("[-1, 0.5]", "the text is not an object"),
        ("-1", "the text is not an object"),
    ],
)
def test_damaged_thresholds_are_refused(saved, text, message) -> None:
    _, path = saved
    header, data = read_container(path)
    header["__metadata__"]["nvpflow.threshold"] = text
    write_container(path, header, data)
    with pytest.raises(nvpflow.FileFormatError, match=f"nvpflow.threshold: ({message})"):
        nvpflow.load(path)


def test_saving_replaces_and_leaves_nothing_else(saved) -> None:
    _, path = saved
    other = nvpflow.build(input_size=9)
    other.save(path)
    assert nvpflow.load(path) == other
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_file_is_a_safetensors_file_under_the_published_names(saved) -> None:
    flow, path = saved
    header, data = read_container(path)
    metadata = header.pop("__metadata__")
    assert all(isinstance(value, str) for value in metadata.values())
    assert sorted(header) == sorted(flow.parameters())
    end = 0
    for name, value in flow.parameters().items():
        entry = header[name]
        assert entry["dtype"] == ("F32" if flow.spec.dtype == "float32" else "F64")
        assert tuple(entry["shape"]) == value.shape
        first, last = entry["data_offsets"]
        assert first == end
        end = last
        assert data[first:last] == value.tobytes()
    assert end == len(data)


def test_the_safetensors_package_reads_our_files(saved) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    flow, path = saved
    tensors = safetensors.load_file(path)
    assert set(tensors) == set(flow.parameters())
    for name, value in flow.parameters().items():
        assert_same_bits(tensors[name], value, name)


def test_we_read_the_files_of_the_safetensors_package(saved, tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    flow, path = saved
    written = tmp_path / "theirs.safetensors"
    metadata = read_container(path)[0]["__metadata__"]
    safetensors.save_file({name: value.copy() for name, value in flow.parameters().items()}, written, metadata)
    assert nvpflow.load(written) == flow


def test_tensors_alone_in_any_order_and_without_padding(make_flow, tmp_path) -> None:
    """As other writers leave them: no metadata, names sorted, header of any length."""
    flow, oracle = make_flow(6, 2, (8, 5), "relu", dtype="float32")
    header, chunks, offset = {}, [], 0
    for name in sorted(flow.parameters()):
        value = flow.parameters()[name]
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [offset, offset + value.nbytes]}
        chunks.append(value.tobytes())
        offset += value.nbytes
    path = tmp_path / "alone.safetensors"
    write_container(path, header, b"".join(chunks))
    loaded = nvpflow.load(path)
    assert loaded.spec == flow.spec
    x = unit_data(60, 6, 2, "float32")
    assert_within_budget(loaded.log_prob(x), oracle.log_prob(x), "float32", "log_prob")

    # The activation is in no tensor: the caller says it.
    spec = nvpflow.FlowSpec(6, 2, (8, 5), "tanh")
    other = nvpflow.load(path, spec=spec)
    assert other.spec == spec
    assert_within_budget(other.log_prob(x), oracle_of(other).log_prob(x), "float32", "log_prob")
    with pytest.raises(ValueError, match=r"flow_|hidden_sizes|num_flows|shape"):
        nvpflow.load(path, spec=nvpflow.FlowSpec(6, 2, (8, 4)))


def test_expecting_another_spec_is_refused(saved) -> None:
    flow, path = saved
    assert nvpflow.load(path, spec=flow.spec) == flow
    with pytest.raises(ValueError, match=r"activation|spec"):
        nvpflow.load(path, spec=nvpflow.FlowSpec(5, 3, (7, 6), "relu", 1.25, True, flow.spec.dtype))
    with pytest.raises(TypeError, match="spec"):
        nvpflow.load(path, spec="relu")


# ---------------------------------------------------------------------------------------------- golden files


def golden(name: str) -> Path:
    path = GOLDEN / name
    assert path.exists(), f"{path} is part of the repository"
    return path


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("golden_edifice_v0.safetensors", "edifice_v0"),
        ("golden_v1_f32.safetensors", "v1_f32"),
        ("golden_v1_f64.safetensors", "v1_f64"),
    ],
)
def test_golden_files_load_and_score_as_they_always_did(name, key) -> None:
    expected = np.load(golden("golden_expected.npz"))
    flow = nvpflow.load(golden(name))
    dtype = flow.spec.dtype
    x = expected[f"{key}_x"]
    assert x.dtype == np.dtype(dtype)
    oracle = oracle_of(flow)
    assert_within_budget(flow.log_prob(x), oracle.log_prob(x), dtype, "the oracle today")
    stored_z, stored_log_det = expected[f"{key}_z"], expected[f"{key}_log_det"]
    assert_within_budget(flow.log_prob(x), expected[f"{key}_log_prob"], dtype, "the scores of the day it was written")
    z, log_det = flow.forward(x)
    assert_within_budget(z, stored_z, dtype, "z")
    assert_within_budget(log_det, stored_log_det, dtype, "log_det")


# ---------------------------------------------------------------------------------------------- damage


def assert_refused(path: Path, match: str | None = None) -> None:
    with pytest.raises(nvpflow.FileFormatError, match=match):
        nvpflow.load(path)


def test_every_truncation_is_refused(saved) -> None:
    _, path = saved
    content = path.read_bytes()
    for length in [*range(200), *range(200, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:length])
        assert_refused(path)


def test_bytes_too_many_are_refused(saved) -> None:
    _, path = saved
    content = path.read_bytes()
    for extra in (b"\0", b"\0" * 64, content):
        path.write_bytes(content + extra)
        assert_refused(path)


def test_a_header_length_that_lies_is_refused_before_memory_is_taken(saved) -> None:
    _, path = saved
    content = path.read_bytes()
    for length in (0, 1, 2, len(content), 100_000_001, 2**40, 2**63 - 1, 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + content[8:])
        assert_refused(path)


TENSOR = "flow_1_scale.kernel"


def entry(**changes):
    """Changes the header's entry of one tensor; values may be functions of the entry."""

    def damage(header: dict) -> dict:
        old = header[TENSOR]
        return {**header, TENSOR: {**old, **{k: v(old) if callable(v) else v for k, v in changes.items()}}}

    return damage


def metadata(**changes):
    def damage(header: dict) -> dict:
        return {**header, "__metadata__": {**header["__metadata__"], **{f"nvpflow.{k}": v for k, v in changes.items()}}}

    return damage


def spec(**changes):
    def damage(header: dict) -> dict:
        new = {**json.loads(header["__metadata__"]["nvpflow.spec"]), **changes}
        return metadata(spec=json.dumps({key: value for key, value in new.items() if value is not None}))(header)

    return damage


def without(header: dict) -> dict:
    return {name: value for name, value in header.items() if name != TENSOR}


# Headers that contradict themselves or the model, each with what the message must hold.
LIES = {
    "negative size": (entry(shape=[-1, -18]), TENSOR),
    "huge size": (entry(shape=[2**62, 2**62]), TENSOR),
    "overflowing size": (entry(shape=[2**32, 2**32]), TENSOR),
    "transposed": (entry(shape=lambda old: old["shape"][::-1]), TENSOR),
    "flattened": (entry(shape=lambda old: [old["shape"][0] * old["shape"][1]]), TENSOR),
    "fractional size": (entry(shape=[1.5, 2]), TENSOR),
    "string size": (entry(shape="big"), TENSOR),
    "unknown dtype": (entry(dtype="I4"), TENSOR),
    "other dtype": (entry(dtype="BF16"), TENSOR),
    "swapped offsets": (entry(data_offsets=lambda old: old["data_offsets"][::-1]), TENSOR),
    "offsets beyond the end": (
        entry(data_offsets=lambda old: [10**9 + at for at in old["data_offsets"]]),
        "flow_1_scale",
    ),
    "negative offsets": (entry(data_offsets=[-8, 64]), TENSOR),
    "overlapping tensors": (entry(data_offsets=lambda old: [at - 4 for at in old["data_offsets"]]), "flow_1"),
    "one offset": (entry(data_offsets=lambda old: old["data_offsets"][:1]), TENSOR),
    "no shape": (lambda header: {**header, TENSOR: {"dtype": "F32", "data_offsets": [0, 4]}}, TENSOR),
    "an entry that is a number": (lambda header: {**header, TENSOR: 3}, TENSOR),
    "a tensor missing": (without, "flow_1_scale"),
    "a tensor renamed": (lambda header: {**without(header), "flow_1_scale.weights": header[TENSOR]}, "flow_1_scale"),
    "metadata of numbers": (lambda header: {**header, "__metadata__": {"nvpflow.format_version": 1}}, "metadata"),
    "newer major version": (metadata(format_version="2.0"), r"2\.0"),
    "no version": (metadata(format_version="soon"), "soon"),
    "spec that is no JSON": (metadata(spec="{"), "spec"),
    "spec of another size": (spec(input_size=7), "shape|input_size"),
    "spec with an unknown key": (spec(flavour=1), "flavour"),
    "spec without layers": (spec(layers=None), "layers"),
    "spec with an unknown layer": (spec(layers=[{"kind": "spline"}]), "spline"),
    "spec too large to be": (spec(input_size=2**50), "input_size"),
    "dtype of neither": (metadata(dtype="float16"), "float16"),
}


@pytest.mark.parametrize("case", LIES)
def test_headers_that_lie_are_refused_and_named(saved, case) -> None:
    _, path = saved
    header, data = read_container(path)
    damage, message = LIES[case]
    write_container(path, header, data)
    nvpflow.load(path)
    write_container(path, damage(header), data)
    assert_refused(path, message)


def test_a_newer_minor_version_loads(saved) -> None:
    flow, path = saved
    header, data = read_container(path)
    header["__metadata__"]["nvpflow.format_version"] = "1.7"
    header["__metadata__"]["nvpflow.something_new"] = "ignored"
    write_container(path, header, data)
    assert nvpflow.load(path) == flow


def test_parameters_that_are_not_finite_are_refused(saved) -> None:
    flow, path = saved
    content = bytearray(path.read_bytes())
    content[-np.dtype(flow.spec.dtype).itemsize :] = np.array(np.nan, flow.spec.dtype).tobytes()
    path.write_bytes(content)
    assert_refused(path, "flow_2_translation.bias")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"PK\3\4" + b"\0" * 100,
        b"\x93NUMPY" + b"\0" * 100,
        b"\x89HDF\r\n\x1a\n" * 10,
        b"\0" * 64,
        b"\xff" * 64,
    ],
    ids=["empty", "short", "zip", "npy", "hdf5", "zeros", "ones"],
)
def test_foreign_files_are_refused(tmp_path, content) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    assert_refused(path)


def test_a_zip_archive_is_called_one(tmp_path) -> None:
    path = tmp_path / "model.pt"
    with path.open("wb") as file:
        np.savez(file, weight=np.zeros(3))
    with pytest.raises(nvpflow.FileFormatError, match=r"model\.pt: not a safetensors file but a zip archive, as torch"):
        nvpflow.load(path)


def test_deep_and_wide_json_is_refused_without_harm(tmp_path) -> None:
    path = tmp_path / "deep"
    for text in (
        b"[" * 1_000_000,
        b'{"a":' * 200_000,
        b'{"__metadata__": ' + b"[" * 500_000,
        b'{"a": "' + b"x" * 5_000_000,
    ):
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        assert_refused(path)


@pytest.mark.parametrize(
    ("training", "error", "message"),
    [
        (
            '{"key": {"flow": ' + "[" * 300_000 + "]" * 300_000 + '}, "adam_steps": 0, "best_epoch": 0}',
            None,
            "too deeply",
        ),
        ('{"key": {"flow": "' + "x" * 3_000_000 + '"}, "adam_steps": 0, "best_epoch": 0}', ValueError, "another run"),
        ('{"key": {}, "key": {}, "adam_steps": 0, "best_epoch": 0}', None, "twice"),
    ],
    ids=["deep", "endless", "repeated"],
)
def test_a_hostile_checkpoint_is_refused_in_a_few_words(tmp_path, training, error, message) -> None:
    path = tmp_path / "checkpoint"
    write_container(path, {"__metadata__": {"nvpflow.training": training}}, b"")
    rows = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    with pytest.raises(error or nvpflow.FileFormatError, match=message) as raised:
        nvpflow.build(2, 1, (2,)).fit(rows, batch_size=10, epochs=1, checkpoint=path, progress=False)
    assert len(str(raised.value)) < 4000


# ---------------------------------------------------------------------------------------------- the operating system


def test_a_missing_file(tmp_path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        nvpflow.load(tmp_path / "nowhere.safetensors")
    assert raised.value.errno == errno.ENOENT
    assert "nowhere.safetensors" in str(raised.value)


def test_a_directory(tmp_path) -> None:
    flow = nvpflow.build(input_size=4)
    for call in (lambda: nvpflow.load(tmp_path), lambda: flow.save(tmp_path)):
        with pytest.raises(OSError, match=tmp_path.name) as raised:
            call()
        assert raised.value.errno == errno.EISDIR
    with pytest.raises(FileNotFoundError):
        flow.save(tmp_path / "no" / "such" / "folder.safetensors")


def test_a_path_must_be_a_path() -> None:
    flow = nvpflow.build(input_size=4)
    for bad in (3, None, ["a"]):
        with pytest.raises(TypeError, match="path"):
            nvpflow.load(bad)
        with pytest.raises(TypeError, match=r"path|str"):
            flow.save(bad)
    for bad in ("a\0b", b"a\0b"):
        with pytest.raises((ValueError, TypeError, OSError)):
            flow.save(bad)
        with pytest.raises((ValueError, TypeError, OSError)):
            nvpflow.load(bad)


def test_names_that_are_not_ascii(tmp_path) -> None:
    flow = nvpflow.build(input_size=4)
    path = tmp_path / "модель ü 流.safetensors"
    flow.save(path)
    assert nvpflow.load(path) == flow


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path) -> None:
    path = tmp_path / "locked.safetensors"
    flow = nvpflow.build(input_size=4)
    flow.save(path)
    path.chmod(0)
    with pytest.raises(PermissionError):
        nvpflow.load(path)


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_keeps_the_old_file(run_python, tmp_path) -> None:
    path = tmp_path / "flow.safetensors"
    old = nvpflow.build(input_size=4, num_flows=1, hidden_sizes=(3,))
    old.save(path)
    before = path.read_bytes()
    output = run_python(
        """
import resource, signal, sys
import nvpflow
flow = nvpflow.build(input_size=64, num_flows=4, hidden_sizes=(256,))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    flow.save(sys.argv[1])
except OSError as error:
    print(error.errno, sys.argv[1] in str(error))
""",
        path,
    )
    assert output.split() == [str(errno.EFBIG), "True"]
    assert path.read_bytes() == before
    assert nvpflow.load(path) == old
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name], "a temporary file was left behind"


def test_a_symbolic_link_stays_a_link(tmp_path) -> None:
    flow, other = nvpflow.build(input_size=4), nvpflow.build(input_size=5)
    target, link = tmp_path / "target", tmp_path / "link"
    flow.save(target)
    link.symlink_to(target)
    other.save(link)
    assert link.is_symlink()
    assert nvpflow.load(target) == other


def test_weights_that_are_not_finite_are_not_saved(tmp_path) -> None:
    flow = nvpflow.build(input_size=4, num_flows=1, hidden_sizes=())
    parameters = {name: value.copy() for name, value in flow.parameters().items()}
    parameters["flow_0_scale.bias"][0] = np.inf
    flow.set_parameters(parameters)
    with pytest.raises(ValueError, match=r"flow_0_scale\.bias"):
        flow.save(tmp_path / "bad.safetensors")
    assert not list(tmp_path.iterdir())


def test_files_are_closed_whatever_number_they_have(make_flow, tmp_path, run_python) -> None:
    path = tmp_path / "model.safetensors"
    make_flow(3)[0].save(path)
    (tmp_path / "damaged").write_bytes(path.read_bytes()[:-1])
    script = """
import os, sys, nvpflow
folder = sys.argv[1]
os.close(0)
for turn in range(2):
    flow = nvpflow.load(folder + "/model.safetensors")
    flow.save(folder + "/copy")
    try:
        nvpflow.load(folder + "/damaged")
    except nvpflow.FileFormatError:
        pass
    number = os.open(folder, os.O_RDONLY)
    os.close(number)
    print(number)
"""
    assert run_python(script, tmp_path).split() == ["0", "0"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's")
@pytest.mark.skipif(bool(os.environ.get("NVPFLOW_SANITIZED")), reason="a sanitizer takes all addresses there are")
def test_a_model_that_does_not_fit_in_memory_says_so(tmp_path, run_python) -> None:
    width = 1 << 16
    layer = {
        "kind": "coupling",
        "swapped": False,
        "hidden_sizes": [width, width],
        "activation": "relu",
        "scale_bound": 1,
    }
    shapes = {
        "coupling_dense_0.kernel": (1, width), "coupling_dense_0.bias": (width,),
        "coupling_dense_1.kernel": (width, width), "coupling_dense_1.bias": (width,),
        "scale.kernel": (width, 1), "scale.bias": (1,), "translation.kernel": (width, 1), "translation.bias": (1,),
    }  # fmt: skip
    spec = {"input_size": 2, "dtype": "float32", "layers": [layer]}
    metadata = {"nvpflow.format_version": "1.0", "nvpflow.dtype": "float32", "nvpflow.spec": json.dumps(spec)}
    header, end = {"__metadata__": metadata}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[f"flow_0_{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    try:
        os.truncate(path, 8 + len(text) + end)  # of which the disk holds the header alone
    except OSError as error:
        if error.errno not in (errno.EFBIG, errno.ENOSPC):
            raise
        pytest.skip("the file system takes no sparse file of that size")
    script = """
import resource, sys
import numpy as np
import nvpflow
rows, flow = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32), nvpflow.build(2, 1, (4,))
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30),) * 2)
for call in (lambda: nvpflow.load(sys.argv[1]), lambda: flow.fit(rows, batch_size=8, checkpoint=sys.argv[1])):
    try:
        call()
    except MemoryError as error:
        print(error)
"""
    message = f"{path}: no memory for {end} bytes of tensor data\n"
    assert run_python(script, path) == 2 * message
