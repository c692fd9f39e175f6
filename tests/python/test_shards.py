"""Training by several processes: threads stand for them, whose sums are formed in a random order."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import nvpflow
import pytest
from nvpflow import distributed

SHARDS = 6


class Meeting:
    """Where so many threads meet."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size, timeout=60)
        self.arrays = [None] * size
        self.random = random.Random(4)

    def meet(self, rank, values, combine):
        self.arrays[rank] = values.copy()
        self.barrier.wait()
        if rank == 0:
            self.random.shuffle(self.arrays)
            while len(self.arrays) > 1:
                last = self.arrays.pop()
                self.arrays[0] = combine(self.arrays[0], last)
            self.total = self.arrays[0]
            self.arrays = [None] * self.barrier.parties
        self.barrier.wait()
        values[:] = self.total
        self.barrier.wait()


class Rank:
    def __init__(self, meeting, rank, size):
        self.meeting, self.rank, self.size = meeting, rank, size

    def sum(self, values):
        assert values.dtype == np.int64
        self.meeting.meet(self.rank, values, np.add)

    def max(self, values):
        self.meeting.meet(self.rank, values, np.maximum)


def on_ranks(size, work):
    """Return work(communicator) of each rank, or what it raised."""
    meeting = Meeting(size)
    results = [None] * size

    def run(rank):
        try:
            results[rank] = work(Rank(meeting, rank, size))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a rank hangs"
    return results


def records(history):
    names = ("epoch", "train_loss", "validation_loss", "learning_rate", "gradient_norm", "round_trip")
    return {name: np.asarray(getattr(history, name)).tobytes() for name in names}


def rows(count, columns=3, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(count, columns))
    return (z * [1, 5, 0.1][:columns] + z[:, :1] ** 2).astype(dtype)


def fitted(make, tables, communicator=None, **options):
    """Return the flow's file and history after training on this process's rows of the tables."""
    flow = make()

    def own(table):
        if table is None or communicator is None:
            return table
        return table[distributed.rows_of_process(len(table), options["shards"], communicator)]

    tables = dict(tables)
    given = {name: own(tables.get(name)) for name in ("x", "context", "sample_weight")}
    validation = tables.get("validation", 0.1)
    if isinstance(validation, tuple):
        validation = tuple(own(part) for part in validation)
    elif isinstance(validation, np.ndarray):
        validation = own(validation)
    history = flow.fit(**given, validation=validation, progress=False, communicator=communicator, **options)
    assert np.isfinite(flow.parameters_flat()).all()
    return flow.parameters_flat().tobytes(), records(history), history.best_epoch, history.rows_left_out


def check_same(make, tables, sizes=(2, 3), **options):
    options = {"shards": SHARDS, "epochs": 2, "batch_size": 96} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nvpflow.DataWarning)
        alone = fitted(make, tables, **options)
        for size in sizes:
            for found in on_ranks(size, lambda ranks: fitted(make, tables, ranks, **options)):
                if isinstance(found, BaseException):
                    raise found
                assert found[1:] == alone[1:]
                assert found[0] == alone[0]


def build(**options):
    return lambda: nvpflow.build(3, **({"num_flows": 2, "hidden_sizes": (8,), "seed": 1} | options))


@pytest.mark.parametrize(
    "options",
    [
        {"standardize": False},
        {"standardize": True},
        {"standardize": True, "dtype": "float64"},
        {"standardize": "covariance"},
        {"standardize": True, "base": "student_t"},
        {"standardize": True, "base": "mixture"},
        {"standardize": True, "mixing": "lu", "actnorm": True},
        {"transform": "spline", "standardize": True},
    ],
    ids=str,
)
def test_any_flow_is_the_same_for_any_number_of_processes(options):
    check_same(build(**options), {"x": rows(601)})


def test_float64_rows_of_a_float32_flow():
    check_same(build(standardize=True), {"x": rows(601, dtype=np.float64) + 1e7})


def test_bounds_and_discrete_columns():
    x = np.abs(rows(601)) + np.float32(0.01)
    x[:, 1] = np.round(x[:, 1])
    check_same(build(standardize=True, bounds={0: (0, None)}, discrete=[1]), {"x": x, "validation": x[:50] + 0})


def test_contexts_and_weights_and_rows_that_count_for_nothing():
    x, context = rows(601), rows(601, seed=1)
    weight = np.random.default_rng(2).choice([0, 0.5, 3], size=601)
    tables = {"x": x, "context": context, "sample_weight": weight}
    make = build(standardize=True, context_size=3)
    check_same(make, tables)
    check_same(make, tables | {"validation": (x[:77] + 1, context[:77], weight[:77])}, max_round_trip=0.5)


