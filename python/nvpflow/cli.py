"""The command ``nvpflow``: fit, score, sample, check, merge-check, info, report, export, import and demo.

Exit codes:

* 0: done
* 1: an error (one line on stderr), or files that `merge-check` finds incomplete
* 2: wrong usage
* 3: `check` finds a model unreliable
* 130: Ctrl-C
* 141: the reader of a pipe went away

SIGTERM and SIGHUP end it as they end any process (143 and 129 to a shell), after unfinished files are removed.
"""

import argparse
import csv
import hashlib
import inspect
import io
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

import nvpflow
from nvpflow import (
    _bases,
    _certify,
    _checks,
    _cli_files,
    _data,
    _output,
    _training_options,
    certificate,
    data_io,
    tables,
)
from nvpflow._architecture import MASKS, MIXINGS, NETWORKS, OPTIONS, SCALES, TRANSFORMS, Options
from nvpflow._defaults import HIDDEN_SIZES, NUM_FLOWS, default_activation, default_standardize
from nvpflow._source import TRUTHS, rows_per_block
from nvpflow._spec import begins_with_standardize, bounds_in_words, bounds_of
from nvpflow._text import counted, visible
from nvpflow.exporters import METHODS

# Errors that the user can act on. Anything else is a bug of ours and keeps its traceback.
_EXPECTED_ERRORS = (OSError, ValueError, MemoryError, ImportError, RuntimeError, nvpflow.TrainingError)

_ACTIVATIONS = ", ".join(nvpflow._core.activation_names())
_SECONDS_BETWEEN_LINES = 10.0
_UNRELIABLE = 3  # exit code
_ROWS_OF_A_SEED = 1 << 63
_LOG_PROB = "log_prob"  # the column that score writes
_LIKE_THIS = "expected numbers such as 0.5,1.2 or names with a number each, a=0.5,b=1.2"

