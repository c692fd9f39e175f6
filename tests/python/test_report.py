"""The page of ``nvpflow report``: its figures are right, it stands alone, and a browser draws all of it."""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import nvpflow
import pytest

pytest.importorskip("matplotlib", reason="Matplotlib is not installed (pip install matplotlib)")

from conftest import chromium
from nvpflow import cli, report
from nvpflow._findings import Rows
from nvpflow._gaussian import gaussian_log_prob

NAMES = ["a<b>&\"'", "$x_1$", "größe"]


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32) * [1, 2, 3] + [0, 5, 0]


@pytest.fixture(scope="module")
def trained(data):
    flow = nvpflow.build(3, 4, (16,), standardize=True)
    train = data.astype(np.float32)[:300]
    return flow, flow.fit(train, epochs=3, progress=False, num_threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data, trained):
    folder = tmp_path_factory.mktemp("report")
    flow, _ = trained
    flow.save(folder / "model.safetensors")
    np.save(folder / "data.npy", data.astype(np.float32))
    np.savetxt(
        folder / "named.csv", data, delimiter=",", header='"a<b>&""\'",$x_1$,größe', comments="", encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="module")
def page(data, trained):
    flow, history = trained
    rows = data.astype(np.float32)
    return report.html(
        flow, rows[300:], train=rows[:300], history=history, names=NAMES, title="A & B", details={"K": "V"}
    )


def run(folder, *arguments, fails=0, stdin=None):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "nvpflow", *map(str, arguments)],
        cwd=folder,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == fails, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