def test_a_process_whose_rows_all_count_for_nothing_or_that_has_none():
    x, weight = rows(601), np.random.default_rng(3).choice([0.1, 1.0, 9.0], size=601)
    weight[:350] = 0
    check_same(build(standardize=True), {"x": x, "sample_weight": weight}, sizes=(2, 6))
    held_out = {"validation": (x[100:400] + 1, weight[100:400])}
    check_same(build(standardize="covariance"), {"x": x, "sample_weight": weight} | held_out)
    few = {"x": x[:4], "validation": x[:2], "sample_weight": None}
    check_same(build(), few, sizes=(2, 5), batch_size=None)
    few |= {"sample_weight": weight[-4:], "validation": (x[:2], weight[-2:])}
    check_same(build(), few, sizes=(5,), batch_size=None)


@pytest.mark.parametrize("validation", [0.1, None, rows(77, seed=5)], ids=["share", "none", "rows"])
def test_rows_that_are_far_out(validation):
    x = rows(601)
    x[[3, 500, 600]] = 3e7
    tables = {"x": x, "validation": validation}
    check_same(build(standardize=True), tables, standardize="robust")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nvpflow.DataWarning)
        history = build(standardize=True)().fit(**tables, standardize="robust", shards=4, epochs=1, progress=False)
    assert history.rows_left_out == 3


def test_sorted_rows_are_fitted_as_well():
    x = np.sort(rows(4000, seed=3), axis=0)
    x[:2000, 2] = 1  # constant in the first process
    losses = {}
    for shards in (None, 8):
        flow = build(standardize=True)()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", nvpflow.DataWarning)  # of the constant
            losses[shards] = flow.fit(x, shards=shards, epochs=20, progress=False, seed=2).best_loss
    assert losses[8] < losses[None] + 0.1
    check_same(build(standardize=True), {"x": x})


def test_the_options_of_every_process_are_compared():
    x = rows(600)

    def work(ranks):
        part = x[distributed.rows_of_process(len(x), SHARDS, ranks)]
        build()().fit(part, shards=SHARDS, communicator=ranks, epochs=2 + ranks.rank, progress=False)

    for error in on_ranks(2, work):
        assert "epochs differs among the processes" in str(error)


@pytest.mark.parametrize("bad", ["nan", "columns", "callback", "dtype", "raises"])
def test_what_one_process_meets_all_meet(bad):
    x = rows(600)

    def work(ranks):
        part = x[distributed.rows_of_process(len(x), SHARDS, ranks)].copy()
        options = {"epochs": 3}
        if ranks.rank == 1:
            if bad == "nan":
                part[5] = np.nan
            elif bad == "columns":
                part = part[:, :2]
            elif bad == "dtype":
                part = part.astype(complex)
            elif bad == "callback":
                options["callback"] = 7
            else:
                options["callback"] = lambda record: 1 / 0
        build()().fit(part, shards=SHARDS, communicator=ranks, progress=False, **options)

    errors = on_ranks(3, work)
    words = {
        "nan": "NaN",
        "columns": "expected [N, 3]",
        "dtype": "complex",
        "callback": "callback is",
        "raises": "division",
    }
    for rank, error in enumerate(errors):
        assert words[bad] in str(error)
        assert rank == 1 or "process 1 of 3, counted from 0, stopped: " in str(error)
    assert bad != "raises" or isinstance(errors[1], ZeroDivisionError)


def test_a_callback_of_one_process_stops_all():
    x = rows(600)

    def work(ranks):
        part = x[distributed.rows_of_process(len(x), SHARDS, ranks)]
        stop = (lambda record: record["epoch"] < 2) if ranks.rank == 2 else None
        return build()().fit(part, shards=SHARDS, communicator=ranks, progress=False, epochs=9, callback=stop)

    for history in on_ranks(3, work):
        assert (len(history), history.stop_reason) == (2, "callback")


