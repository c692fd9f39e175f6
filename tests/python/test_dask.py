"""nvpflow.dask: the files of one process, whatever the cluster is and whatever becomes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import nvpflow
import pytest
from nvpflow.tables import Scorer, check_files, score_file

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
distributed = pytest.importorskip("distributed")

COUNT, ROWS = 6, 50


@pytest.fixture(scope="module")
def flow():
    return nvpflow.build(3, 2, (16,), seed=1, column_names=["a", "b", "c"])


def write_rows(folder, count=COUNT, rows=ROWS):
    """Write a table in files, and return their names."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        columns = dict(zip("abc", rng.normal(size=(3, rows)).astype(np.float32), strict=True))
        pq.write_table(pa.table({"id": np.arange(i * rows, (i + 1) * rows), **columns}), folder / f"part-{i}.parquet")
    return sorted(folder.iterdir())


@pytest.fixture
def sources(tmp_path):
    return write_rows(tmp_path / "rows")


@pytest.fixture(scope="module")
def clients():
    """A client of a cluster inside this process, by its number of workers."""
    cluster = distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None)
    with cluster, distributed.Client(cluster, set_as_default=False) as client:

        def scaled(workers):
            cluster.scale(workers)
            client.wait_for_workers(workers)
            return client

        yield scaled


def check(flow, sources, folder):
    """Check that the folder holds what one process writes, byte by byte but for the metadata."""
    assert sorted(path.name for path in folder.iterdir()) == [path.name for path in sources]
    alone = folder.with_name(f"{folder.name}-alone")
    alone.mkdir()
    for source in sources:
        score_file(Scorer(flow, keep=["id"]), source, alone / source.name)
        assert pq.read_table(folder / source.name).equals(pq.read_table(alone / source.name))
    assert check_files(folder).ok


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_any_number_of_workers_writes_the_files_of_one_process(flow, sources, clients, workers, tmp_path):
    target = tmp_path / "scores"
    report = nvpflow.dask.score(flow, sources[::-1], target, client=clients(workers), keep=["id"])
    check(flow, sources, target)
    assert (report.rows, report.skipped, report.cpu_isa) == (COUNT * ROWS, 0, nvpflow.cpu_isa())
    assert sum(report.rows_of_workers.values()) == COUNT * ROWS
    assert [Path(file.target).name for file in report.files] == [source.name for source in sources]
    assert f"Report: 6 files, 0 of them done before, 300 rows; {report.seconds:.1f} s on" in repr(report)
    assert report.to_dict()["files"][0] == {"target": str(target / "part-0.parquet"), "rows": 50, "skipped": False}


def test_done_files_are_left_alone(flow, sources, clients, tmp_path):
    target, client = tmp_path / "scores", clients(2)
    nvpflow.dask.score(flow, sources[:4], target, client=client, keep=["id"])
    (target / "part-1.parquet").unlink()
    report = nvpflow.dask.score(flow, sources, target, client=client, keep=["id"])
    assert [file.skipped for file in report.files] == [True, False, True, True, False, False]
    check(flow, sources, target)
    assert nvpflow.dask.score(flow, sources, target, client=client, keep=["id"], force=True).skipped == 0


def test_the_client_that_there_is(flow, sources, clients, tmp_path):
    with clients(1).as_current():
        nvpflow.dask.score(flow, sources, tmp_path / "scores", keep=["id"])
    check(flow, sources, tmp_path / "scores")


def test_files_that_fail_do_not_stop_the_others(flow, sources, clients, tmp_path):
    sources[1].write_bytes(b"PAR1")
    sources[3].unlink()
    with pytest.raises(RuntimeError, match=r"2 of 6 files could not be scored, the others are done; .*part-1.parquet"):
        nvpflow.dask.score(flow, sources, tmp_path / "scores", client=clients(2), keep=["id"])
    assert len(list((tmp_path / "scores").iterdir())) == 4
    with pytest.raises(RuntimeError, match=r"part-0.parquet: .* exists, made with other options: keep \['id'\] there"):
        nvpflow.dask.score(flow, sources[:1], tmp_path / "scores", client=clients(2))


