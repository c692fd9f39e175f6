"""What a notebook shows: tables that are well-formed whatever the names hold, and a bar without a warning."""

from __future__ import annotations

import html
import importlib.util
import xml.etree.ElementTree as ET

import numpy as np
import nvpflow
import pytest

ROWS = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
HOSTILE = ("<script>alert(1)</script>", 'a"b&c', "x" * 1000)


def cells(text: str) -> list[list[str]]:
    """Return the cells of the table in it, line by line; fails where it is not well-formed."""
    root = ET.fromstring(f"<div>{text}</div>")
    allowed = {"div", "table", "caption", "thead", "tbody", "tr", "th", "td", "ul", "li"}
    assert {node.tag for node in root.iter()} <= allowed
    return [["".join(cell.itertext()) for cell in line] for line in root.iter("tr")]


def test_a_flow_is_a_table() -> None:
    flow = nvpflow.build(3, 2, (8, 4), "tanh", standardize=True, dtype="float64")
    shown = dict(cells(flow._repr_html_()))
    assert shown["columns"] == "3"
    assert shown["hidden layers"] == "8, 4"
    assert shown["parameters"] == f"{flow.num_parameters:,}"
    assert shown["computes in"] == "float64, cpu"
    assert "threshold" not in shown
    flow.column_names = HOSTILE
    flow.set_threshold(-12.5, 0.01)
    shown = dict(cells(flow._repr_html_()))
    assert shown["columns"].startswith("3: <script>")
    assert html.escape("<script>") in flow._repr_html_()
    assert max(map(len, shown.values())) <= 60
    assert shown["threshold"] == "log p below -12.5 nats, quantile 0.01"


def test_a_history_is_a_table_of_three_epochs() -> None:
    flow = nvpflow.build(3, 2, (8,))
    history = flow.fit(ROWS, epochs=3, progress=False)
    head, first, *_, last = cells(history._repr_html_())
    assert head[:3] == ["", "epoch", "train nll"]
    assert first[:3] == ["first", "1", f"{history.train_loss[0]:.4f}"]
    assert last[:2] == ["last", "3"]
    assert history._summary() in history._repr_html_()


def test_a_certificate_is_a_table_with_its_advice() -> None:
    flow = nvpflow.build(3, 2, (8,))
    found = flow.certify(np.vstack([ROWS, [[np.nan, 0, 0]]]).astype(np.float32))
    head, *lines = cells(found._repr_html_())
    assert head == ["largest error", "relative", "absolute", "worst row"]
    assert lines[0][1:] == [
        f"{found.round_trip.relative:.1e}",
        f"{found.round_trip.absolute:.1e}",
        str(found.round_trip.row),
    ]
    for sentence in found.advice:
        assert html.escape(sentence) in found._repr_html_()
    empty = flow.certify(np.full((2, 3), np.nan, np.float32))
    assert cells(empty._repr_html_())[1][1] == "not measured"


def test_a_data_report_is_a_table_of_its_findings() -> None:
    report = nvpflow.check_data(np.hstack([ROWS, ROWS[:, :1]]), names=["a", "b", "c", HOSTILE[0]])
    assert not report.ok
    head, *lines = cells(report._repr_html_())
    assert head == ["", "kind", "finding"]
    assert lines == [[finding.severity, finding.kind, str(finding)] for finding in report.findings]
    assert html.escape(HOSTILE[0]) in report._repr_html_()
    assert html.escape(report._summary()) in report._repr_html_()
    fine = nvpflow.check_data(ROWS)
    assert cells(fine._repr_html_()) == []
    assert "nothing found" in fine._repr_html_()


NOTEBOOK = """
import sys, types
shell = types.SimpleNamespace(config={{"IPKernelApp": {{}}}})
try:
    import IPython
except ImportError:
    IPython = sys.modules["IPython"] = types.ModuleType("IPython")
IPython.get_ipython = lambda: shell
sys.modules["ipykernel.zmqshell"] = types.ModuleType("zmqshell")  # what tqdm looks at
{without}
import numpy as np, nvpflow
x = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)
nvpflow.build(2, 1, (4,)).fit(x, epochs=2, batch_size=64)
print({after})
"""


@pytest.mark.skipif(importlib.util.find_spec("tqdm") is None, reason="tqdm is not installed (pip install tqdm)")
def test_a_notebook_without_ipywidgets_has_a_bar_of_text_and_no_warning(run_python) -> None:
    script = NOTEBOOK.format(without='sys.modules["ipywidgets"] = None', after="sys.stderr.getvalue()")
    script = script.replace("import numpy", "import io; sys.stderr = io.StringIO(); import numpy", 1)
    shown = run_python("import warnings; warnings.simplefilter('error')" + script)
    assert "epoch 2/2" in shown
    assert "nats" in shown
    assert "IProgress" not in shown


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("tqdm", "ipywidgets", "IPython")),
    reason="tqdm, ipywidgets or IPython is not installed (pip install tqdm ipywidgets)",
)
def test_a_notebook_with_ipywidgets_has_a_widget(run_python) -> None:
    shown = run_python(NOTEBOOK.format(without="", after="nvpflow._bar._tqdm().__module__"))
    assert shown.splitlines()[-1] == "tqdm.notebook"