def test_shards_and_communicators_that_cannot_be():
    x = rows(100)
    flow = build()()
    with pytest.raises(ValueError, match="batch_size is 100, expected a multiple of the 8 shards"):
        flow.fit(x, shards=8, batch_size=100)
    with pytest.raises(ValueError, match="shards is -1, expected 0"):
        flow.fit(x, shards=-1)
    with pytest.raises(TypeError, match=r"communicator is .*, expected a communicator of mpi4py"):
        flow.fit(x, communicator=3)
    with pytest.raises(ValueError, match="rank 2 and size 2"):
        flow.fit(x, communicator=Rank(None, 2, 2))
    with pytest.raises(ValueError, match="shards is 2, expected at least one for each of 3 processes"):
        distributed.rows_of_process(10, 2, Rank(None, 0, 3))
    with pytest.raises(ValueError, match="folds is 3 beside shards"):
        flow.fit(x, shards=2, folds=3)
    with pytest.raises(ValueError, match="checkpoint_every is 5 without a checkpoint"):
        flow.fit(x, checkpoint_every=5)


def test_one_process_alone_may_have_a_communicator():
    x = rows(500)
    parameters = [
        fitted(build(), {"x": x}, communicator, shards=distributed.SHARDS, epochs=2)[0]
        for communicator in (None, Rank(Meeting(1), 0, 1))
    ]
    assert parameters[0] == parameters[1]
    flow = build()()
    flow.fit(x, communicator=Rank(Meeting(1), 0, 1), epochs=2, progress=False)
    assert flow.parameters_flat().tobytes() == parameters[0]


@pytest.mark.parametrize("shards", [None, 3])
def test_a_checkpoint_within_an_epoch(shards, tmp_path):
    x, path = rows(700), tmp_path / "run"
    options = {
        "epochs": 3,
        "batch_size": 30,
        "shards": shards,
        "checkpoint": path,
        "checkpoint_every": 4,
        "progress": False,
    }
    whole = build()()
    history = whole.fit(x, **options)
    path.unlink()

    seen = []

    def copy(record):
        if record["epoch"] == 1:
            seen.append(path.read_bytes())

    first = build()()
    first.fit(x, **{**options, "epochs": 3}, callback=copy)
    path.write_bytes(seen[0])
    again = build()()
    assert records(again.fit(x, **options)) == records(history)
    assert again.parameters_flat().tobytes() == whole.parameters_flat().tobytes()


def differing(change, **given):
    """Return what rank 0 of two is told where rank 1 does something else."""
    x = rows(600)

    def work(ranks):
        part = x[distributed.rows_of_process(len(x), SHARDS, ranks)]
        flow, options = build(standardize=True)(), dict(given)
        part = change(flow, part, options) if ranks.rank == 1 else part
        flow.fit(part, shards=SHARDS, communicator=ranks, progress=False, epochs=1, **options)

    errors = on_ranks(2, work)
    assert all(isinstance(error, Exception) for error in errors)
    return repr(errors[0])


def test_names_weights_and_states_of_adam_are_compared():
    pd = pytest.importorskip("pandas")
    assert "names of the columns differs" in differing(lambda f, x, o: pd.DataFrame(x, columns=["a", "b", "c"]))

    def moved(flow, x, options):
        flow.set_parameters_flat(flow.parameters_flat() + 1)
        return x

    assert "weights of the flow differs" in differing(moved)

    def other_state(flow, x, options):
        options["adam"] = nvpflow.AdamState()
        options["adam"].epochs = 3
        return x

    assert "state of adam" in differing(other_state, adam=nvpflow.AdamState(), averaging=None)

    def without_weights(flow, x, options):
        options["sample_weight"] = None
        return x

    assert "sample_weight is missing" in differing(without_weights, sample_weight=np.ones(300))


def test_each_process_with_a_checkpoint_of_its_own_is_refused(tmp_path):
    x = rows(600)
    folders = [tmp_path / str(rank) for rank in range(2)]
    for rank, folder in enumerate(folders):
        folder.mkdir()
        build()().fit(x, shards=SHARDS, epochs=4, checkpoint=folder / "run", progress=False, callback=stop_at(rank + 1))

    def work(ranks):
        part = x[distributed.rows_of_process(len(x), SHARDS, ranks)]
        # One path for both: a link that each process sees otherwise is out of a thread's reach.
        path = os.path.join(folders[ranks.rank], "run")
        build()().fit(part, shards=SHARDS, communicator=ranks, epochs=4, checkpoint=path, progress=False)

    for error in on_ranks(2, work):
        assert "checkpoint differs among the processes" in str(error)


def stop_at(epoch):
    return lambda record: record["epoch"] < epoch


