"""Processor seconds of scoring Parquet files, and what a task of Dask adds to a file.

    python tests/bench/score_files.py                     # two minutes of two cores
    python tests/bench/score_files.py --files 4 --tasks 0  # without Dask

The table is that of flow A: rows of 16 float32 columns and an id, files of 10^6 rows, zstd. Processor seconds bear a
busy machine; rows a second by wall time do not.
"""

from __future__ import annotations

import argparse
import glob
import os
import tempfile
import time
from collections import Counter

import numpy as np
import nvpflow
import pyarrow as pa
import pyarrow.parquet as pq
from nvpflow._arrow import parquet_writer
from nvpflow.tables import Scorer, _kind_of, log_p_of, score_file

COLUMNS = [f"c{i:02d}" for i in range(16)]
ROWS = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=4, metavar="N", help="of 10^6 rows (%(default)s)")
    parser.add_argument("--tasks", type=int, default=500, metavar="N", help="of Dask, on tiny files (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the flow (%(default)s)")
    options = parser.parse_args()
    flow = nvpflow.build(16, 4, (128,), standardize=True, seed=1, column_names=COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        print(f"{flow}, {nvpflow.cpu_isa()}, load {os.getloadavg()[0]:.1f}")
        each = scoring(Scorer(flow, keep=["id"], num_threads=options.threads), options.files)
        if options.tasks:
            of_a_task(flow, options.tasks, each * ROWS)


def scoring(scorer: Scorer, files: int) -> float:
    """Return the processor seconds a row."""
    write_rows("rows", files, ROWS)
    sources = sorted(glob.glob("rows/*"))
    os.mkdir("scores")
    score_file(scorer, sources[0], "scores/warm.parquet")
    started, begun = time.perf_counter(), time.process_time()
    for source in sources:
        score_file(scorer, source, f"scores/{os.path.basename(source)}")
    seconds, wall = time.process_time() - begun, time.perf_counter() - started
    spent: Counter[str] = Counter()
    for source in sources:
        step_by_step(scorer, source, spent)
    count = files * ROWS
    parts = ", ".join(f"{name} {1e6 * part / count:.3f}" for name, part in spent.items())
    print(f"processor us a row: {1e6 * seconds / count:.3f}; step by step: {parts}")
    two = 2 * count / seconds
    print(f"{count / wall / 1e6:.2f} M rows/s by wall time; two idle cores could have {two / 1e6:.2f} (calculated)")
    return seconds / count


def step_by_step(scorer: Scorer, source: str, spent: Counter[str]) -> None:
    """Do what `score_file` does, and add up the processor seconds of each step."""

    def took(step: str) -> None:
        nonlocal last
        now = time.process_time()
        spent[step] += now - last
        last = now

    last, columns = time.process_time(), ["id", *scorer.columns]
    schema = pa.schema({"id": pa.int64(), "log_p": pa.float32()})
    with (
        pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False) as file,
        open("scores/steps.parquet", "wb") as out,
        parquet_writer(out, schema) as writer,
    ):
        for batch in file.iter_batches(batch_size=1 << 17, columns=columns):
            took("reading")
            kind = _kind_of(batch)
            log_p = log_p_of(scorer.flow, kind.rows(batch, scorer.columns), None)
            took("columns to rows and the flow")
            writer.write_batch(kind.result(batch, ["id"], "log_p", log_p))
            took("writing")


def write_rows(folder: str, files: int, rows: int) -> None:
    os.mkdir(folder)
    for i in range(files):
        x = np.random.default_rng([7, i]).standard_normal((16, rows), dtype=np.float32)
        table = pa.table({"id": np.arange(i * rows, (i + 1) * rows), **dict(zip(COLUMNS, x, strict=True))})
        options = {"row_group_size": 1 << 17, "compression": "zstd", "use_dictionary": False}
        pq.write_table(table, f"{folder}/part-{i:05d}.parquet", **options)


def of_a_task(flow: nvpflow.Flow, tasks: int, seconds_of_a_file: float) -> None:
    """Say what client, scheduler and worker spend on a task beside the file."""
    from distributed import Client, LocalCluster

    write_rows("tiny", tasks, 10)
    sources = sorted(glob.glob("tiny/*"))
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        nvpflow.dask.score(flow, sources[:10], "by_dask", client=client)  # imports, the model
        before, worker_before = time.process_time(), sum(client.run(time.process_time).values())
        nvpflow.dask.score(flow, sources, "by_dask", client=client, force=True)
        ours, worker = time.process_time() - before, sum(client.run(time.process_time).values()) - worker_before
    os.mkdir("alone")
    scorer, before = Scorer(flow), time.process_time()
    for source in sources:
        score_file(scorer, source, f"alone/{os.path.basename(source)}")
    worker -= time.process_time() - before
    ours, worker = ours / tasks, worker / tasks
    print(
        f"processor ms a task of Dask: client and scheduler {1e3 * ours:.2f}, worker {1e3 * worker:.2f} beside the "
        f"file; {(ours + worker) / seconds_of_a_file:.2%} of a file of 10^6 rows"
    )


if __name__ == "__main__":
    main()