def test_an_error_that_may_pass_is_tried_again(flow, sources, clients, tmp_path, monkeypatch):
    failures = iter([OSError("first"), OSError("second")])
    real = nvpflow.tables._score_file

    def failing(*arguments, **options):
        for error in failures:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(nvpflow.tables, "_score_file", failing)
    nvpflow.dask.score(flow, sources, tmp_path / "scores", client=clients(2), keep=["id"])
    check(flow, sources, tmp_path / "scores")
    failures = iter([OSError("it stays")] * 100)
    with pytest.raises(RuntimeError, match=r"6 of 6 files could not be scored.*: it stays"):
        nvpflow.dask.score(flow, sources, tmp_path / "others", client=clients(2), retries=1)


def test_workers_of_different_instruction_sets_are_refused(flow, sources, clients, tmp_path, monkeypatch):
    kinds = iter(["avx2", *["avx512"] * 5])
    monkeypatch.setattr(nvpflow.dask, "cpu_isa", lambda: next(kinds))
    with pytest.raises(RuntimeError, match=r"different instruction sets, avx2, avx512, .*set NVPFLOW_ISA=avx2"):
        nvpflow.dask.score(flow, sources, tmp_path / "scores", client=clients(1))


def test_what_is_wrong_is_named(flow, sources, clients, tmp_path):
    score, client = nvpflow.dask.score, clients(1)
    with pytest.raises(TypeError, match=r"client is 'tcp://host' .str., expected a dask.distributed.Client; make one"):
        score(flow, sources, tmp_path, client="tcp://host")
    with pytest.raises(TypeError, match=r"sources is .rows. .str., expected a sequence of paths"):
        score(flow, "rows", tmp_path, client=client)
    with pytest.raises(TypeError, match=r"sources\[0\] is 3"):
        score(flow, [3], tmp_path, client=client)
    with pytest.raises(ValueError, match="sources is empty, expected one Parquet file at least"):
        score(flow, [], tmp_path, client=client)
    with pytest.raises(ValueError, match="is given twice, expected each source once"):
        score(flow, [*sources, sources[0]], tmp_path / "scores", client=client)
    with pytest.raises(ValueError, match="would be overwritten by its own scores"):
        score(flow, sources, sources[0].parent, client=client)
    with pytest.raises(ValueError, match="retries is -1"):
        score(flow, sources, tmp_path / "scores", client=client, retries=-1)
    with pytest.raises(TypeError, match="flow is 3"):
        score(3, sources, tmp_path / "scores", client=client)


def test_no_client_is_said(run_python):
    script = """
import nvpflow
try:
    nvpflow.dask.score(nvpflow.build(2, column_names=["a", "b"]), ["a.parquet"], "scores")
except ValueError as error:
    print(error)
"""
    assert "client is None, and there is no client of dask.distributed; make one" in run_python(script)


# ------------------------------------------------------------------------------------------------- what gets killed

CLUSTER = """
import glob, os, signal, sys, threading, time
import nvpflow
from distributed import Client, LocalCluster

def kill_while_it_scores(process, target):
    while len(glob.glob(target + "/part-*")) < 2:
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    print(len(glob.glob(target + "/part-*")), flush=True)

if __name__ == "__main__":
    model, rows, target, what = sys.argv[1:]
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        if what == "worker":
            victim = next(iter(client.run(os.getpid).values()))
            threading.Thread(target=kill_while_it_scores, args=(victim, target)).start()
        report = nvpflow.dask.score(nvpflow.load(model), glob.glob(rows + "/*.parquet"), target, keep=["id"])
        print(len(report.files), report.skipped)
"""


def cluster(tmp_path, flow, what):
    """Start a job with a cluster of its own, in a group of processes of its own."""
    flow.save(tmp_path / "model.safetensors")
    (tmp_path / "job.py").write_text(CLUSTER)
    command = [sys.executable, "job.py", "model.safetensors", "rows", "scores", what]
    return subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )


@pytest.mark.slow
def test_a_worker_is_killed(flow, tmp_path):
    sources = write_rows(tmp_path / "rows", 30, 200_000)
    job = cluster(tmp_path, flow, "worker")
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0
    done_when_killed, files, skipped = map(int, output.split())
    assert files == 30
    assert 2 <= done_when_killed < 28
    assert skipped <= done_when_killed  # results that were lost with the worker
    for unfinished in (tmp_path / "scores").glob(".nvpflow-*.tmp"):
        unfinished.unlink()
    check(flow, sources, tmp_path / "scores")