class Page(HTMLParser):
    """Tags that are closed as they were opened, attributes, and text."""

    VOID = frozenset({"meta", "img", "link", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if text.strip():
            self.texts.append(text.strip())

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_page_stands_alone_and_is_well_formed(page):
    parsed = Page(page)
    for _, attributes in parsed.tags:
        for name in ("src", "href"):
            if name in attributes:
                assert attributes[name].startswith("data:")
    assert not parsed.named("script")
    assert "url(" not in page
    assert "@import" not in page
    policy = next(a["content"] for a in parsed.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    svgs = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)
    assert len(svgs) == 8
    for svg in svgs:
        outside = re.findall(rb'href="(?!#|data:)[^"]*"', base64.b64decode(svg))
        assert not outside


def test_pictures_have_words_and_two_grounds(page):
    images = Page(page).named("img")
    assert [image["class"] for image in images] == ["light", "dark"] * 5
    for image in images:
        assert len(image["alt"]) > 40
    light, dark = (image["src"] for image in images[:2])
    assert light != dark


def test_names_are_text_and_not_markup(page):
    texts = Page(page).texts
    assert "A & B" in texts
    for name in NAMES:
        assert name in texts
    assert "a<b>" not in page


def test_figures_are_those_of_the_flow(page, data, trained):
    flow, history = trained
    rows = data.astype(np.float32)
    ours = flow.log_probability(rows[300:]).astype(np.float64)
    gaussian = gaussian_log_prob(rows[:300], rows[300:])
    texts = Page(page).texts

    def written(value, digits=3):
        return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")

    at = texts.index("flow", texts.index("Log-likelihood in nats per row"))
    assert texts[at + 1 : at + 4] == [written(ours.mean()), written(ours.std() / 10), written(np.median(ours))]
    assert texts[at + 4 : at + 6] == ["Gaussian", written(gaussian.mean())]
    assert any("fitted to the training rows" in text for text in texts)
    assert any(f"best epoch {history.best_epoch} with {written(-history.best_loss)} nats" in text for text in texts)
    least = texts.index("Rows counted from 0, log p in nats")
    assert texts[least + 5] == str(int(np.argmin(ours)))
    assert texts[least + 6] == written(ours.min(), 2)
    assert texts[texts.index("K") + 1] == "V"


def test_invertibility_is_that_of_the_certificate(page, trained, data):
    found = trained[0].certify(data.astype(np.float32)[300:])
    texts = Page(page).texts
    assert any(text.startswith(f"The certificate of 100 rows: {found.verdict}. ") for text in texts)
    for name, error in found._errors("\N{RIGHTWARDS ARROW}").items():
        at = texts.index(name)
        shown = [report._scientific(error.relative), report._scientific(error.absolute), str(error.row)]
        assert texts[at + 1 : at + 4] == shown
    assert report._scientific(1.234e-6) == "1.2 \N{MULTIPLICATION SIGN} 10⁻⁶"


def test_the_certificates_rows_have_the_numbers_of_all_rows(trained, data):
    rows = data.astype(np.float32)[:50]
    holed = np.insert(rows, [0, 0, 20], np.nan, axis=0)
    found, expected = report.examine(trained[0], Rows(holed), None, None).certificate, trained[0].certify(rows)
    assert found.rows == 50
    for name in ("round_trip", "latent_round_trip", "log_prob", "log_det"):
        row = getattr(expected, name).row
        assert getattr(found, name).row == row + (2 if row < 20 else 3)


def test_gaussian_is_not_fitted_to_the_rows_it_scores():
    """Eight columns of 40 rows: a Gaussian fitted to these rows would score far above one fitted to others."""
    from nvpflow._findings import _gaussian

    rows = np.random.default_rng(0).normal(size=(40, 8))
    held_out, source = _gaussian(Rows(rows), None)
    assert "in turns" in source
    assert held_out.mean() < gaussian_log_prob(rows, rows).mean() - 2
    halves = np.random.default_rng(0).permutation(40) < 20
    assert np.array_equal(held_out[halves], gaussian_log_prob(rows[~halves], rows[halves]))


@pytest.mark.parametrize("rows", [np.ones((50, 2)), np.arange(50.0).repeat(2).reshape(50, 2), np.eye(2)])
def test_singular_gaussian_is_said_not_drawn(rows):
    with pytest.raises(np.linalg.LinAlgError):
        gaussian_log_prob(rows, rows)


# ------------------------------------------------------------------------------------------------------- contexts


@pytest.fixture(scope="module")
def conditional():
    """A flow of two columns under two numbers, rows it has not seen, and those that it was trained on."""
    rng = np.random.default_rng(1)
    c = rng.normal(size=(900, 2)) * [1, 3] + [0, 40]
    x = (c - [0, 40]) @ [[1.0, -1.0], [0.5, 0.2]] + 0.3 * rng.normal(size=(900, 2))
    flow = nvpflow.build(2, 4, (16,), context_size=2)
    flow.context_names = ("a<b>", "load-2")
    flow.fit(x[:600], context=c[:600], epochs=60, progress=False, num_threads=1)
    return flow, x[600:], c[600:].astype(np.float32), (x[:600], c[:600])


def test_a_page_under_contexts(conditional):
    flow, x, c, train = conditional
    page = report.html(flow, x, context=c, train=train, context_names=flow.context_names)
    texts = Page(page).texts
    log_p = flow.log_prob(x, context=c).astype(np.float64)
    assert report._nats(log_p.mean(), 3) in texts
    gaussian = gaussian_log_prob(train[0], x, (train[1].astype(np.float32), c))
    assert report._nats(gaussian.mean(), 3) in texts
    assert any("a mean that is linear in the context, fitted to the training rows" in text for text in texts)
    assert texts[texts.index("Context") + 1] == "2 numbers: a<b>, load-2; standardized"
    at = int(log_p.argmin())
    shown = [f"{value:.6g}".replace("-", "\N{MINUS SIGN}") for value in c[at].tolist()]
    assert f"a<b> {shown[0]}; load-2 {shown[1]}" in texts
    assert any(
        "Each sample is drawn under the context of a row, which the last 2 columns show." in text for text in texts
    )
    assert page.count('class="light"') == 4
    found = report.examine(flow, Rows(x, c), None, None)
    assert found.names == ["column 1", "column 2"]  # as messages count them
    assert found.context_names == ["context 1", "context 2"]
    with np.errstate(all="ignore"):
        assert {tuple(row) for row in found.samples_contexts} == {tuple(row) for row in c}
    expected = flow.forward(x, context=c)[0]
    assert np.array_equal(found.latents, expected.astype(np.float64))
    assert np.array_equal(found.samples_log_p, flow.log_prob(found.samples, context=found.samples_contexts))
    assert found.certificate.log_prob == flow.certify(x, context=c).log_prob
    # The samples are those of the density under each context: they depend on it as the data do.
    correlation = [
        np.corrcoef(rows[:, 0], given[:, 1])[0, 1] for rows, given in ((x, c), (found.samples, found.samples_contexts))
    ]
    assert correlation[1] == pytest.approx(correlation[0], abs=0.15)


def test_rows_whose_context_is_not_finite_are_counted(conditional):
    flow, x, c, _ = conditional
    c = c.copy()
    c[4, 1] = np.nan
    assert report.examine(flow, Rows(x, c), None, None).notices == [
        "1 row of 300 with NaN or infinite values left out (row 4, counted from 0)."
    ]


def test_a_gaussian_under_a_context_is_the_joint_one_over_that_of_the_context():
    rng = np.random.default_rng(3)
    train, rows = rng.normal(size=(2, 60, 5)) @ rng.normal(size=(5, 5))
    expected = gaussian_log_prob(train, rows) - gaussian_log_prob(train[:, 2:], rows[:, 2:])
    found = gaussian_log_prob(train[:, :2], rows[:, :2], (train[:, 2:], rows[:, 2:]))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    # Columns of a context may be constant and depend on each other, as indicators of categories do.
    more = [np.hstack([part[:, 2:], part[:, 2:3] - 2 * part[:, 3:4], np.ones((60, 1))]) for part in (train, rows)]
    np.testing.assert_allclose(gaussian_log_prob(train[:, :2], rows[:, :2], tuple(more)), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"context is missing, expected \[300, 2\]"),
        ({"context": np.ones((300, 3))}, r"context has shape \(300, 3\), expected \[300, 2\]"),
        (
            {"context": np.ones(2), "train": np.ones((20, 2))},
            "train holds rows without their context, expected a tuple",
        ),
        ({"context": np.ones(2), "train": (np.ones((20, 2)), np.ones(2))}, "the context of train has shape"),
        (
            {"context": np.ones(2), "context_names": "ab"},
            r"context_names is 'ab' \(str\), expected 2 names, one for each n",
        ),
    ],
)
def test_contexts_that_are_refused(conditional, arguments, message):
    with pytest.raises(ValueError, match=message):
        report.html(conditional[0], conditional[1], **arguments)