_TABLES = (
    "a .npy, .csv, .tsv (header or not; also .csv.gz and the like), .parquet or .feather file, or - for CSV, .npy or "
    "an Arrow stream on stdin; all but .npy need pyarrow"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    if sys.stderr is None:  # closed by the caller, as is standard output below
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        print("nvpflow: error: standard output is closed; send it to /dev/null if it is not wanted", file=sys.stderr)
        return 1
    arguments = argparse.Namespace()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # no name of a file or column ends a command
    try:
        with _ending_cleanly(), warnings.catch_warnings():
            warnings.simplefilter("always", nvpflow.DataWarning)
            warnings.showwarning = partial(_show_warning, arguments)
            _parser().parse_args(_with_negative_lists(sys.argv[1:] if argv is None else argv), arguments)
            code: int = arguments.run(arguments) or 0
            sys.stdout.flush()
    except _Ended as end:
        signal.signal(end.signal, signal.SIG_DFL)
        os.kill(os.getpid(), end.signal)
        raise
    except KeyboardInterrupt:
        print("nvpflow: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more as it exits; let that go nowhere instead of failing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except _EXPECTED_ERRORS as error:
        print(f"nvpflow: error: {_as_options(_one_line(error), arguments)}", file=sys.stderr)
        return 1
    return code


class _Ended(KeyboardInterrupt):
    """SIGTERM or SIGHUP: what tidies up behind Ctrl-C tidies up behind these."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@contextmanager
def _ending_cleanly() -> Iterator[None]:
    """Turn the signals that end a process into exceptions, where nobody has set them to something else."""

    def end(number: int, _: object) -> None:
        raise _Ended(number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names]
    try:
        taken = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
        for number in taken:
            signal.signal(number, end)
    except ValueError:  # called in a thread, which gets no signals
        taken = []
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _show_warning(
    arguments: argparse.Namespace,
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: Any = None,
) -> None:
    """Show what was found in a table as a message of the command; other warnings as Python does."""
    if issubclass(category, nvpflow.DataWarning):
        print(f"nvpflow: warning: {_as_options(str(message), arguments)}", file=sys.stderr, flush=True)
        return
    print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:  # without the number that str() puts in front
        return error.strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _as_options(text: str, arguments: argparse.Namespace) -> str:
    """Names of Python's arguments as the command's: --batch-size for batch_size, the table's file for x."""
    if source := getattr(arguments, "data", None):
        text = re.sub(r"^x(?=[ ,:])", lambda _: _shown(source), text)
    text = text.replace("force=True", "--force")
    text = text.replace(_data.SHOWN_BY, "(nvpflow check MODEL DATA shows them line by line)")
    options = {name: "--" + name.replace("_", "-") for name in vars(arguments) if "_" in name}
    options["num_threads"] = "--threads"
    return re.sub(r"(?<![\w'\"/.-])\w+(?![\w'\"/.-])", lambda word: options.get(word[0], word[0]), text)


# ----------------------------------------------------------------------------------------------------------- usage


def _with_negative_lists(argv: Sequence[str]) -> list[str]:
    """Write ``--context -20,3`` as ``--context=-20,3``: argparse takes a list that begins with "-" for an option."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] == "--context" and re.match(r"-[\d.]", argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nvpflow", description="Train normalizing flows on tables of numbers; score and sample with them."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show what this is and runs on, and exit")
    for option, folder, text in (
        ("--cmake-dir", nvpflow.get_cmake_dir(), "show the folder of the CMake package, and exit"),
        ("--include-dir", nvpflow.get_include(), "show the folder of the headers for C and C++, and exit"),
    ):
        parser.add_argument(option, action=_Folder, nargs=0, const=folder, help=text)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_fit(commands)
    _add_score(commands)
    _add_sample(commands)
    _add_check(commands)
    _add_merge_check(commands)
    _add_info(commands)
    _add_report(commands)
    _add_export(commands)
    _add_import(commands)
    _add_demo(commands)
    return parser


class _Folder(argparse.Action):
    """Prints a path as it is; argparse's own "version" would wrap a long one."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(self.const)
        parser.exit()


class _Version(argparse.Action):
    """Prints what a report of a fault should say. Devices are looked for only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        count = nvpflow.cuda.device_count()
        devices = ", ".join(nvpflow.cuda.device_name(i) for i in range(count))
        print(f"nvpflow {nvpflow.__version__}")
        print(f"CPU   {nvpflow.cpu_isa()}")
        print(f"CUDA  {devices or nvpflow.cuda.why_unavailable()}")
        parser.exit()


def _add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], summary: str) -> Any:
    command = commands.add_parser(name, help=summary, description=summary)
    command.set_defaults(run=run)
    return command


def _add_option(command: Any, *names: str, help: str, **options: Any) -> None:
    """Add an option; one with a default says it."""
    command.add_argument(*names, help=f"{help} (default: %(default)s)" if "default" in options else help, **options)


def _add_fit(commands: Any) -> None:
    fit = _add_command(commands, "fit", _run_fit, "Train a flow on a table and write it to a file.")
    data_help = f"training rows: {_TABLES}; float64 is kept where columns are standardized"
    fit.add_argument("data", metavar="DATA", help=data_help)
    _add_option(fit, "-o", "--output", metavar="MODEL", required=True, help="model file to write (safetensors)")
    _add_option(fit, "--force", action="store_true", help="overwrite MODEL")
    _add_option(fit, "--quiet", action="store_true", help="print errors only")

    model = fit.add_argument_group("model")
    _add_option(model, "--num-flows", type=int, metavar="K", default=NUM_FLOWS, help="coupling layers")
    sizes_help = "widths of the hidden layers of each coupling's network; none: no hidden layer (default: "
    sizes_help += f"{','.join(map(str, HIDDEN_SIZES))}; {HIDDEN_SIZES[0]} with --network residual)"
    _add_option(model, "--hidden-sizes", type=_sizes, metavar="N,N", help=sizes_help)
    activation_help = f"of the hidden layers: {_ACTIVATIONS} (default: relu for up to 12 columns, silu above)"
    _add_option(model, "--activation", metavar="NAME", help=activation_help)
    _add_option(model, "--scale-bound", type=float, metavar="B", default=1.0, help="largest log-scale of a layer")
    _add_architecture(model)
    standardize_help = "leave out the layer for the columns' means and standard deviations"
    _add_option(model, "--no-standardize", action="store_true", help=standardize_help)
    _add_option(model, "--dtype", choices=("float32", "float64"), default="float32", help="of weights and arithmetic")
    _add_training_options(fit.add_argument_group("training"))
    table = fit.add_argument_group("table")
    context_help = "columns that condition the others: the model is p(others | these); named as for --columns"
    _add_context_columns(table, context_help)
    weight_help = "what each row counts for, at least 0: a column that is not a part of the rows (default: none)"
    _add_option(table, "--weight-column", metavar="NAME", help=weight_help)
    _add_reading(table)


def _add_architecture(group: Any) -> None:
    """Add the options of `nvpflow.build` beyond those of a RealNVP, by its names."""
    transform_help = "affine: RealNVP; additive: NICE; spline: neural spline flow"
    _add_option(group, "--transform", choices=TRANSFORMS, default="affine", help=transform_help)
    _add_option(group, "--num-bins", type=int, metavar="N", default=8, help="of --transform spline")
    tail_help = "of --transform spline: splines reach from -B to B standard deviations; beyond it rows pass unchanged"
    _add_option(group, "--tail-bound", type=float, metavar="B", default=3.0, help=tail_help)
    scale_help = "log-scale of a layer; --scale-bound bounds the first four"
    _add_option(group, "--scale", choices=SCALES, default="tanh", help=scale_help)
    mask_help = "what couplings transform, in turns: halves, odd and even columns, random halves, binary digits"
    _add_option(group, "--mask", choices=MASKS, default="halves", help=mask_help)
    mixing_help = (
        "of the columns before each coupling: their reverse order, a random one (permutation), or that and a trained "
        "linear layer (lu) (default: none)"
    )
    _add_option(group, "--mixing", choices=MIXINGS, help=mixing_help)
    _add_option(
        group, "--actnorm", action="store_true", help="begin each step with a trained scale and shift per column"
    )
    network_help = "of each coupling; residual: blocks of one width, the only one of --hidden-sizes"
    _add_option(group, "--network", choices=NETWORKS, default="mlp", help=network_help)
    _add_option(group, "--num-blocks", type=int, metavar="N", default=2, help="blocks of --network residual")
    _add_option(group, "--layer-norm", action="store_true", help="normalize the output of each hidden layer")
    base_help = (
        "distribution of the latents; uniform needs --transform spline and data inside --interval; student_t is for "
        "heavy tails, mixture for separate groups"
    )
    _add_option(group, "--base", choices=_bases.NAMES, default="normal", help=base_help)
    interval_help = "of --base uniform, the same for all columns (default: 0 1)"
    _add_option(group, "--interval", nargs=2, type=float, metavar=("LO", "HI"), help=interval_help)
    df_help = "of --base student_t: the degrees of freedom to start from (default: 4)"
    _add_option(group, "--df", type=float, metavar="X", help=df_help)
    components_help = "of --base mixture: normal distributions that it is made of (default: 4)"
    _add_option(group, "--components", type=int, metavar="N", help=components_help)
    covariance_help = "of --base mixture: that of each component (default: diagonal)"
    _add_option(group, "--covariance", choices=_bases.COVARIANCES, help=covariance_help)
    bounds_help = (
        "intervals that columns cannot leave, share=0:1,duration=0: by name, or by number from 1 of those used"
    )
    _add_option(group, "--bounds", metavar="NAME=LO:HI,NAME=LO:", type=_bounds_option, action=_Once, help=bounds_help)
    discrete_help = (
        "columns of integers, which are trained on with noise and drawn as integers: named as for --bounds, whose ends "
        "are then the least and the largest integer"
    )
    _add_option(group, "--discrete", metavar="NAME,NAME", type=_listed_names, action=_Once, help=discrete_help)


def _add_training_options(group: Any) -> None:
    defaults = inspect.signature(nvpflow.Flow.fit).parameters
    for name, flag in _training_options.FLAGS.items():
        default = {} if defaults[name].default is None else {"default": defaults[name].default}
        metavar = {} if flag.metavar is None else {"metavar": flag.metavar}
        option = "--" + name.replace("_", "-")
        _add_option(group, option, type=flag.type, choices=flag.choices, help=flag.help, **metavar, **default)
    degenerate_help = "keep columns that are copies or combinations of others, whose density has no limit"
    _add_option(group, "--allow-degenerate", action="store_true", help=degenerate_help)
    validation_help = "share of the rows to hold out, or a table of its own"
    _add_option(group, "--validation", metavar="X", default="0.1", help=validation_help)
    _add_ignore_names(group, "a validation table whose columns are called otherwise than those of DATA")
    _add_threads(group)
    _add_device(group)
    _add_option(
        group, "--max-time", type=float, metavar="SECONDS", help="start no epoch that would end later than this"
    )
    history_help = "JSON file to write the losses of every epoch to, which report draws"
    _add_option(group, "--history", metavar="FILE", help=history_help)


def _add_score(commands: Any) -> None:
    summary = (
        "Write log p of every row of a table, in nats, one per line; of several tables, a Parquet file for each into a "
        "folder, where files that are done are left alone."
    )
    score = _add_command(commands, "score", _run_score, summary)
    score.add_argument("model", metavar="MODEL", help="model file")
    data_help = f"rows: {_TABLES}; float64 is kept where the model standardizes"
    score.add_argument("tables", metavar="DATA", nargs="+", help=data_help)
    _add_ignore_names(score)
    _add_context_columns(score)
    _add_reading(score, in_place=True)
    keep_help = "columns to write beside log p; not a part of the rows, unless the model has them"
    _add_option(score, "--keep", metavar="NAME,NAME", type=_listed_names, action=_Once, help=keep_help)
    _add_option(score, "--append", action="store_true", help="write every column of DATA, and log_prob behind them")
    _add_table_output(score, "; or a folder for a .parquet of each DATA")
    _cli_files.add_share(score)
    _add_threads(score)
    _add_device(score)


def _add_sample(commands: Any) -> None:
    sample = _add_command(commands, "sample", _run_sample, "Draw rows from a flow.")
    sample.add_argument("model", metavar="MODEL", help="model file")
    rows_help = "how many; with --context-from under each row of TABLE"
    number = _cli_files.rows_number
    _add_option(sample, "-n", "--rows", type=number, metavar="N", required=True, help=rows_help)
    _add_option(sample, "--seed", type=int, metavar="S", default=0, help="the same seed gives the same rows")
    _add_option(sample, "--start", type=int, metavar="I", default=0, help="first row, of the seed's endless sample")
    temperature_help = "draw from the flow whose base is N(0, T I) in place of N(0, I): below 1 nearer to the middle"
    _add_option(sample, "--temperature", type=float, metavar="T", help=temperature_help)
    context = sample.add_argument_group("context, of a model that has one")
    context_help = (
        "draw under one context: numbers in the model's order, such as 0.5,-1.2, or by its names, a=0.5,b=-1.2"
    )
    _add_option(context, "--context", metavar="X,X", type=_context_cells, action=_Once, help=context_help)
    from_help = f"draw under each row of a table, and write its context behind the rows: {_TABLES}"
    _add_option(context, "--context-from", metavar="TABLE", help=from_help)
    columns_help = "columns of TABLE, in this order (default: by the model's names, else all)"
    _add_context_columns(context, columns_help)
    _add_ignore_names(context)
    _add_cells(context)
    _add_table_output(sample, "; or a folder, with --rows-per-file")
    file_help = "write .parquet files of so many rows each into the folder OUT; those that are done are left alone"
    _add_option(sample, "--rows-per-file", type=number, metavar="R", help=file_help)
    _cli_files.add_share(sample)
    _add_threads(sample)
    _add_device(sample)


def _add_table_output(command: Any, folder: str = "") -> None:
    output_help = f".csv, .npy or .parquet file to write, - for stdout{folder}"
    _add_option(command, "-o", "--output", metavar="OUT", default="-", help=output_help)
    _add_option(command, "--format", choices=_output.KINDS, help="of OUT where its name does not say it; stdout: csv")
    _add_option(command, "--force", action="store_true", help="overwrite OUT")


def _add_reading(command: Any, *, in_place: bool = False) -> None:
    """Add the options of reading a table. in_place: its rows keep their numbers, whatever they hold."""
    columns_help = "columns to use, in this order (default: all); numbers from 1 where the table has no names"
    _add_option(command, "--columns", metavar="NAME,NAME", type=_listed_names, action=_Once, help=columns_help)
    _add_option(command, "--drop", metavar="NAME,NAME", type=_listed_names, action=_Once, help="columns to leave out")
    _add_cells(command, in_place=in_place)


def _add_context_columns(
    command: Any, help: str = "columns of the model's context, in this order (default: by the model's names)"
) -> None:
    _add_option(command, "--context-columns", metavar="NAME,NAME", type=_listed_names, action=_Once, help=help)


def _add_cells(command: Any, *, in_place: bool = False) -> None:
    missing_help = "rows with empty cells, NA or NaN: an error that lists them, left out, or NaN"
    if in_place:
        missing_help = "rows with empty cells, NA or NaN: an error that lists them; skip and nan: NaN for a result"
    _add_option(command, "--missing", choices=("refuse", "skip", "nan"), default="refuse", help=missing_help)
    delimiter_help = "of a CSV: a character or comma, semicolon, tab, pipe, space (default: as its first lines have it)"
    _add_option(command, "--delimiter", metavar="C", help=delimiter_help)


def _add_ignore_names(command: Any, what: str = "a table whose columns are called otherwise than the model's") -> None:
    _add_option(command, "--ignore-names", action="store_true", help=f"take {what}, in the order they have")


def _add_device(command: Any) -> None:
    _add_option(command, "--device", metavar="DEVICE", default="cpu", help="cpu, cuda or cuda:N")
    precision_help = "on CUDA: float32, or faster and less exact tf32 or bfloat16"
    _add_option(command, "--precision", choices=("float32", "tf32", "bfloat16"), default="float32", help=precision_help)


def _add_threads(command: Any) -> None:
    _add_option(command, "--threads", type=int, metavar="N", default=0, help="0: all that this process may use")


def _add_check(commands: Any) -> None:
    summary = "Measure how exactly a flow computes on a table, and say whether to rely on it (exit code 3: no)."
    check = _add_command(commands, "check", _run_check, summary)
    check.add_argument("model", metavar="MODEL", help="model file")
    check.add_argument("data", metavar="DATA", help=f"rows: {_TABLES}; float64 is kept where the model standardizes")
    _add_ignore_names(check)
    _add_context_columns(check)
    _add_reading(check, in_place=True)
    _add_option(check, "--json", action="store_true", help="print JSON")
    tolerance_help = "largest relative error that is not called unreliable"
    _add_option(check, "--tolerance", type=float, metavar="X", default=certificate.TOLERANCE, help=tolerance_help)
    jacobian_help = "rows whose Jacobian is formed in float64 (default: up to 64, fewer or none for large flows)"
    _add_option(check, "--jacobian-rows", type=int, metavar="N", help=jacobian_help)
    _add_threads(check)
    _add_device(check)


def _add_merge_check(commands: Any) -> None:
    summary = (
        "Say whether the files that jobs of an array wrote are all there, of one model and one instruction set (exit "
        "code 1: no)."
    )
    check = _add_command(commands, "merge-check", _cli_files.check, summary)
    check.add_argument("folder", metavar="DIR", help="what -o of score or sample was; metadata are read, and no rows")
    _add_option(check, "--files", type=int, metavar="N", help="how many there should be (default: what they say)")
    rows_help = "how many there should be in all (default: any number; a sample has no gap)"
    _add_option(check, "--rows", type=_cli_files.rows_number, metavar="N", help=rows_help)


def _add_info(commands: Any) -> None:
    info = _add_command(commands, "info", _run_info, "Show what a model file holds.")
    info.add_argument("model", metavar="MODEL", help="model file")
    _add_option(info, "--json", action="store_true", help="print JSON")


def _add_report(commands: Any) -> None:
    summary = "Write a page about a model and a table it was not trained on: likelihood, samples, latents, exactness."
    report = _add_command(commands, "report", _run_report, summary)
    report.add_argument("model", metavar="MODEL", help="model file")
    report.add_argument("data", metavar="DATA", help=f"rows: {_TABLES}; float64 is kept where the model standardizes")
    _add_option(report, "-o", "--output", metavar="PAGE", required=True, help="HTML file to write, - for stdout")
    _add_option(report, "--force", action="store_true", help="overwrite PAGE")
    _add_ignore_names(report)
    _add_context_columns(report)
    _add_reading(report, in_place=True)
    train_help = "training rows, to fit the Gaussian to (default: to halves of DATA in turns)"
    _add_option(report, "--train", metavar="TABLE", help=train_help)
    _add_option(report, "--history", metavar="FILE", help="what fit --history wrote, for the learning curve")
    names_help = "of the columns (default: those in DATA or else in MODEL, where it has some)"
    _add_option(report, "--names", metavar="NAME,NAME", type=_listed_names, action=_Once, help=names_help)
    _add_option(report, "--title", metavar="TEXT", help="of the page (default: names of MODEL and DATA)")
    _add_threads(report)
    _add_device(report)


def _add_export(commands: Any) -> None:
    summary = "Write one method of a flow as an ONNX file, and check it against the flow."
    export = _add_command(commands, "export", _run_export, summary)
    export.add_argument("model", metavar="MODEL", help="model file")
    _add_option(export, "-o", "--output", metavar="FILE", required=True, help=".onnx file to write")
    _add_option(export, "--force", action="store_true", help="overwrite FILE")
    _add_option(export, "--method", choices=METHODS, default="log_prob", help="what the file computes")
    dtype_help = "of inputs, outputs and arithmetic (default: the model's)"
    _add_option(export, "--dtype", choices=("float32", "float64"), help=dtype_help)


def _add_import(commands: Any) -> None:
    summary = (
        "Make a model file of the state dict of a flow of another library. Nothing in it is executed, so that nothing "
        "can be compared; nvpflow.importers in Python compares."
    )
    command = _add_command(commands, "import", _run_import, summary)
    command.add_argument("model", metavar="STATE", help="file that torch.save(model.state_dict(), ...) wrote")
    _add_option(command, "-o", "--output", metavar="MODEL", required=True, help="model file to write (safetensors)")
    _add_option(command, "--force", action="store_true", help="overwrite MODEL")
    _add_option(command, "--library", choices=("nflows", "zuko"), required=True, help="that the flow is of")
    _add_option(command, "--activation", metavar="NAME", default="relu", help=f"of the hidden layers: {_ACTIVATIONS}")
    _add_option(command, "--slope", type=float, metavar="X", default=1e-3, help="of the transforms of zuko")
    tail_help = "how far splines reach; of nflows no tensor holds it (default: 5 for zuko)"
    _add_option(command, "--tail-bound", type=float, metavar="B", help=tail_help)
    prefix_help = "what the flow's tensors are called by where it is a part of a model, such as flow."
    _add_option(command, "--prefix", metavar="TEXT", default="", help=prefix_help)
    _add_option(command, "--dtype", choices=("float32", "float64"), default="float32", help="of weights and arithmetic")
    _add_option(command, "--json", action="store_true", help="print the report as JSON")


def _listed_names(text: str) -> list[str]:
    return next(csv.reader([text]), [])


def _bounds_option(text: str) -> list[tuple[str, tuple[float | None, float | None]]]:
    """Return columns with their intervals: share=0:1,duration=0:."""
    found = []
    for cell in _listed_names(text):
        name, _, interval = cell.rpartition("=")
        low, colon, high = interval.partition(":")
        if not (name.strip() and colon):
            raise argparse.ArgumentTypeError(
                f"{text!r} is no list of intervals, expected one such as share=0:1,duration=0:"
            )
        try:
            ends = tuple(float(end) if end.strip() else None for end in (low, high))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{cell!r} is no interval, expected numbers as in share=0:1") from None
        found.append((name.strip(), (ends[0], ends[1])))
    return found


def _context_cells(text: str) -> list[tuple[str, float]]:
    """Return the numbers of one context, each with its name; "" where they are told by their order."""
    cells = []
    for cell in _listed_names(text):
        name, _, number = cell.rpartition("=")
        cells.append((name.strip(), _finite(number)))
    if not cells or ("" in dict(cells) and any(name for name, _ in cells)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list, {_LIKE_THIS}")
    return cells


def _finite(text: str) -> float:
    """Return a number as tables have it."""
    word = text.strip().lower()
    try:
        number = TRUTHS[word] if word in TRUTHS else float(word.replace("_", "x"))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number, true or false, {_LIKE_THIS}")
    return number


class _Once(argparse.Action):
    """Takes a list in one piece: of two pieces argparse itself would drop the first."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option} is given twice, expected one list; write {option} {self.metavar}")
        setattr(namespace, self.dest, values)


def _add_demo(commands: Any) -> None:
    summary = "Train on a real data set that comes with the package, and show what the flow can do."
    demo = _add_command(commands, "demo", _run_demo, summary)
    _add_option(
        demo, "-o", "--output", metavar="DIR", help="folder for the results (default: nvpflow-demo, then -2, ...)"
    )
    _add_option(demo, "--force", action="store_true", help="overwrite the results of an earlier demo in DIR")
    _add_option(demo, "--epochs", type=int, metavar="N", help="passes over the data (default: enough to converge)")
    _add_threads(demo)
    _add_option(demo, "--device", metavar="DEVICE", default="cpu", help="cpu, cuda or cuda:N")


def _sizes(text: str) -> tuple[int, ...]:
    if text == "none":
        return ()
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes, expected one such as 100,100") from None


# -------------------------------------------------------------------------------------------------------- commands


class _Data(NamedTuple):
    """The rows of a table with their context and weights, which may be none, and the names that the table has."""

    rows: Any
    context: Any
    weights: Any
    names: list[str] | None
    context_names: list[str] | None


def _run_fit(arguments: argparse.Namespace) -> None:
    _check_fit_paths(arguments)
    model = {name: getattr(arguments, name) for name in OPTIONS}
    model |= {"hidden_sizes": _hidden_sizes(arguments), "base": _base(arguments)}
    Options(**model).checked()
    _output.check_target(arguments.output, force=arguments.force)
    # Before minutes go into reading the data: is the device there?
    where = {"dtype": arguments.dtype, "device": arguments.device, "precision": arguments.precision}
    context_size = len(arguments.context_columns or ())
    nvpflow.build(2, 1, (), context_size=context_size, **where)
    data = _read(arguments, arguments.data, arguments.dtype, wide=_standardizes(arguments))
    rows = data.rows
    validation = _validation(arguments, data)
    flow = nvpflow.build(
        rows.shape[1],
        arguments.num_flows,
        context_size=context_size,
        activation=default_activation(rows.shape[1]) if arguments.activation is None else arguments.activation,
        **model,
        bounds=_bounds_of(arguments, data),
        discrete=[_place("--discrete", name.strip(), data) for name in arguments.discrete or ()],
        column_names=data.names,
        standardize=_standardize(arguments, *rows.shape),
        seed=arguments.seed,
        **where,
    )
    flow.context_names = data.context_names
    say: Callable[..., None] = (lambda *_, **__: None) if arguments.quiet else print
    under = f", under {counted(context_size, 'column')} of context" if context_size else ""
    say(f"data: {arguments.data}, {rows.shape[0]:,} rows x {rows.shape[1]} columns{under}")
    say(f"model: {flow}", flush=True)

    history = _train(arguments, flow, data, validation)
    flow.save(arguments.output)
    if arguments.history is not None:
        _write_history(arguments.history, history, force=arguments.force)
    say(history)
    kind, count = ("held-out", history.validation_rows) if history.validation_rows else ("training", history.train_rows)
    by_weight = "" if data.weights is None else " by weight"
    said = f"{kind} log-likelihood{by_weight}: {-history.best_loss:.4f} nats per row"
    say(f"{said} (epoch {history.best_epoch}, {count:,} rows)")
    say(f"model written to {arguments.output}")


# The options of each base, by the argument that they are.
_OF_BASE = {"interval": "uniform", "df": "student_t", "components": "mixture", "covariance": "mixture"}


def _base(arguments: argparse.Namespace) -> _bases.Base:
    """Return the base that the options name."""
    given = {name: value for name in _OF_BASE if (value := getattr(arguments, name)) is not None}
    for name in given:
        if (owner := _OF_BASE[name]) != arguments.base:
            raise data_io.DataError(f"--{name} is given with --base {arguments.base}, expected --base {owner} for it")
    try:
        if "interval" in given:
            return _bases.Uniform(*given["interval"])
        return type(_bases.checked(arguments.base))(**given)
    except ValueError as error:
        raise data_io.DataError(f"--{next(iter(given))}: {error}") from None


def _standardize(arguments: argparse.Namespace, rows: int, columns: int) -> bool | Literal["covariance"] | None:
    """Return what `nvpflow.build` is told for a table of this shape."""
    if arguments.no_standardize:
        return False
    if arguments.standardize is None:
        plain = arguments.base == "normal" and not arguments.context_columns
        return default_standardize(rows, columns, plain=plain)
    return "covariance" if arguments.standardize == "covariance" else None


def _bounds_of(arguments: argparse.Namespace, data: _Data) -> dict[Any, Any]:
    """Return the intervals of columns, by name, or by index from 0 where the table has no names."""
    given = arguments.bounds or []
    if again := [name for i, (name, _) in enumerate(given) if name in dict(given[:i])]:
        raise data_io.DataError(f"--bounds names column {_quoted(again[0])} twice, expected it once")
    return {_place("--bounds", name, data): pair for name, pair in given}


def _place(option: str, name: str, data: _Data) -> Any:
    """Return the name of a column that an option gives, or its index from 0 where the table has no names."""
    if data.names is not None:
        return name
    count = data.rows.shape[1]
    places = {str(j + 1): j for j in range(count)}
    if name not in places:
        raise data_io.DataError(
            f"{option} names column {_quoted(name)}, expected a number from 1 to {count}: the table has no names"
        )
    return places[name]


def _standardizes(arguments: argparse.Namespace) -> bool:
    return not arguments.no_standardize and not _bases.is_bounded(_base(arguments))


def _hidden_sizes(arguments: argparse.Namespace) -> Sequence[int]:
    if arguments.hidden_sizes is not None:
        sizes: Sequence[int] = arguments.hidden_sizes
        return sizes
    return HIDDEN_SIZES[:1] if arguments.network == "residual" else HIDDEN_SIZES


def _check_fit_paths(arguments: argparse.Namespace) -> None:
    """Refuse to write the model over what the run reads, and times that mean nothing."""
    if arguments.output == "-":
        raise data_io.DataError("-o: a model is a file, it cannot go to stdout")
    if arguments.standardize is not None and arguments.no_standardize:
        raise data_io.DataError(
            f"--standardize {arguments.standardize} and --no-standardize contradict; give one of them"
        )
    if arguments.max_time is not None and not arguments.max_time > 0:
        raise data_io.DataError(f"--max-time is {arguments.max_time}, expected a number of seconds above 0")
    _output.check_distinct(
        arguments.output,
        {
            "DATA": arguments.data,
            "--validation": arguments.validation,
            "--checkpoint": arguments.checkpoint,
            "--history": arguments.history,
        },
    )
    if arguments.history is not None:
        _output.check_target(arguments.history, force=arguments.force)
        sources = {"DATA": arguments.data, "--validation": arguments.validation, "--checkpoint": arguments.checkpoint}
        _output.check_distinct(arguments.history, sources, option="--history")


def _fit_options(arguments: argparse.Namespace) -> dict[str, Any]:
    options = {name: getattr(arguments, name) for name in (*_training_options.FLAGS, "allow_degenerate")}
    if options["standardize"] == "covariance":  # which is the flow's own
        options["standardize"] = None
    return options


def _write_history(target: str, history: nvpflow.History, *, force: bool) -> None:
    """Write a history as JSON, which has no NaN: null stands for it."""
    values = {
        name: [None if isinstance(v, float) and math.isnan(v) else v for v in value]
        if isinstance(value, list)
        else value
        for name, value in history.to_dict().items()
    }
    _output.write_text(target, json.dumps(values, indent=1, allow_nan=False) + "\n", force=force)


def _read_history(source: str) -> nvpflow.History:
    with open(source, encoding="utf-8") as file:
        try:
            values = json.load(file)
            return nvpflow.History.from_dict(values if isinstance(values, dict) else {})
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise data_io.DataError(f"{source}: not JSON: {error}") from error
        except ValueError as error:
            raise data_io.DataError(f"{source}: not a file of fit --history: {error}") from error


def _train(arguments: argparse.Namespace, flow: nvpflow.Flow, data: _Data, validation: Any) -> nvpflow.History:
    started = reported = time.monotonic()
    # The progress bar is for terminals; a log gets a line now and then.
    log = not arguments.quiet and not sys.stderr.isatty()
    kept = False  # an epoch whose weights the flow will have
    out_of_time = False

    def after_epoch(record: Any) -> bool:
        nonlocal kept, out_of_time, reported
        kept = kept or not arguments.max_round_trip or record["round_trip"] <= arguments.max_round_trip
        now = time.monotonic()
        if log and now - reported >= _SECONDS_BETWEEN_LINES:
            reported = now
            print(_epoch_line(record, arguments.epochs, now - started), file=sys.stderr, flush=True)
        if arguments.max_time is not None:
            out_of_time = now - started + record["seconds"] > arguments.max_time
        return not out_of_time

    try:
        history = flow.fit(
            data.rows,
            context=data.context,
            sample_weight=data.weights,
            validation=validation,
            **_fit_options(arguments),
            progress=False if arguments.quiet else None,
            callback=after_epoch,
            num_threads=arguments.threads,
        )
    except (KeyboardInterrupt, nvpflow.TrainingError):
        if kept:
            flow.save(arguments.output)
            print(f"nvpflow: the best weights so far are in {arguments.output}", file=sys.stderr)
        raise
    return replace(history, stop_reason="--max-time") if out_of_time else history


def _epoch_line(record: Any, epochs: int, seconds: float) -> str:
    line = f"epoch {record['epoch']}/{epochs}, {seconds:.0f} s: training nll {record['train_loss']:.4f}"
    if not math.isnan(record["validation_loss"]):
        line += f", validation nll {record['validation_loss']:.4f}"
    return line if math.isnan(record["round_trip"]) else f"{line}, round trip {record['round_trip']:.1e}"


def _read(
    arguments: argparse.Namespace,
    source: str,
    dtype: str,
    model: data_io.ModelColumns | None = None,
    *,
    wide: bool,
    in_place: bool = False,
) -> _Data:
    """Return what a table holds, which must have the model's columns."""
    reading = _reading(arguments, for_density=model is None)
    with data_io.open_table(source, _in_place(reading) if in_place else reading, model) as table:
        rows, context, weights = table.read(dtype, wide=wide)
    _say_notes(arguments, table)
    if len(rows) == 0:
        raise data_io.DataError(f"{source}: no rows")
    return _Data(rows, context, weights, table.names, None if context is None else table.context_names)


def _reading(arguments: argparse.Namespace, **more: Any) -> data_io.Reading:
    """Return what the options say about reading a table."""
    return data_io.Reading(
        columns=arguments.columns,
        drop=arguments.drop or (),
        context=arguments.context_columns,
        weight=getattr(arguments, "weight_column", None),
        missing=arguments.missing,
        delimiter=arguments.delimiter,
        **more,
    )


def _in_place(reading: data_io.Reading) -> data_io.Reading:
    """Return how to read a table whose rows are to keep their numbers: what `skip` leaves out is NaN."""
    return replace(reading, in_place=True, missing="nan" if reading.missing == "skip" else reading.missing)


def _say_notes(arguments: argparse.Namespace, table: data_io.Table) -> None:
    """Say what was left out of a table."""
    notes = list(table.notes)
    if table.incomplete and arguments.missing == "skip":
        what = {_run_score: "log p is NaN there", _run_check: "results are NaN there"}.get(arguments.run, "left out")
        notes.append(f"{table.name}: {counted(table.incomplete, 'row')} with missing cells: {what}")
    for note in [] if getattr(arguments, "quiet", False) else notes:
        print(f"nvpflow: {note}", file=sys.stderr)


def _quoted(name: str) -> str:
    """Return a name as a terminal can show it: it may be a stranger's. Letters outside ASCII stay as they are."""
    return _checks.shortened(repr(name))


def _model_columns(arguments: argparse.Namespace, flow: nvpflow.Flow) -> data_io.ModelColumns:
    """Return what the model takes of a table."""
    names = (None, None) if arguments.ignore_names else (flow.column_names, flow.context_names)
    return data_io.ModelColumns(flow.spec.input_size, names[0], flow.spec.context_size, names[1])


def _validation(arguments: argparse.Namespace, data: _Data) -> Any:
    """Return the share of rows to hold out, or the rows of the table that --validation names, with all beside them."""
    if not arguments.validation.strip():
        raise data_io.DataError("--validation is empty, expected a share of the rows such as 0.1, or a table")
    try:
        return float(arguments.validation)
    except ValueError:
        names = (None, None) if arguments.ignore_names else (data.names, data.context_names)
        size = 0 if data.context is None else data.context.shape[1]
        model = data_io.ModelColumns(data.rows.shape[1], names[0], size, names[1])
        found = _read(arguments, arguments.validation, arguments.dtype, model, wide=_standardizes(arguments))
        parts = [part for part in (found.rows, found.context, found.weights) if part is not None]
        return tuple(parts) if len(parts) > 1 else found.rows


def _run_score(arguments: argparse.Namespace) -> int:
    if _cli_files.scores_into_folder(arguments):
        return _cli_files.score(arguments, partial(_score_table, arguments))
    (arguments.data,) = arguments.tables
    _output.check_distinct(arguments.output, {"MODEL": arguments.model, "DATA": arguments.data})
    flow = nvpflow.load(arguments.model, device=arguments.device, precision=arguments.precision)
    flow.num_threads = arguments.threads
    _score_table(arguments, flow, arguments.data, arguments.output)
    return 0


def _score_table(
    arguments: argparse.Namespace,
    flow: nvpflow.Flow,
    source: str,
    target: str,
    metadata: Mapping[bytes, bytes] | None = None,
) -> int:
    """Score a table into a file, into Parquet where there are metadata for it; return its rows."""
    kind = "parquet" if metadata is not None else _output.output_format(target, arguments.format)
    beside = bool(arguments.keep or arguments.append)
    if beside and kind == "npy":
        raise data_io.DataError("--keep and --append: .npy holds numbers of one kind only; write .csv or .parquet")
    # A row that cannot be scored keeps its place: score i belongs to row i, whatever --missing says.
    reading = _in_place(
        _reading(arguments, keep=arguments.keep or (), append=arguments.append, typed=kind == "parquet")
    )
    rows = 0
    with data_io.open_table(source, reading, _model_columns(arguments, flow)) as table:
        if beside and _LOG_PROB in table.passed_names:
            raise data_io.DataError(f"{source}: it has a column {_LOG_PROB} already; name others with --keep")
        with _output.create_table(
            target,
            kind=kind,
            dtype=flow.spec.dtype,
            columns=None,
            rows=table.rows,
            names=[*table.passed_names, _LOG_PROB] if beside else [_LOG_PROB] if kind == "parquet" else None,
            metadata=metadata,
            force=arguments.force,
        ) as write:
            for block in table.blocks():
                log_p = tables.log_p_of(flow, block.rows, block.context)
                rows += len(log_p)
                write(log_p, block.passed, _LOG_PROB) if beside else write(log_p)
    _say_notes(arguments, table)
    return rows


def _run_sample(arguments: argparse.Namespace) -> int:
    into_folder = _cli_files.samples_into_folder(arguments)
    _output.check_distinct(arguments.output, {"MODEL": arguments.model, "--context-from": arguments.context_from})
    flow = nvpflow.load(arguments.model, device=arguments.device, precision=arguments.precision)
    flow.num_threads = arguments.threads
    _check_sample_rows(arguments, 1)
    contexts, names = _contexts(arguments, flow)
    if into_folder:
        return _cli_files.sample(arguments, flow, contexts, flow._rows_dtype())
    tables = [] if contexts is None or contexts.ndim == 1 else [contexts]
    total = arguments.rows * len(tables[0]) if tables else arguments.rows
    _check_sample_rows(arguments, len(tables[0]) if tables else 1)
    dtype = flow._rows_dtype()
    with _output.create_table(
        arguments.output,
        kind=_output.output_format(arguments.output, arguments.format),
        dtype=np.result_type(dtype, *map(_narrowest, tables)).name,
        columns=flow.spec.input_size + sum(table.shape[1] for table in tables),
        rows=total,
        names=_sampled_names(flow, names) if tables else flow.column_names,
        force=arguments.force,
    ) as write:
        for drawn, under in _samples(arguments, flow, contexts, dtype):
            write(drawn, behind=under)
    return 0


def _check_sample_rows(arguments: argparse.Namespace, contexts: int) -> None:
    """Check -n and --start, before the first row is written."""
    total = arguments.rows * contexts
    asked = f"-n {arguments.rows}" + (f" for each of {contexts:,} contexts" if contexts > 1 else "")
    if total < 0:
        raise ValueError(f"{asked}: expected at least 0")
    if arguments.start < 0:
        raise ValueError(f"--start {arguments.start}: expected at least 0")
    if total > _ROWS_OF_A_SEED:
        raise ValueError(f"{asked}: a seed has {_ROWS_OF_A_SEED} rows, expected no more")
    if arguments.start + max(total, 1) > _ROWS_OF_A_SEED:
        raise ValueError(
            f"--start {arguments.start} and {asked}: a seed has rows 0 to {_ROWS_OF_A_SEED - 1}, expected a start "
            f"of at most {_ROWS_OF_A_SEED - max(total, 1)}"
        )


def _contexts(arguments: argparse.Namespace, flow: nvpflow.Flow) -> tuple[Any, list[str] | None]:
    """Return under what to sample, [C], [M, C] or None, and the names that a table of contexts has."""
    one, source, size = arguments.context, arguments.context_from, flow.spec.context_size
    if size == 0 and (one is not None or source is not None):
        raise data_io.DataError(f"--context{'-from' if one is None else ''}: the model has no context")
    if one is not None and source is not None:
        raise data_io.DataError("--context and --context-from are both given, expected one of them")
    if size > 0 and one is None and source is None:
        called = f" ({', '.join(map(_quoted, flow.context_names))})" if flow.context_names else ""
        raise data_io.DataError(
            f"the model is a density under a context of {counted(size, 'number')}{called}, expected either --context "
            "with these or --context-from with a table of them"
        )
    if source is None and arguments.context_columns is not None:
        raise data_io.DataError("--context-columns is given, expected --context-from beside it: it names its columns")
    if source is None:
        return (None if one is None else _one_context(one, flow)), None
    reading = data_io.Reading(
        context=arguments.context_columns,
        context_only=True,
        missing=arguments.missing,
        delimiter=arguments.delimiter,
    )
    with data_io.open_table(source, reading, _model_columns(arguments, flow)) as table:
        contexts = table.read(flow.spec.dtype).context
    _say_notes(arguments, table)
    assert contexts is not None
    _check_range(source, contexts, table.context_names or flow.context_names, flow.spec.dtype)
    return contexts, table.context_names


def _one_context(given: Sequence[tuple[str, float]], flow: nvpflow.Flow) -> NDArray[np.float64]:
    """Return the numbers of --context in the model's order."""
    names, known, size = [name for name, _ in given], flow.context_names, flow.spec.context_size
    if names[0] and known is None:
        raise data_io.DataError(
            f"--context names {_quoted(names[0])}, expected numbers only: the model has no names for its context; "
            f"give the {counted(size, 'number')} in their order"
        )
    if names[0] and known is not None and sorted(names) != sorted(name.strip() for name in known):
        raise data_io.DataError(
            f"--context names {', '.join(map(_quoted, names))}, expected each number of the model's context once: "
            f"{', '.join(map(_quoted, known))}"
        )
    if len(given) != size:
        raise data_io.DataError(f"--context has {counted(len(given), 'number')}, expected {size} as the model takes")
    if names[0] and known is not None:
        by_name = dict(given)
        given = [(name, by_name[name.strip()]) for name in known]
    numbers = np.array([number for _, number in given])
    _check_range("--context", numbers[None], known, flow.spec.dtype)
    return numbers


def _check_range(source: str, contexts: NDArray[Any], names: Sequence[str] | None, dtype: str) -> None:
    """Refuse numbers [M, C] that are infinite in the model's dtype; NaN is what was asked for."""
    with np.errstate(over="ignore"):
        bad = np.argwhere(np.isinf(contexts.astype(dtype)))
    if len(bad):
        row, column = bad[0]
        called = _quoted(names[column]) if names else f"column {column + 1} of the context"
        where = f" in row {row}, counted from 0" if len(contexts) > 1 else ""
        raise data_io.DataError(
            f"{source}: {called} is {contexts[row, column]:g}{where}, expected a number that {dtype} holds"
        )


def _narrowest(contexts: NDArray[Any]) -> np.dtype[Any]:
    """Return float32 where it holds contexts as they are, else their own dtype."""
    narrow = contexts.astype(np.float32)
    return np.dtype(narrow.dtype if np.array_equal(contexts, narrow, equal_nan=True) else contexts.dtype)


def _sampled_names(flow: nvpflow.Flow, of_table: Sequence[str] | None) -> list[str] | None:
    """Return the names of a model's columns and of its context behind them; those of neither are None."""
    contexts = flow.context_names or of_table
    if flow.column_names is None and contexts is None:
        return None
    columns = flow.column_names or [f"column_{i + 1}" for i in range(flow.spec.input_size)]
    return [*columns, *(contexts or [f"context_{i + 1}" for i in range(flow.spec.context_size)])]


def _samples(arguments: argparse.Namespace, flow: nvpflow.Flow, contexts: Any, dtype: str) -> Iterator[tuple[Any, Any]]:
    """Yield the sample in blocks, and beside each the contexts of its rows where these are a table."""
    count, step = arguments.rows, rows_per_block(flow.spec.input_size)
    draw = partial(flow.sample, seed=arguments.seed, dtype=dtype, temperature=arguments.temperature)
    if contexts is None or contexts.ndim == 1:
        for first in range(0, count, step):
            yield draw(min(step, count - first), start=arguments.start + first, context=contexts), None
        return
    together = max(1, step // max(1, count))  # contexts whose rows make a block
    for i in range(0, len(contexts), together):
        under = contexts[i : i + together]
        for first in range(0, count, step):
            most = min(step, count - first)
            drawn = draw(most, start=arguments.start + i * count + first, context=under)
            yield drawn.reshape(-1, flow.spec.input_size), np.repeat(under, most, axis=0)


def _run_check(arguments: argparse.Namespace) -> int:
    flow = nvpflow.load(arguments.model, device=arguments.device, precision=arguments.precision)
    flow.num_threads = arguments.threads
    certifier = _certify.Certifier(flow, tolerance=arguments.tolerance, jacobian_rows=arguments.jacobian_rows)
    reading = _in_place(_reading(arguments))
    with data_io.open_table(arguments.data, reading, _model_columns(arguments, flow)) as table:
        spec, called = flow.spec, table.names or flow.column_names
        standardizes = begins_with_standardize(spec)
        look = _data.RunningLook(
            *(called, spec.input_size, spec.dtype, standardizes, _data.trained_scales(flow)), bounds=bounds_of(spec)
        )
        beside = _look_at_contexts(flow, table)
        for rows, contexts, _ in table.chunks(spec.dtype, wide=spec._takes_float64_rows):
            look.add(rows)
            if contexts is not None:
                beside.add(contexts)
            certifier.add(rows, None if contexts is None else data_io.converted(contexts, spec.dtype))
    _say_notes(arguments, table)
    if certifier.rows == 0:
        raise data_io.DataError(f"{arguments.data}: no rows")
    _say_columns(arguments.data, (*look.report().findings, *beside.report().findings))
    found = certifier.certificate()
    print(found.to_json() if arguments.json else found)
    return 0 if found.ok else _UNRELIABLE


def _look_at_contexts(flow: nvpflow.Flow, table: data_io.Table) -> _data.RunningLook:
    spec, names = flow.spec, table.context_names or flow.context_names
    trained = _data.trained_context_scales(flow)
    return _data.RunningLook(names, spec.context_size, spec.dtype, spec.standardize_context, trained, of_context=True)


def _say_columns(source: str, findings: Sequence[nvpflow.Finding]) -> None:
    """Say on stderr what was found in the columns of a table, but for lost digits of x, which a certificate tells."""
    for finding in findings:
        if (finding.argument, finding.kind) not in (("x", "digits"), ("x", "rows")):
            said = finding.text if finding.kind == "missing" else finding  # whose remedy is Python's
            print(f"nvpflow: {source}: {said}", file=sys.stderr)


def _run_info(arguments: argparse.Namespace) -> None:
    flow = nvpflow.load(arguments.model)
    tensors = {name: list(values.shape) for name, values in flow.parameters().items()}
    if arguments.json:
        info = {
            "spec": json.loads(flow.spec.to_json()),
            "column_names": flow.column_names,
            "context_names": flow.context_names,
            "threshold": None if flow.threshold is None else flow.threshold._asdict(),
            "import_report": None if flow.import_report is None else flow.import_report.to_dict(),
            "num_parameters": flow.num_parameters,
            "tensors": tensors,
        }
        print(json.dumps(info, indent=2))
        return
    print(f"{arguments.model}: {os.path.getsize(arguments.model):,} bytes")
    print(flow)
    if flow.column_names is not None:
        print(f"columns: {', '.join(map(_quoted, flow.column_names))}")
    names = [f"column {i + 1}" for i in range(flow.spec.input_size)]
    if within := bounds_in_words(flow.spec, [*map(_quoted, flow.column_names or names)]):
        print(f"bounds: {within}")
    if flow.context_names is not None:
        print(f"context: {', '.join(map(_quoted, flow.context_names))}")
    if flow.threshold is not None:
        limit, share = flow.threshold
        print(f"threshold: log p below {limit:.6g} nats" + ("" if share is None else f", quantile {share:g}"))
    if flow.import_report is not None:
        print(f"imported: from {visible(flow.import_report.source)}, {flow.import_report.verdict}")
    width = max(map(len, tensors))
    for name, shape in tensors.items():
        print(f"  {name:<{width}}  {flow.spec.dtype} {shape}")


def _run_report(arguments: argparse.Namespace) -> None:
    from nvpflow import report

    sources = {"MODEL": arguments.model, "DATA": arguments.data, "--train": arguments.train}
    _output.check_distinct(arguments.output, sources | {"--history": arguments.history})
    if arguments.output != "-":
        _output.check_target(arguments.output, force=arguments.force)
    flow = nvpflow.load(arguments.model, device=arguments.device, precision=arguments.precision)
    flow.num_threads = arguments.threads
    columns = flow.spec.input_size
    history = None if arguments.history is None else _read_history(arguments.history)
    read = partial(_read, arguments, dtype=flow.spec.dtype, wide=flow.spec._takes_float64_rows)
    data = read(arguments.data, model=_model_columns(arguments, flow), in_place=True)
    names: Sequence[str] | None = data.names or flow.column_names
    if arguments.names is not None:
        names = arguments.names
        if len(arguments.names) != columns:
            raise data_io.DataError(
                f"--names has {len(arguments.names)} names, expected {columns}: one for each column"
            )
    details = {"Model file": _identified(arguments.model), "Data file": _shown(arguments.data)}
    train = None
    if arguments.train is not None:
        found = read(arguments.train, model=_model_columns(arguments, flow))
        train = found.rows if found.context is None else (found.rows, found.context)
        details["Training file"] = _shown(arguments.train)
    files = (_shown(os.path.basename(path)) for path in (arguments.model, arguments.data))
    page = report.html(
        flow,
        data.rows,
        context=data.context,
        train=train,
        history=history,
        names=names,
        context_names=data.context_names or flow.context_names,
        title=arguments.title or " on ".join(files),
        details=details,
    )
    _output.write_text(arguments.output, page, force=arguments.force)
    if arguments.output != "-":
        print(f"{len(data.rows):,} rows; page written to {arguments.output}")


def _shown(path: str) -> str:
    """Return a path as text: bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _identified(path: str) -> str:
    with open(path, "rb") as file:
        return f"{_shown(path)}, SHA-256 {hashlib.sha256(file.read()).hexdigest()[:16]}…"


def _run_export(arguments: argparse.Namespace) -> None:
    if not arguments.output.endswith(".onnx"):
        raise data_io.DataError(f"-o: {arguments.output} does not end in .onnx, expected the name of an ONNX file")
    _output.check_distinct(arguments.output, {"MODEL": arguments.model})
    _output.check_target(arguments.output, force=arguments.force)
    flow = nvpflow.load(arguments.model)
    if arguments.dtype is not None:
        flow = flow.astype(arguments.dtype)
    difference = nvpflow.exporters.to_onnx(flow, arguments.output, arguments.method)
    print(f"{arguments.method} written to {arguments.output}; onnxruntime differs from the flow by {difference:.1e}")


def _run_import(arguments: argparse.Namespace) -> None:
    if arguments.output == "-":
        raise data_io.DataError("-o: a model is a file, it cannot go to stdout")
    _output.check_distinct(arguments.output, {"STATE": arguments.model})
    _output.check_target(arguments.output, force=arguments.force)
    names = ("library", "activation", "slope", "tail_bound", "prefix", "dtype")
    options = {name: getattr(arguments, name) for name in names}
    flow = nvpflow.importers.from_state_dict(_read_state_dict(arguments.model), **options)
    flow.save(arguments.output)
    if arguments.json:
        print(flow._import_report())
        return
    print(flow.import_report)
    print(f"model written to {arguments.output}")


def _read_state_dict(path: str) -> dict[str, Any]:
    """Return the tensors of a file of PyTorch, without running anything that is in it."""
    try:
        import torch
    except ImportError:
        raise ImportError(f'{_shown(path)}: PyTorch reads such files; pip install "torch>=2.4"') from None
    way = "expected a state dict: torch.save(model.state_dict(), FILE)"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how the file was pickled
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of the many that damaged files give
        raise data_io.DataError(f"{_shown(path)}: not read as tensors only ({type(error).__name__}), {way}") from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):  # a checkpoint of Lightning
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in found.items()
    ):
        keys = f" of {', '.join(map(str, list(found)[:5]))}" if isinstance(found, dict) else ""
        raise data_io.DataError(f"{_shown(path)}: a {type(found).__name__}{keys}, {way}")
    return found


def _run_demo(arguments: argparse.Namespace) -> None:
    from nvpflow import demo

    demo.run(
        arguments.output,
        force=arguments.force,
        epochs=arguments.epochs,
        threads=arguments.threads,
        device=arguments.device,
    )
