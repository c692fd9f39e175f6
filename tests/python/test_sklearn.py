"""The estimators keep scikit-learn's conventions, and are the flow that they wrap, bit for bit."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import nvpflow
import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed (pip install scikit-learn)")

from nvpflow.layers import LULinear
from nvpflow.sklearn import FlowDensity, FlowOutlierDetector
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

SMALL = {"num_flows": 2, "hidden_sizes": (16,), "epochs": 3, "random_state": 0}
# These want the same model of a row of weight 2 as of that row twice, which no random order of rows gives. That a row
# of weight 0 is as if absent, and that an expected gradient is the same, test_sample_weight.py holds.
OF_REPEATED_ROWS = {"check_sample_weight_equivalence_on_dense_data": "rows are visited in a random order"}
BOTH = pytest.mark.parametrize("estimator", [FlowDensity, FlowOutlierDetector])


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(300, 3))


@pytest.fixture(scope="module")
def frame(x):
    return pytest.importorskip("pandas", reason="pandas is not installed").DataFrame(x, columns=["a", "b", "c"])


@BOTH
@pytest.mark.parametrize("options", [{}, {"hidden_sizes": (8,), "epochs": 2}], ids=["defaults", "small"])
def test_check_estimator(estimator, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nvpflow.DataWarning)  # its tables have few rows
        results = check_estimator(estimator(**options), on_skip=None, expected_failed_checks=OF_REPEATED_ROWS)
    passed = [result for result in results if result["status"] == "passed"]
    # One check runs only where SciPy's array API is switched on.
    others = {"check_array_api_input", *OF_REPEATED_ROWS}
    assert {r["check_name"] for r in results if r["status"] != "passed"} <= others
    assert len(passed) > 40


# ---------------------------------------------------------------------------------------------------- density


def test_density_is_the_flow_bit_for_bit(x):
    density = FlowDensity(**SMALL, learning_rate=3e-3, clip_norm=1.0).fit(x)
    flow = nvpflow.build(3, 2, (16,), standardize=True, seed=0)
    history = flow.fit(x, epochs=3, learning_rate=3e-3, clip_norm=1.0, seed=0, progress=False)
    assert density.flow_ == flow
    assert (density.n_iter_, density.n_features_in_) == (3, 3)
    assert np.array_equal(density.history_.validation_loss, history.validation_loss)
    expected = flow.log_probability(x)
    assert np.array_equal(density.score_samples(x), expected.astype(np.float64))
    assert density.score(x) == expected.astype(np.float64).mean()
    assert np.array_equal(density.sample(5, random_state=3), flow.sample(5, seed=3))


def test_density_of_a_gaussian_is_found(x):
    held_out = np.random.default_rng(1).normal(size=(2000, 3))
    density = FlowDensity(**SMALL | {"epochs": 20}).fit(10 + 5 * x)
    entropy = 1.5 * (1 + np.log(2 * np.pi)) + 3 * np.log(5)
    assert density.score(10 + 5 * held_out) == pytest.approx(-entropy, abs=0.25)
    drawn = density.sample(4000, random_state=0)
    assert np.allclose(drawn.mean(axis=0), 10, atol=0.8)
    assert np.allclose(drawn.std(axis=0), 5, atol=0.8)


def test_random_state(x):
    def fitted(state):
        return FlowDensity(**SMALL | {"random_state": state}).fit(x).flow_

    assert fitted(1) == fitted(1)
    assert fitted(1) != fitted(2)
    assert fitted(np.random.RandomState(5)) == fitted(np.random.RandomState(5))
    np.random.seed(3)  # noqa: NPY002  # what None means to scikit-learn
    first = fitted(None)
    assert first != fitted(None)
    np.random.seed(3)  # noqa: NPY002
    assert first == fitted(None)
    density = FlowDensity(**SMALL).fit(x)
    generator = np.random.RandomState(0)
    assert not np.array_equal(density.sample(3, generator), density.sample(3, generator))


def test_n_jobs_changes_nothing_but_threads(x):
    one = FlowDensity(**SMALL).fit(x)
    two = FlowDensity(**SMALL, n_jobs=2).fit(x)
    assert (one.flow_.num_threads, two.flow_.num_threads) == (1, 2)
    assert one.flow_ == two.flow_
    one.set_params(n_jobs=2).score_samples(x)
    assert one.flow_.num_threads == 2


def test_validation_rows(x):
    assert FlowDensity(**SMALL).fit(x).history_.validation_rows == 30
    few = FlowDensity(**SMALL, validation_fraction=0.001).fit(x).history_
    assert (few.train_rows, few.validation_rows, few.folds) == (300, 300, 5)
    assert FlowDensity(**SMALL, folds=3).fit(x).history_.folds == 3
    assert FlowDensity(**SMALL, validation_fraction=None).fit(x).history_.validation_rows == 0
    # Steps so large that an epoch soon makes things worse.
    wild = {"learning_rate": 0.1, "schedule": "constant", "epochs": 200, "patience": 1}
    density = FlowDensity(**SMALL | wild, validation_fraction=None).fit(x, X_val=x[:50])
    assert (density.history_.train_rows, density.history_.validation_rows) == (300, 50)
    assert density.history_.stop_reason == "patience"
    assert density.n_iter_ == len(density.history_) < 200


@pytest.mark.filterwarnings("ignore::nvpflow.DataWarning")
def test_tables_of_few_rows_begin_as_a_gaussian(x):
    def whitens(rows, **options):
        return FlowDensity(**SMALL | {"epochs": 1}, **options).fit(rows).flow_.spec.layers[1] == LULinear(whitens=True)

    assert whitens(x[:149])
    assert not whitens(x[:150])
    assert not whitens(x[:149], standardize="auto")
    assert not whitens(x[:149], base="student_t")
    assert not whitens(x[:99], context_features=1)
    assert not whitens(x[:149], mask=[[True, False, True], [False, True, False]])
    assert whitens(x, standardize="covariance")
    begun = FlowDensity(**SMALL).partial_fit(x[:100]).flow_
    assert begun.spec.layers[1] != LULinear(whitens=True)


@pytest.mark.filterwarnings("ignore::nvpflow.DataWarning")
def test_features_that_follow_from_others_are_kept_on_request(x):
    copied = np.column_stack([x, x[:, 0] - x[:, 1]])
    with pytest.raises(ValueError, match="allow_degenerate=True"):
        FlowDensity(**SMALL).fit(copied)
    for standardize in (None, "covariance"):
        density = FlowDensity(**SMALL, standardize=standardize, allow_degenerate=True).fit(copied)
        assert np.isfinite(density.score_samples(copied)).all()


def test_small_data_takes_smaller_batches(x):
    with pytest.warns(nvpflow.DataWarning, match="3 rows are few for 3 columns"):
        assert FlowDensity(**SMALL).fit(x[:3]).history_.folds == 3
    with pytest.warns(nvpflow.DataWarning, match="2 rows are few"):
        assert FlowDensity(**SMALL, validation_fraction=None).fit(x[:2]).history_.train_rows == 2


def test_verbose_prints_every_so_many_epochs(x, capsys):
    FlowDensity(**SMALL | {"epochs": 5}, verbose=2).fit(x)
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out] == ["FlowDensity epoch 2/5", "FlowDensity epoch 4/5"]
    assert "validation" in out[0]
    FlowDensity(**SMALL, verbose=True, validation_fraction=None).fit(x)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3
    assert "validation" not in out[0]


# --------------------------------------------------------------------------------------------------- outliers


def test_outliers_are_found(x, tmp_path):
    planted = np.vstack([x, np.full((6, 3), 6.0) * np.array([1, -1, 1])])
    detector = FlowOutlierDetector(**SMALL, contamination=6 / 306)
    verdict = detector.fit_predict(planted)
    assert np.flatnonzero(verdict == -1).tolist() == list(range(300, 306))
    scores = detector.score_samples(planted)
    assert np.array_equal(detector.decision_function(planted), scores - detector.offset_)
    assert detector.offset_ == np.quantile(scores, 6 / 306)
    assert np.array_equal(detector.predict(planted), np.where(scores < detector.offset_, -1, 1))
    assert detector.flow_.threshold == (detector.offset_, 6 / 306)
    detector.flow_.save(tmp_path / "model.safetensors")
    assert nvpflow.load(tmp_path / "model.safetensors").threshold == detector.flow_.threshold
    again = pickle.loads(pickle.dumps(detector))
    again.offset_ = -7
    assert again.flow_.threshold == (-7, None)
    assert np.array_equal(again.predict(planted), np.where(scores < -7, -1, 1))
    again.flow_.set_parameters(again.flow_.parameters())
    assert not hasattr(again, "offset_")
    with pytest.raises(AttributeError, match="its weights were replaced after fit"):
        again.predict(planted)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_contamination_is_the_share_of_outliers(x, share):
    verdict = FlowOutlierDetector(**SMALL, contamination=share).fit_predict(x)
    assert (verdict == -1).mean() == pytest.approx(share, abs=1 / 300)


def test_a_row_that_overflows_is_an_outlier(x):
    far = np.array([[3e38, 3e38, 3e38], [0, 0, 0]])
    detector = FlowOutlierDetector(**SMALL).fit(x)
    assert detector.score_samples(far)[0] == -np.inf
    assert detector.predict(far).tolist() == [-1, 1]


@pytest.mark.parametrize("share", [0, -0.1, 0.6, float("nan")])
def test_contamination_out_of_range(x, share):
    with pytest.raises(ValueError, match=r"contamination is .*, expected a share of the rows in \(0, 0.5\]"):
        FlowOutlierDetector(contamination=share).fit(x)


@pytest.mark.parametrize("share", ["auto", None, True])
def test_contamination_of_a_wrong_type(x, share):
    with pytest.raises(TypeError, match=r"contamination is .*, expected a real number"):
        FlowOutlierDetector(contamination=share).fit(x)


# ----------------------------------------------------------------------------------------------- conventions


@BOTH
def test_clone_and_pickle(estimator, x):
    fitted = estimator(**SMALL).fit(x)
    again = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(again.score_samples(x), fitted.score_samples(x))
    assert not hasattr(clone(fitted), "flow_")
    assert clone(fitted).fit(x).flow_ == fitted.flow_


def test_grid_search(x):
    grid = {"num_flows": [1, 2], "hidden_sizes": [(4,), (8, 8)]}
    search = GridSearchCV(FlowDensity(**SMALL), grid, cv=3).fit(x)
    scores = search.cv_results_["mean_test_score"]
    assert len(scores) == 4
    assert len(set(scores)) == 4
    assert search.best_score_ == scores.max()
    assert search.best_estimator_.flow_.spec.hidden_sizes == search.best_params_["hidden_sizes"]


def test_pipeline_with_frames(frame):
    pipeline = make_pipeline(StandardScaler().set_output(transform="pandas"), FlowDensity(**SMALL)).fit(frame)
    assert pipeline[-1].feature_names_in_.tolist() == ["a", "b", "c"]
    assert np.isfinite(pipeline.score(frame))
    assert isinstance(pipeline[-1].sample(2), np.ndarray)


def test_feature_names(frame):
    density = FlowDensity(**SMALL).fit(frame)
    assert density.feature_names_in_.tolist() == ["a", "b", "c"]
    assert density.flow_.column_names == ("a", "b", "c")
    with pytest.raises(ValueError, match="must be in the same order"):
        density.score_samples(frame[["b", "a", "c"]])
    with pytest.raises(ValueError, match="feature names should match"):
        FlowDensity(**SMALL).fit(frame, X_val=frame.rename(columns={"a": "d"}))
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        density.score_samples(frame.to_numpy())
    assert not hasattr(density.fit(frame.to_numpy()), "feature_names_in_")
    assert density.flow_.column_names is None


def test_docstrings_name_every_parameter_and_attribute(x):
    for estimator in (FlowDensity, FlowOutlierDetector):
        fitted = estimator(**SMALL).fit(x)
        assert "{" not in estimator.__doc__
        for name in [*fitted.get_params(), *(n for n in vars(fitted) if n.endswith("_"))]:
            assert name in estimator.__doc__, name


@BOTH
@pytest.mark.parametrize("method", ["score_samples", "sample", "decision_function", "predict"])
def test_unfitted(estimator, method, x):
    if hasattr(estimator, method):
        with pytest.raises(NotFittedError):
            getattr(estimator(), method)(3 if method == "sample" else x)


# --------------------------------------------------------------------------------------------- context_features


@pytest.fixture(scope="module")
def given():
    """Rows of four features: the second and the last one condition the others."""
    rng = np.random.default_rng(5)
    c = rng.normal([0, 30], 1, size=(500, 2))
    own = (c - np.array([0, 30])) @ [[1.0, -1.0], [0.5, 0.3]] + 0.5 * rng.normal(size=(500, 2))
    return np.column_stack([own[:, 0], c[:, 0], own[:, 1], c[:, 1]])


@pytest.fixture(scope="module")
def given_frame(given):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    return pandas.DataFrame(given, columns=["a", "hour", "b", "load"])


OWN, GIVEN = [0, 2], [1, 3]
OF_CONTEXT = SMALL | {"num_flows": 4, "epochs": 30, "context_features": [1, 3]}


def test_a_conditional_density_is_the_flow_bit_for_bit(given):
    density = FlowDensity(**OF_CONTEXT).fit(given)
    flow = nvpflow.build(2, 4, (16,), context_size=2, seed=0)
    flow.fit(given[:, OWN], context=given[:, GIVEN], epochs=30, progress=False)
    assert density.flow_ == flow
    assert density.context_features_.tolist() == GIVEN
    assert density.n_features_in_ == 4
    expected = flow.log_prob(given[:, OWN], context=given[:, GIVEN]).astype(np.float64)
    assert np.array_equal(density.score_samples(given), expected)
    assert density.score(given) == expected.mean()
    one, many = given[0, GIVEN], given[:7, GIVEN]
    assert np.array_equal(density.sample(5, random_state=3, context=one), flow.sample(5, seed=3, context=one))
    assert np.array_equal(density.sample(5, random_state=3, context=many), flow.sample(5, seed=3, context=many))
    assert np.array_equal(density.condition(one).log_prob(given[:5, OWN]), flow.log_prob(given[:5, OWN], context=one))
    again = pickle.loads(pickle.dumps(density))
    assert np.array_equal(again.score_samples(given), expected)


@pytest.mark.filterwarnings("ignore:the flow is worse than a Gaussian")  # of few epochs
def test_ways_to_name_the_context(given, given_frame):
    expected = FlowDensity(**OF_CONTEXT).fit(given)
    by_name = FlowDensity(**OF_CONTEXT | {"context_features": ["hour", "load"]}).fit(given_frame)
    assert by_name.flow_ == expected.flow_
    assert (by_name.flow_.column_names, by_name.flow_.context_names) == (("a", "b"), ("hour", "load"))
    assert np.array_equal(by_name.score_samples(given_frame), expected.score_samples(given))
    assert by_name.feature_names_in_.tolist() == ["a", "hour", "b", "load"]
    by_index = FlowDensity(**OF_CONTEXT | {"context_features": given_frame.columns[GIVEN]}).fit(given_frame)
    assert by_index.flow_ == expected.flow_
    last = FlowDensity(**OF_CONTEXT | {"context_features": 2}).fit(given[:, OWN + GIVEN])
    assert last.flow_ == expected.flow_
    turned = FlowDensity(**OF_CONTEXT | {"context_features": np.array([3, 1])}).fit(given)
    assert turned.context_features_.tolist() == [3, 1]
    assert np.array_equal(turned.flow_.parameters()["context.mean"], expected.flow_.parameters()["context.mean"][::-1])
    none = FlowDensity(**OF_CONTEXT | {"context_features": []}).fit(given)
    assert none.flow_ == FlowDensity(**OF_CONTEXT | {"context_features": None}).fit(given).flow_
    with pytest.raises(ValueError, match="context has columns in another order"):
        by_name.sample(1, context=given_frame[["load", "hour"]])
    assert by_name.sample(1, context=given_frame[["hour", "load"]]).shape == (500, 1, 2)


@pytest.mark.filterwarnings("ignore:the flow is worse than a Gaussian")  # of few epochs
def test_names_of_what_is_sampled(given, given_frame):
    density = FlowDensity(**OF_CONTEXT | {"epochs": 1}).fit(given)
    assert density.get_feature_names_out().tolist() == ["x0", "x2"]
    assert density.get_feature_names_out(["p", "q", "r", "s"]).tolist() == ["p", "r"]
    density.fit(given_frame)
    assert density.get_feature_names_out().tolist() == ["a", "b"]
    assert density.get_feature_names_out(given_frame.columns).tolist() == ["a", "b"]
    for wrong in (["a", "b"], ["a", "b", "c", "d"]):
        with pytest.raises(ValueError, match="expected the 4 names that fit saw"):
            density.get_feature_names_out(wrong)
    assert FlowDensity(**SMALL).fit(given).get_feature_names_out().tolist() == ["x0", "x1", "x2", "x3"]


def test_one_feature_given_others(given):
    density = FlowDensity(**OF_CONTEXT | {"context_features": 2}).fit(given[:, [0, 1, 3]])
    spread = np.sqrt(0.5**2)
    entropy = 0.5 * np.log(2 * np.pi * np.e * spread**2)
    assert density.score(given[:, [0, 1, 3]]) == pytest.approx(-entropy, abs=0.15)
    assert density.sample(3, context=[0.0, 30.0]).shape == (3, 1)


def test_validation_rows_with_their_context(given):
    density = FlowDensity(**OF_CONTEXT).fit(given[:400], X_val=given[400:])
    assert density.history_.validation_rows == 100
    flow = nvpflow.build(2, 4, (16,), context_size=2)
    held_out = given[400:, OWN], given[400:, GIVEN]
    flow.fit(given[:400, OWN], context=given[:400, GIVEN], validation=held_out, epochs=30, progress=False)
    assert density.flow_ == flow


@pytest.mark.filterwarnings("ignore:the flow is worse than a Gaussian")  # of few epochs
def test_outliers_given_a_context(given):
    """A row that is ordinary among all and odd under its context."""
    odd = np.vstack([given, [[0.0, 2.0, 2.0, 30.0]]])  # the mean of a is 2 there
    detector = FlowOutlierDetector(**OF_CONTEXT, contamination=0.01).fit(given)
    assert detector.predict(odd)[-1] == -1
    assert detector.decision_function(odd)[-1] < -5
    plain = FlowOutlierDetector(**SMALL, contamination=0.01).fit(given[:, OWN])
    assert plain.predict(odd[-1:, OWN])[0] == 1
    assert detector.flow_.threshold.log_p == detector.offset_ == np.quantile(detector.score_samples(given), 0.01)


@pytest.mark.filterwarnings("ignore:the flow is worse than a Gaussian")  # of few epochs
def test_a_conditional_density_in_searches_and_pipelines(given, given_frame):
    quick = OF_CONTEXT | {"epochs": 3}
    grid = {"context_features": [None, 1, [1, 3]]}
    search = GridSearchCV(FlowDensity(**quick), grid, cv=2, refit=False).fit(given)
    assert len(set(search.cv_results_["mean_test_score"])) == 3
    model = make_pipeline(
        StandardScaler().set_output(transform="pandas"), FlowDensity(**quick | {"context_features": ["hour", "load"]})
    )
    assert len(cross_val_score(model, given_frame, cv=2)) == 2
    assert model.fit(given_frame)[-1].flow_.context_names == ("hour", "load")
    assert model.get_feature_names_out().tolist() == ["a", "b"]


@BOTH
def test_check_estimator_with_a_context(estimator):
    """scikit-learn's own checks, of which a few use tables of one feature, which leave nothing to condition."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nvpflow.DataWarning)
        results = check_estimator(
            estimator(hidden_sizes=(8,), epochs=2, context_features=1), on_skip=None, on_fail=None
        )
    failed = {result["check_name"] for result in results if result["status"] == "failed"}
    assert failed <= {"check_fit2d_1feature", *OF_REPEATED_ROWS}, failed
    assert len([result for result in results if result["status"] == "passed"]) > 35