@pytest.mark.parametrize("shards", [None, 3])
def test_a_checkpoint_is_never_of_a_run_that_cannot_go_on(shards, tmp_path):
    x, path = rows(600) * 100, tmp_path / "run"
    options = {"shards": shards, "batch_size": 60, "learning_rate": 1e4, "clip_norm": None, "epochs": 3}
    options |= {"checkpoint": path, "checkpoint_every": 1, "progress": False}
    messages = []
    for _ in range(3):
        with pytest.raises(nvpflow.TrainingError) as error:
            build()().fit(x, **options)
        messages.append(str(error.value))
    assert messages[1] == messages[2]


def test_one_process_with_shards_looks_at_its_rows():
    x = rows(600)
    x[:, 2] = x[:, 0]
    with pytest.raises(ValueError, match="column 3 is a copy of column 1"):
        build()().fit(x, shards=SHARDS, progress=False)


PROGRAM = """
import sys
import numpy as np
import nvpflow
from nvpflow import distributed
{begin}
x = np.random.default_rng(0).normal(size=(999, 3)).astype(np.float32) ** 2
own = x[distributed.rows_of_process(len(x), 6, together)]
flow = nvpflow.build(3, num_flows=2, hidden_sizes=(8,), seed=1)
flow.fit(own, shards=6, communicator=together, epochs=2, progress=False)
open(f"{folder}/{{distributed.communicator(together).rank}}", "wb").write(flow.parameters_flat().tobytes())
"""


def expected_parameters():
    x = np.random.default_rng(0).normal(size=(999, 3)).astype(np.float32) ** 2
    flow = build()()
    flow.fit(x, shards=6, epochs=2, progress=False)
    return flow.parameters_flat().tobytes()


INTERRUPTED = """
import os, signal, sys
import numpy as np
import torch.distributed as dist
import nvpflow
from nvpflow import distributed

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{folder}/meeting", rank=rank, world_size=2)
x = np.random.default_rng(0).normal(size=(4000, 8)).astype(np.float32)
own = x[distributed.rows_of_process(len(x), 4, dist.group.WORLD)]

class Interrupted:  # the process group, of which one process gets a signal within an exchange
    def __init__(self, of):
        self.rank, self.size, self.max, self.of, self.calls = of.rank, of.size, of.max, of, 0

    def sum(self, values):
        self.calls += 1
        if rank == 1 and self.calls == 60:
            os.kill(os.getpid(), signal.SIGINT)
        self.of.sum(values)

together = Interrupted(distributed.communicator(dist.group.WORLD))
try:
    nvpflow.build(8).fit(own, shards=4, communicator=together, epochs=10**6, progress=False)
except BaseException as error:
    print(rank, type(error).__name__, error, flush=True)
dist.barrier()
"""


def test_ctrl_c_in_one_process_is_that_of_all(tmp_path):
    pytest.importorskip("torch")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED.format(folder=tmp_path), str(rank)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert said[1].startswith("1 KeyboardInterrupt")
    assert "process 1 of 2, counted from 0, stopped: KeyboardInterrupt" in said[0]


def test_gloo_of_pytorch(tmp_path):
    pytest.importorskip("torch")
    size = 2
    begin = (
        "import torch.distributed as dist\n"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/meeting', rank=int(sys.argv[1]), "
        f"world_size={size})\n"
        "together = dist.group.WORLD\n"
    )
    program = PROGRAM.format(begin=begin, folder=tmp_path)
    processes = [subprocess.Popen([sys.executable, "-c", program, str(rank)]) for rank in range(size)]
    assert [process.wait(120) for process in processes] == [0] * size
    assert {(tmp_path / str(rank)).read_bytes() for rank in range(size)} == {expected_parameters()}


def test_mpi(tmp_path):
    pytest.importorskip("mpi4py")
    if not shutil.which("mpirun"):
        pytest.skip("no mpirun")
    program = PROGRAM.format(begin="from mpi4py import MPI\ntogether = MPI.COMM_WORLD", folder=tmp_path)
    environment = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    expected = expected_parameters()
    for size, algorithm in ((2, 1), (3, 4)):
        command = ["mpirun", "--oversubscribe", "-n", str(size), "--mca", "coll_tuned_use_dynamic_rules", "1"]
        command += [
            "--mca",
            "coll_tuned_allreduce_algorithm",
            str(algorithm),
            sys.executable,
            "-m",
            "mpi4py",
            "-c",
            program,
        ]
        subprocess.run(command, check=True, timeout=120, env=environment)
        assert {Path(tmp_path, str(rank)).read_bytes() for rank in range(size)} == {expected}
