"""`nvpflow.blame`: what a row would gain by a better value of one column, held against closed forms."""

from __future__ import annotations

import numpy as np
import nvpflow
import pytest


def gaussian_flow(dtype: str, seed: int = 0) -> tuple[nvpflow.Flow, np.ndarray, np.ndarray]:
    """Return a flow that is a Gaussian, its mean and its precision: couplings without hidden layers that only shift."""
    rng = np.random.default_rng(seed)
    flow = nvpflow.build(4, num_flows=2, hidden_sizes=(), standardize=True, dtype=dtype)
    parameters = {name: np.zeros_like(value) for name, value in flow.parameters().items()}
    mean, log_std = rng.normal(size=4) * 10, rng.normal(size=4)
    first, second = rng.normal(size=(2, 2)), rng.normal(size=(2, 2))
    parameters["standardize_0.mean"][:], parameters["standardize_0.log_std"][:] = mean, log_std
    parameters["flow_0_translation.kernel"][:] = first
    parameters["flow_1_translation.kernel"][:] = second
    flow.set_parameters(parameters)
    # z = A S (x - mean): the first coupling shifts columns 2 and 3 by those before them, the second the other way.
    one, two = np.eye(4), np.eye(4)
    one[2:, :2], two[:2, 2:] = first.T, second.T
    whole = two @ one @ np.diag(np.exp(-log_std))
    return flow, mean, whole.T @ whole


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("float64", 1e-5)])
def test_blame_of_a_gaussian_has_its_closed_form(dtype, tolerance) -> None:
    flow, mean, precision = gaussian_flow(dtype)
    x = flow.sample(200, seed=3)
    x[::4, 1] += 3
    expected = ((x - mean) @ precision) ** 2 / (2 * np.diag(precision))
    found = nvpflow.blame(flow, x)
    assert found.dtype == np.dtype(dtype)
    assert found.shape == x.shape
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * 10)


def test_a_row_alone_has_what_it_has_in_a_batch(make_flow) -> None:
    flow, _ = make_flow(5, 3, (16,), "tanh", dtype="float32", standardize=True)
    x = flow.sample(7000, seed=1)  # more than one block
    whole = nvpflow.blame(flow, x)
    assert (whole >= 0).all()
    for i in (0, 6999):
        one = nvpflow.blame(flow, x[i])
        assert one.shape == (5,)
        assert one.tobytes() == whole[i].tobytes()
    assert nvpflow.blame(flow, x[:0]).shape == (0, 5)


def test_rows_that_are_not_finite_or_have_no_density() -> None:
    flow = gaussian_flow("float32")[0]
    x = flow.sample(4, seed=0)
    good = nvpflow.blame(flow, x[3])
    x[0, 2] = np.nan
    x[1, 0] = np.inf
    x[2, 3] = 3e38
    found = nvpflow.blame(flow, x)
    assert np.isnan(found[:2]).all()
    assert found[2, 3] == np.inf
    assert (found[2, :3] == 0).all()  # no other column makes it better
    assert found[3].tobytes() == good.tobytes()


def test_frames_keep_their_names_and_index() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    flow, _, _ = gaussian_flow("float64")
    x = flow.sample(5, seed=0)
    frame = pandas.DataFrame(x, columns=list("abcd"), index=list("vwxyz"))
    frame.loc["x", "c"] += 1e3
    found = nvpflow.blame(flow, frame)
    assert list(found.columns) == list("abcd")
    assert list(found.index) == list("vwxyz")
    np.testing.assert_array_equal(found.to_numpy(), nvpflow.blame(flow, frame.to_numpy()))
    assert found.loc["x", "c"] == found.to_numpy().max()
    nullable = nvpflow.blame(flow, frame.astype("Float64"))
    np.testing.assert_array_equal(nullable.to_numpy(), found.to_numpy())
    flow.column_names = ("a", "b", "d", "c")
    with pytest.raises(ValueError, match="x has"):
        nvpflow.blame(flow, frame)


@pytest.mark.parametrize("kind", ["array", "list", "integers"])
def test_rows_far_from_zero_keep_their_digits_in_a_float32_flow(kind) -> None:
    """The values that are tried must differ where float32 holds one of them only."""
    wide, mean, _ = gaussian_flow("float64")
    parameters = {name: value.copy() for name, value in wide.parameters().items()}
    parameters["standardize_0.mean"][:] = mean + 1e9
    parameters["standardize_0.log_std"][:] = 2
    wide.set_parameters(parameters)
    x = wide.sample(6, seed=1)
    x = np.round(x).astype(np.int64) if kind == "integers" else x
    found = nvpflow.blame(wide.astype("float32"), x.tolist() if kind == "list" else x)
    np.testing.assert_allclose(found, nvpflow.blame(wide, x.astype(np.float64)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lists_are_taken_as_the_flow_takes_them(dtype) -> None:
    flow, _, _ = gaussian_flow(dtype)
    x = flow.sample(2, seed=0)
    wide = x.astype(np.float64)  # what a list of floats is for NumPy
    np.testing.assert_array_equal(nvpflow.blame(flow, x.tolist()), nvpflow.blame(flow, wide))
    np.testing.assert_array_equal(nvpflow.blame(flow, tuple(x[0].tolist())), nvpflow.blame(flow, wide[0]))
    plain = nvpflow.build(4, 2, (4,), standardize=False, dtype=dtype)
    np.testing.assert_array_equal(nvpflow.blame(plain, x.tolist()), nvpflow.blame(plain, x))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("model.safetensors", np.zeros((2, 4))), TypeError, "flow is 'model.safetensors' .*, expected a Flow"),
        ((None, np.zeros((2, 3))), ValueError, "x has shape"),
        ((None, np.zeros((2, 4), complex)), TypeError, "x has dtype complex128"),
    ],
)
def test_what_is_refused(arguments, kind, message) -> None:
    flow, rows = arguments
    with pytest.raises(kind, match=message):
        nvpflow.blame(gaussian_flow("float64")[0] if flow is None else flow, rows)