@pytest.mark.parametrize(
    ("features", "kind", "message"),
    [
        (0, ValueError, "context_features is 0, expected 1 to 3 of X's 4 features"),
        (4, ValueError, "context_features is 4, expected 1 to 3 of X's 4 features"),
        (True, TypeError, r"context_features is True \(bool\), expected an integer"),
        (1.5, TypeError, "context_features is 1.5 .*, expected how many last features"),
        ("load", TypeError, "context_features is 'load' .*, expected how many last features, a sequence"),
        ({1, 2}, TypeError, "context_features is {1, 2} .*, expected how many last features, a sequence"),
        ([1, 4], ValueError, r"context_features\[1\] is 4, expected an index from 0 to 3"),
        ([-1], ValueError, r"context_features\[0\] is -1, expected an index from 0 to 3"),
        ([1, 1], ValueError, "context_features holds feature 1 twice, expected each once"),
        ([0, 1, 2, 3], ValueError, "context_features holds all 4 features of X, expected some that they condition"),
        ([1.0], TypeError, r"context_features\[0\] is 1.0 \(float\), expected an integer"),
        (
            ["load"],
            ValueError,
            r"context_features\[0\] is 'load', but X has no names; expected an index, or X as a Dat",
        ),
    ],
)
def test_context_features_that_are_refused(given, features, kind, message):
    with pytest.raises(kind, match=message):
        FlowDensity(context_features=features).fit(given)