def test_command_under_contexts(conditional, tmp_path):
    flow, x, c, _ = conditional
    flow.save(tmp_path / "model")
    np.save(tmp_path / "data.npy", np.hstack([c[:, :1], x, c[:, 1:]]))
    arguments = ("report", "model", "data.npy", "--train", "data.npy", "-o", "-")
    page = run(tmp_path, *arguments, "--context-columns", "1,4").stdout
    assert report._nats(flow.log_prob(x, context=c).mean(), 3) in Page(page).texts
    assert "a&lt;b&gt;" in page
    assert "say with --context-columns which" in run(tmp_path, *arguments, fails=1).stderr


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_rows_that_are_not_finite_are_counted(trained, data):
    rows = data.astype(np.float32)
    rows[3], rows[5, 1] = np.nan, np.inf
    assert report.examine(trained[0], Rows(rows), None, None).notices == [
        "2 rows of 400 with NaN or infinite values left out (row 3, 5, counted from 0)."
    ]
    rows = data.astype(np.float32)
    rows[7] = 3e38
    text = report.html(trained[0], rows)
    notices = re.findall(r'<p class="note">(.*?)</p>', text)
    assert notices == ["1 row so far out that the log-density is not a finite number; not in the means."]
    invertibility = text[text.index("<h2>Invertibility") :]
    assert '<p class="caption">1 finite row (first: row 7) overflowed: far outside the data' in invertibility
    assert "\N{MINUS SIGN}∞" in Page(text).texts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:1], "data has 1 row of finite numbers, expected at least 10"),
        (lambda x: x * np.float32("nan"), "data has 0 rows"),
        (lambda x: x[:, :2], r"data has shape \(400, 2\), expected \[N, 3\]"),
        (lambda x: x * 0 + np.float32(1e30), "no row of data has a finite log-density"),
    ],
)
def test_data_that_is_refused(trained, data, change, message):
    with pytest.raises(ValueError, match=message):
        report.html(trained[0], change(data.astype(np.float32)))