@pytest.mark.slow
def test_the_cluster_is_killed_and_started_again(flow, tmp_path):
    sources = write_rows(tmp_path / "rows", 40, 200_000)
    job = cluster(tmp_path, flow, "nothing")
    deadline = time.monotonic() + 200
    while len(list((tmp_path / "scores").glob("part-*"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    there = len(list((tmp_path / "scores").glob("part-*")))
    assert 5 <= there < 40
    again = cluster(tmp_path, flow, "nothing")
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0
    files, skipped = map(int, output.split())
    assert files == 40
    assert there <= skipped + 2  # two were being renamed, at most
    assert skipped >= 5
    for unfinished in (tmp_path / "scores").glob(".nvpflow-*.tmp"):
        unfinished.unlink()
    check(flow, sources, tmp_path / "scores")


def trained(sources, options=None, **given):
    """Return the flow and the history of one process that has all rows."""
    flow = new_flow()
    table = pa.concat_tables([pq.read_table(source) for source in sources]).to_pandas()
    x = table[["a", "b", "c"]].to_numpy(dtype=np.float64)
    return flow, flow.fit(x, progress=False, **(options or OPTIONS), **given)


OPTIONS = {"shards": 5, "epochs": 2, "batch_size": 50}


def new_flow():
    return nvpflow.build(3, 2, (16,), seed=1)


def same(flow, history, other, other_history):
    names = ("epoch", "train_loss", "validation_loss", "gradient_norm")
    return flow.parameters_flat().tobytes() == other.parameters_flat().tobytes() and all(
        np.array_equal(getattr(history, name), getattr(other_history, name)) for name in names
    )


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_trains_the_flow_of_one_process(sources, clients, workers):
    flow = new_flow()
    history = nvpflow.dask.fit(flow, sources, client=clients(workers), columns=["a", "b", "c"], **OPTIONS)
    assert same(flow, history, *trained(sources))
    assert flow.column_names == ("a", "b", "c")
    assert history.train_rows + history.validation_rows == COUNT * ROWS
    again = new_flow()
    weighted = nvpflow.dask.fit(
        again, sources, client=clients(workers), columns=["a", "b", "c"], weight_column="id", **OPTIONS
    )
    alone, expected = trained(sources, sample_weight=np.arange(COUNT * ROWS, dtype=float))
    assert same(again, weighted, alone, expected)


def test_what_a_worker_cannot_train_on_is_said(sources, clients):
    flow, client = new_flow(), clients(2)
    columns = dict.fromkeys("abc", np.full(ROWS, np.inf, np.float32))
    pq.write_table(pa.table({"id": np.arange(ROWS), **columns}), sources[-1])
    with pytest.raises(ValueError, match="x has 50 of 180 rows with NaN or infinite"):
        nvpflow.dask.fit(flow, sources, client=client, columns=["a", "b", "c"], **OPTIONS)
    with pytest.raises(Exception, match="nothing"):
        nvpflow.dask.fit(flow, sources, client=client, columns=["a", "b", "nothing"], **OPTIONS)
    with pytest.raises(TypeError, match=r"callback is .*, expected none"):
        nvpflow.dask.fit(flow, sources, client=client, callback=print)
    with pytest.raises(TypeError, match="sources is"):
        nvpflow.dask.fit(flow, [], client=client)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [False, True])
def test_training_goes_on_where_a_worker_is_killed(tmp_path, checkpoint):
    sources = write_rows(tmp_path / "rows", rows=3000)
    options = {"shards": 6, "epochs": 60, "batch_size": 600, "learning_rate": 1e-3}
    expected = trained(sources, options)
    flow = new_flow()
    given = {"checkpoint": tmp_path / "run"} if checkpoint else {}
    with (
        distributed.LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        victim = next(iter(client.run(os.getpid).values()))
        killer = threading.Timer(2, os.kill, (victim, signal.SIGKILL))
        killer.start()
        history = nvpflow.dask.fit(flow, sources, client=client, columns=["a", "b", "c"], **options, **given)
        assert not killer.is_alive()
    assert same(flow, history, *expected)