@pytest.mark.filterwarnings("ignore:the flow is worse than a Gaussian")  # of few epochs
def test_a_context_that_is_missing_or_unknown(given, given_frame):
    with pytest.raises(
        ValueError, match=r"context_features\[0\] is 'loads', expected one of X's features: 'a', 'hour', "
    ):
        FlowDensity(context_features=["loads"]).fit(given_frame)
    density = FlowDensity(**OF_CONTEXT | {"epochs": 1}).fit(given)
    with pytest.raises(ValueError, match=r"context is missing, expected .*the flow is a density p\(x \| context\)"):
        density.sample(3)
    with pytest.raises(ValueError, match=r"context is .*, expected None: the flow has no context"):
        FlowDensity(**SMALL).fit(given).sample(3, context=[1.0])


# ------------------------------------------------------------------------------------------------------ refusals


def with_values(x, row, column, value):
    changed = x.copy()
    changed[row, column] = value
    return changed


def constant(x):
    return np.column_stack([x[:, 0], np.full(len(x), 5.0)])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda x: with_values(x, 3, 1, np.nan), r"rows with NaN or infinite values \(row 3, .*; column 2: 1\)"),
        (lambda x: with_values(x, 3, 1, np.inf), r"rows with NaN or infinite values \(row 3, .*; column 2: 1\)"),
        (lambda x: x[:1], "1 sample"),
        (lambda x: x[:0], "0 sample"),
        (lambda x: x[:, :1], r"1 feature\(s\).*minimum of 2.*KernelDensity"),
        (constant, "column 2 is constant, 5"),
        (lambda x: x * 1e60 + 1e60, "a mean or a variance beyond float32 in column"),
        (lambda x: [["a", "b"]] * 20, "could not convert string to float"),
    ],
)
def test_data_that_is_refused(x, damage, message):
    with pytest.raises(ValueError, match=message):
        FlowDensity(**SMALL).fit(damage(x))