def test_names_that_are_refused(trained, data):
    with pytest.raises(ValueError, match="expected 3 names"):
        report.html(trained[0], data.astype(np.float32), names=["a", "b"])


def test_a_frame_brings_its_names_which_must_be_those_of_the_flow(trained, data):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    flow, rows = trained[0].to("cpu"), data.astype(np.float32)
    frame = pandas.DataFrame(rows, columns=["a", "b", "c"])
    for table in (frame, frame.convert_dtypes(), pyarrow.Table.from_pandas(frame)):
        assert {"a", "b", "c"} <= set(Page(report.html(flow, table)).texts)
    flow.column_names = ("p", "q", "r")
    assert {"p", "q", "r"} <= set(Page(report.html(flow, rows)).texts)
    flow.column_names = ("a", "b", "c")
    other = frame[["c", "a", "b"]]
    for name, call in (
        ("data", lambda: report.html(flow, other)),
        ("train", lambda: report.html(flow, frame, train=other)),
    ):
        message = rf"{name} has columns in another order: .* {name}\[list\(flow.column_names\)\]"
        with pytest.raises(ValueError, match=message):
            call()


SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("duplicates", "ten", "float64", "two columns")]


@pytest.mark.parametrize("kind", ["constant", "many columns", *SLOW_KINDS])
def test_odd_data_makes_a_page(kind, trained, data, monkeypatch):
    flow, rows = trained[0], data.astype(np.float32)
    if kind == "constant":
        rows[:, 1] = 4
    elif kind == "duplicates":
        rows = np.repeat(rows[:2], 50, axis=0)
    elif kind == "ten":
        rows = rows[:10]
    elif kind == "two columns":
        flow, rows = nvpflow.build(2, 2, (8,)), rows[:, :2].copy()
    elif kind == "many columns":
        monkeypatch.setattr(report, "CORNER_COLUMNS", 2)
        flow = nvpflow.build(20, 2, (8,))
        rows = np.random.default_rng(0).normal(size=(100, 20)).astype(np.float32)
    else:
        flow, rows = nvpflow.build(3, 2, (8,), dtype="float64"), data
    parsed = Page(report.html(flow, rows))
    assert len(parsed.named("img")) == 8
    singular = any("covariance is singular" in text for text in parsed.texts)
    assert singular == (kind in ("constant", "duplicates"))
    assert any("The 2 of 20 columns" in text for text in parsed.texts) == (kind == "many columns")


# ---------------------------------------------------------------------------------------------- the command line


def test_command(folder, data):
    out = run(folder, "report", "model.safetensors", "data.npy", "-o", "page.html", "--threads", 1).stdout
    assert out == "400 rows; page written to page.html\n"
    text = (folder / "page.html").read_text(encoding="utf-8")
    texts = Page(text).texts
    assert "model.safetensors on data.npy" in texts
    assert any(t.startswith("model.safetensors, SHA-256 ") for t in texts)
    assert "column 2" in texts
    assert any("not recorded in the model file" in t for t in texts)
    assert (
        "--force overwrites it"
        in run(folder, "report", "model.safetensors", "data.npy", "-o", "page.html", fails=1).stderr
    )