def test_constant_feature_is_named(frame):
    with pytest.raises(ValueError, match="column 'b' is constant, 1"):
        FlowDensity(**SMALL).fit(frame.assign(b=1.0))


def test_rounding_that_blurs_is_warned_of(x):
    with pytest.warns(nvpflow.DataWarning, match="column 1 has lost digits"):
        FlowDensity(**SMALL).fit((x + 1e6).astype(np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FlowDensity(**SMALL).fit(x + 100)
        narrow = FlowDensity(**SMALL).fit(x + 1e6)  # of float64: nothing is rounded before it is standardized
        wide = FlowDensity(**SMALL, dtype="float64").fit(x + 1e6)
    assert narrow.score(x + 1e6) == pytest.approx(wide.score(x + 1e6), abs=1e-3)
    assert wide.score(x + 1e6) == pytest.approx(FlowDensity(**SMALL, dtype="float64").fit(x).score(x), abs=1e-3)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs is 0"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"batch_size": 2.5}, TypeError, "batch_size is 2.5 .*, expected an integer"),
        ({"hidden_sizes": 5}, TypeError, "hidden_sizes is 5 .*, expected a sequence"),
        ({"activation": "x"}, ValueError, "activation is 'x'"),
        ({"dtype": "int32"}, ValueError, "dtype is 'int32', expected 'float32' or 'float64'"),
        ({"validation_fraction": 0}, ValueError, r"validation_fraction is 0.0, expected .* \(0, 1\), or None"),
        ({"validation_fraction": 1}, ValueError, "validation_fraction is 1.0"),
        ({"validation_fraction": "x"}, TypeError, "validation_fraction is 'x' .*, expected a real number"),
        ({"validation_fraction": None, "patience": 3}, ValueError, "patience is 3, expected None without validation"),
        ({"random_state": -1}, ValueError, "random_state is -1"),
        ({"verbose": "loud"}, TypeError, "verbose is 'loud' .*, expected an integer"),
        ({"verbose": -1}, ValueError, "verbose is -1"),
        ({"device": "tpu"}, ValueError, "device is 'tpu'"),
        ({"precision": "tf32"}, ValueError, "precision is 'tf32'"),
    ],
)
def test_options_that_are_refused(x, options, kind, message):
    with pytest.raises(kind, match=message):
        FlowDensity(**SMALL | options).fit(x)


@pytest.mark.parametrize(("count", "kind"), [(-1, ValueError), (2.5, TypeError), (True, TypeError)])
def test_sample_sizes_that_are_refused(x, count, kind):
    with pytest.raises(kind, match="n_samples"):
        FlowDensity(**SMALL).fit(x).sample(count)


def test_absence_of_scikit_learn_says_what_to_install(run_python):
    script = """
import sys
sys.modules["sklearn"] = None
try:
    import nvpflow.sklearn
except ImportError as error:
    print(error)
"""
    assert 'pip install "scikit-learn>=1.6"' in run_python(script)


@pytest.mark.filterwarnings("ignore:the flow is worse than a Gaussian")  # of few epochs
def test_a_dtype_set_after_fitting_waits_for_the_next_fit() -> None:
    X = np.random.default_rng(0).normal(size=(200, 3))
    density = FlowDensity(hidden_sizes=(8,), epochs=1, random_state=0).fit(X)
    before = density.score(X)
    assert density.set_params(dtype="float64").score(X) == before


@pytest.mark.parametrize(("features", "activation"), [(12, "relu"), (13, "silu")])
@pytest.mark.filterwarnings("ignore:the flow is worse than a Gaussian")  # of one epoch
def test_the_default_model_goes_by_the_number_of_features(features, activation) -> None:
    x = np.random.default_rng(0).normal(size=(200, features))
    spec = FlowDensity(epochs=1, random_state=0).fit(x).flow_.spec
    assert (spec.num_flows, spec.hidden_sizes) == (8, (64, 64))
    assert spec.activation == activation
    assert FlowDensity(epochs=1, activation="tanh", random_state=0).fit(x).flow_.spec.activation == "tanh"