def test_command_with_names_history_and_pipes(folder):
    run(
        *(folder, "fit", "data.npy", "-o", "new.safetensors", "--num-flows", 2, "--hidden-sizes", 8, "--epochs", 3),
        *("--history", "history.json", "--threads", 1, "--validation", 0),
    )
    values = json.loads((folder / "history.json").read_text())
    assert values["validation_loss"] == [None] * 3  # JSON has no NaN
    history = nvpflow.History.from_dict(values)
    assert math.isnan(history.validation_loss[0])
    assert history.train_rows == 400
    table = (folder / "named.csv").read_text(encoding="utf-8")
    command = ("report", "new.safetensors", "-", "-o", "-", "--history", "history.json", "--title", "T", "--threads", 1)
    texts = Page(run(folder, *command, "--train", "data.npy", stdin=table).stdout).texts
    assert "T" in texts
    assert "Learning curve." in texts
    for name in NAMES:
        assert name in texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.safetensors", "data.npy"], "none.safetensors: cannot be opened"),
        (["model.safetensors", "none.npy"], "none.npy: No such file"),
        (["model.safetensors", "wide.npy"], "wide.npy: 5 columns, the model takes 3"),
        (["model.safetensors", "text.csv"], "text.csv: 'c' holds text (first 'x', line 2)"),
        (["model.safetensors", "data.npy", "--train", "wide.npy"], "wide.npy: 5 columns"),
        (["model.safetensors", "data.npy", "--names", "a,b"], "--names has 2 names, expected 3: one for each column"),
        (["model.safetensors", "data.npy", "--history", "text.csv"], "text.csv: not JSON"),
        (["model.safetensors", "data.npy", "--history", "list.json"], "list.json: not a file of fit --history"),
        (["model.safetensors", "data.npy", "-o", "no/page.html"], "there is no folder"),
        (["model.safetensors", "data.npy", "-o", "."], "is a directory"),
        (["model.safetensors", "data.npy", "-o", "data.npy", "--force"], "data.npy is DATA too"),
    ],
)
def test_command_with_wrong_arguments_writes_nothing(folder, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    np.save(folder / "wide.npy", np.zeros((20, 5), np.float32))
    (folder / "text.csv").write_text("a,b,c\n1,2,x\n")
    (folder / "list.json").write_text("[1]")
    target = [] if "-o" in arguments else ["-o", "never.html"]
    assert cli.main(["report", *arguments, *target]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"nvpflow: error: [^\n]+\n", error), error
    assert message in error
    assert not (folder / "never.html").exists()


@pytest.mark.parametrize("damage", ["lost", "length", "text"])
def test_histories_that_are_damaged_are_refused(trained, damage):
    values = trained[1].to_dict()
    assert str(nvpflow.History.from_dict(values).to_dict()) == str(values)  # NaN is not equal to itself
    if damage == "lost":
        del values["best_epoch"]
    else:
        values["train_loss"] = values["train_loss"][:1] if damage == "length" else ["x"]
    with pytest.raises(ValueError, match="history"):
        nvpflow.History.from_dict(values)


# --------------------------------------------------------------------------------------------------- the browser


@pytest.mark.browser
def test_a_browser_draws_the_page(page, tmp_path):
    from playwright.sync_api import sync_playwright

    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    address = (tmp_path / "page.html").as_uri()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for width, scheme in ((1200, "light"), (1200, "dark"), (375, "light")):
            tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            complaints: list[str] = []
            fetched: list[str] = []
            tab.on("console", lambda message, to=complaints: to.append(message.text))
            tab.on("pageerror", lambda error, to=complaints: to.append(str(error)))
            tab.on("request", lambda request, to=fetched: to.append(request.url))
            tab.goto(address)
            assert complaints == []
            assert [url for url in fetched if not url.startswith("data:")] == [address]
            images = tab.evaluate("Array.from(document.images, i => [i.className, i.naturalWidth, i.offsetWidth])")
            assert len(images) == 10
            for name, natural, shown in images:
                assert natural > 0
                assert (shown > 200) == (name == scheme)
            # Nothing but the framed tables and pictures scrolls sideways.
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 25, 31)"}[scheme]
        browser.close()