def test_how_far_rows_count_is_a_parameter(x):
    far = x.copy()
    far[:3, 0] = 1e4
    with pytest.warns(nvpflow.DataWarning):
        density = FlowDensity(epochs=1, standardize="mean", max_deviation=5, random_state=0).fit(far)
    assert density.history_.rows_left_out == 3
    assert density.history_.standardized == {}
    with pytest.raises(ValueError, match="standardize is 'median'"):
        FlowDensity(epochs=1, standardize="median").fit(x)


def test_every_option_of_the_model_reaches_the_flow():
    x = np.random.default_rng(0).normal(size=(200, 4))
    options = {"mask": "random", "mixing": "permutation", "actnorm": True}
    density = clone(FlowDensity(**SMALL, **options, coupling="additive")).fit(x)
    assert density.flow_.spec == nvpflow.build(4, 2, (16,), **options, transform="additive").spec
    assert {name: density.get_params()[name] for name in options} == options
    mask = np.array([[True, False, False, True], [False, True, True, False]])
    detector = clone(FlowOutlierDetector(**SMALL, mask=mask)).set_params(mixing="reverse").fit(x)
    assert detector.flow_.spec == nvpflow.build(4, 2, (16,), mask=mask, mixing="reverse").spec


def test_splines():
    x = np.random.default_rng(0).normal(size=(200, 4))
    density = clone(FlowDensity(**SMALL, coupling="spline", num_bins=5, tail_bound=4.0)).fit(x)
    assert density.flow_.spec == nvpflow.build(4, 2, (16,), transform="spline", num_bins=5, tail_bound=4.0).spec
    detector = FlowOutlierDetector(**SMALL, coupling="spline").set_params(num_bins=3).fit(x)
    assert detector.flow_.spec == nvpflow.build(4, 2, (16,), transform="spline", num_bins=3).spec
