"""Saving while the system fails: whatever happens, the old file is there whole, or the new one is."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nvpflow
import pytest

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloads a library, as Linux does it"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler on PATH"),
    pytest.mark.skipif(bool(os.environ.get("NVPFLOW_SANITIZED")), reason="a sanitizer's own library is preloaded"),
]

NOBODY = 65534

# `attempt(n, action, error)` saves in a process of its own, in which the n-th call goes wrong, and says how it ended.
DRIVER = """
import ctypes, errno, os, signal, sys, warnings
from pathlib import Path
import numpy as np
import nvpflow
NOTHING, KILL_BEFORE, KILL_AFTER, FAIL, SHORT, KILL_HALFWAY, CHANGE, STALL = range(8)
faults = ctypes.CDLL(None)
faults.faults_names.restype = ctypes.c_char_p
faults.faults_disarm.restype = ctypes.c_long
folder = Path(sys.argv[1])
path = folder / "flow.safetensors"
old = nvpflow.build(4, 2, (8,), seed=1)
new = nvpflow.build(4, 2, (8,), seed=2)

class Saves:
    "A model's save, through a symbolic link."
    link = folder.with_name(folder.name + "-link")
    def prepare(self):
        self.link.unlink(missing_ok=True)
        self.link.symlink_to(path)
        old.save(self.link)
    def run(self):
        new.save(self.link)

class Checkpoints:
    "A checkpoint in the middle of a run; the faults begin with the second epoch."
    rows = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    def fit(self, flow, epochs, callback=None):
        warnings.simplefilter("ignore", nvpflow.DataWarning)  # of few rows
        flow.fit(self.rows, epochs=epochs, batch_size=32, schedule="constant", progress=False, callback=callback,
                 checkpoint=path, num_threads=1)
    def prepare(self):
        path.unlink(missing_ok=True)
        self.fit(nvpflow.build(4, 2, (8,), seed=1), 1)
    def run(self):
        self.fit(nvpflow.build(4, 2, (8,), seed=1), 2)

class Loads:
    "A model's load, which writes nothing."
    def prepare(self):
        new.save(path)
    def run(self):
        if nvpflow.load(path) != new:
            os._exit(1)

work = {"save": Saves, "checkpoint": Checkpoints, "load": Loads}[sys.argv[2]]()

def attempt(n, action, error=0):
    "The calls seen, their names and the error's number; or None where the process was killed."
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        number = 0
        faults.faults_arm(ctypes.c_long(n), action, error)
        try:
            work.run()
        except OSError as raised:
            number = raised.errno
        except nvpflow.FileFormatError as raised:
            number = -1 if "changed" in str(raised) else -2 if "became shorter" in str(raised) else -3
        calls, names = faults.faults_disarm(), faults.faults_names()
        os.write(writer, f"{calls}|{names.decode()}|{number}".encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return None
    assert status == 0 and text, (status, text)
    calls, names, number = text.split("|")
    return int(calls), names.split(), int(number)

def litter():
    return sorted(entry.name for entry in folder.iterdir() if entry != path)

work.prepare()
before = path.read_bytes()
calls, names, number = attempt(0, NOTHING)
assert number == 0 and not litter()
after = path.read_bytes()
if sys.argv[2] == "save":
    assert after != before

def state():
    "Which of the two files is there; whole, or this raises."
    content = path.read_bytes()
    if content == before:
        return "old"
    if sys.argv[2] == "save":
        assert content == after, "neither the old file nor the new one"
        return "new"
    # A checkpoint holds the time that an epoch took: whole is what training goes on from.
    work.fit(nvpflow.build(4, 2, (8,), seed=1), 2)
    return "new"

def restore():
    path.write_bytes(before)
    for name in litter():
        (folder / name).unlink()
"""


@pytest.fixture(scope="session")
def faulty(tmp_path_factory, run_python):
    """Runs a script after the driver, with the library of faults preloaded."""
    folder = tmp_path_factory.mktemp("faults")
    library = folder / "faults.so"
    source = Path(__file__).parent / "preloaded" / "faults.c"
    subprocess.run(["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)

    def run(script: str, where: Path, work: str) -> str:
        return run_python(DRIVER + script, where, work, env={"LD_PRELOAD": str(library)})

    return run


WORKS = pytest.mark.parametrize("work", ["save", "checkpoint"])


@WORKS
def test_killed_at_any_call_the_old_file_or_the_new_one_is_whole(faulty, tmp_path, work) -> None:
    seen = faulty(
        """
seen = []
for action in (KILL_BEFORE, KILL_HALFWAY, KILL_AFTER):
    for n in range(1, calls + 1):
        if action == KILL_HALFWAY and names[n - 1] != "write":
            continue
        restore()
        assert attempt(n, action) is None, (n, action, "was not reached")
        seen.append(state())
        assert all(name.startswith(".nvpflow-") and name.endswith(".tmp") for name in litter()), litter()
renamed = names.index("rename")
assert seen[0] == "old" and seen[-1] == "new"
assert set(seen[:renamed + 1]) == {"old"} and set(seen[renamed + 1:calls]) == {"new"}, seen
print(calls, *names)
""",
        tmp_path,
        work,
    )
    names = seen.split()[1:]
    assert names.count("readlink") == (work == "save")
    assert "unlink" not in names
    assert names.count("write") >= 2
    # What a power failure could tell apart, and a kill cannot: the data are on the disk before they get the name, the
    # name before the call returns.
    syncs = [i for i, name in enumerate(names) if name == "fsync"]
    last_write = max(i for i, name in enumerate(names) if name == "write")
    assert len(syncs) == 2
    assert last_write < syncs[0] < names.index("rename") < syncs[1]


@WORKS
def test_an_error_at_any_call_keeps_the_old_file_and_leaves_no_litter(faulty, tmp_path, work) -> None:
    output = faulty(
        """
written = max(n for n, name in enumerate(names[: names.index("rename")], 1) if name == "close")
for error in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS):
    for n in range(1, calls + 1):
        restore()
        _, came, number = attempt(n, FAIL, error)
        found, name = state(), names[n - 1]
        assert not litter(), (name, n, litter())
        if number == 0:  # a file that was read, or the folder that was synced, is of no use any more
            assert found == "new" and name == "close" and n != written, (name, n)
        else:
            assert number == error, (name, n, number)
            assert found == ("old" if n <= names.index("rename") + 1 else "new"), (name, n)
print("done")
""",
        tmp_path,
        work,
    )
    assert output == "done\n"


@WORKS
def test_signals_and_short_writes_are_no_errors(faulty, tmp_path, work) -> None:
    output = faulty(
        """
for n, name in enumerate(names, 1):
    restore()
    if name in ("open", "open64", "write", "fsync", "close"):
        _, _, number = attempt(n, FAIL, errno.EINTR)
        assert (number, state(), litter()) == (0, "new", []), (name, n, number)
    if name == "write":
        restore()
        more, _, number = attempt(n, SHORT)
        assert more == calls + 1, (n, more)
        assert (state(), litter()) == ("new", []), (name, n)
        restore()
        assert attempt(n, STALL)[2] == errno.EIO, n
        assert (state(), litter()) == ("old", []), (name, n)
# Folders that cannot be read or synced are no reason to fail, once the file is written.
sync = max(n for n, name in enumerate(names, 1) if name == "fsync")
for n, error in ((sync - 1, errno.EACCES), (sync - 1, errno.EPERM), (sync, errno.EINVAL), (sync, errno.ENOTSUP)):
    assert names[n - 1] in ("open", "open64", "fsync"), names
    restore()
    assert (attempt(n, FAIL, error)[2], state(), litter()) == (0, "new", []), (n, error)
print("done")
""",
        tmp_path,
        work,
    )
    assert output == "done\n"


def test_a_load_fails_whole_or_not_at_all(faulty, tmp_path) -> None:
    output = faulty(
        """
print(*names)
for n, name in enumerate(names, 1):
    failed = {"close": 0}.get(name, errno.EIO)
    assert attempt(n, FAIL, errno.EIO)[2] == failed, (n, name)
    if name in ("open", "pread", "close"):
        assert attempt(n, FAIL, errno.EINTR)[2] == 0, (n, name)
    if name == "pread":
        assert attempt(n, SHORT)[::2] == (calls + 1, 0), n
""",
        tmp_path,
        "load",
    )
    first, second, *middle, third, last = output.split()
    assert [first, second, third, last] == ["open", "fstat", "fstat", "close"]
    assert len(middle) > 2
    assert set(middle) == {"pread"}


@pytest.mark.parametrize("work", ["load", "checkpoint"])
def test_a_file_that_changes_while_it_is_read_is_refused(faulty, tmp_path, work) -> None:
    output = faulty(
        """
LONGER, EMPTY, A_SECOND_LATER, A_NANOSECOND_LATER = range(1, 5)
for n, name in enumerate(names, 1):
    if name == "pread":
        for how, number in (LONGER, -1), (A_SECOND_LATER, -1), (A_NANOSECOND_LATER, -1), (EMPTY, -2):
            restore()
            assert attempt(n, CHANGE, how)[2] == number, (n, how)
            assert not litter()
print(names.count("pread"))
""",
        tmp_path,
        work,
    )
    assert int(output) > 2


def as_nobody(action) -> str:
    """Run `action` in a child without root's rights; what it returns, or the error's name."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        text = "died"
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            text = str(action())
        except OSError as error:
            text = errno.errorcode[error.errno]
        finally:
            os.write(writer, text.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(child, 0)
    return text


@pytest.fixture
def open_folder(tmp_path_factory):
    """A folder that another user can reach."""
    folder = tmp_path_factory.mktemp("open")
    for parent in (folder, folder.parent, folder.parent.parent):
        parent.chmod(parent.stat().st_mode | 0o055)
    folder.chmod(0o777)
    return folder


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # of JAX, where another test has imported it
def test_a_folder_that_may_not_be_written_to(open_folder) -> None:
    old, new = nvpflow.build(4, seed=1), nvpflow.build(4, seed=2)
    path = open_folder / "flow.safetensors"
    old.save(path)
    path.chmod(0o666)
    open_folder.chmod(0o555)
    try:
        # The file alone could be written to. Saving in place could tear it, so it is refused.
        assert as_nobody(lambda: new.save(path)) == "EACCES"
        assert as_nobody(lambda: new.save(open_folder / "another.safetensors")) == "EACCES"
        assert nvpflow.load(path) == old
        assert [entry.name for entry in open_folder.iterdir()] == [path.name]
    finally:
        open_folder.chmod(0o777)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # of JAX, where another test has imported it
def test_a_file_that_may_not_be_written_to_is_not_replaced(open_folder) -> None:
    old, new = nvpflow.build(4, seed=1), nvpflow.build(4, seed=2)
    path = open_folder / "flow.safetensors"
    old.save(path)
    path.chmod(0o444)
    assert as_nobody(lambda: new.save(path)) == "EACCES"
    assert nvpflow.load(path) == old
    assert [entry.name for entry in open_folder.iterdir()] == [path.name]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # of JAX, where another test has imported it
def test_a_folder_that_may_be_written_to_and_not_read(open_folder) -> None:
    flow = nvpflow.build(4, seed=1)
    path = open_folder / "flow.safetensors"
    open_folder.chmod(0o333)
    try:
        assert as_nobody(lambda: flow.save(path)) == "None"
    finally:
        open_folder.chmod(0o777)
    assert nvpflow.load(path) == flow


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_links_stay_and_what_they_point_at_is_replaced(tmp_path, relative) -> None:
    first, second = nvpflow.build(4, seed=1), nvpflow.build(4, seed=2)
    (tmp_path / "models").mkdir()
    target, link, chain = tmp_path / "models" / "flow", tmp_path / "current", tmp_path / "chain"
    link.symlink_to(Path("models") / "flow" if relative else target)
    chain.symlink_to(link.name if relative else link)
    first.save(link)  # which dangled
    assert nvpflow.load(target) == first
    second.save(chain)
    assert link.is_symlink()
    assert chain.is_symlink()
    assert nvpflow.load(target) == second
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["chain", "current", "models"]
    assert [entry.name for entry in (tmp_path / "models").iterdir()] == ["flow"]
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="loop") as raised:
        first.save(loop)
    assert raised.value.errno == errno.ELOOP


def test_a_hard_link_keeps_the_old_model(tmp_path) -> None:
    first, second = nvpflow.build(4, seed=1), nvpflow.build(4, seed=2)
    path, other = tmp_path / "flow", tmp_path / "other"
    first.save(path)
    other.hardlink_to(path)
    second.save(path)
    assert nvpflow.load(path) == second
    assert nvpflow.load(other) == first


def test_savers_at_once_leave_one_of_their_files_and_readers_see_whole_ones(run_python, tmp_path) -> None:
    script = """
import sys, time
import nvpflow
path, seed, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
flow = nvpflow.build(16, 4, (64,), seed=seed)
end = time.monotonic() + seconds
count = 0
while time.monotonic() < end:
    flow.save(path)
    count += 1
print(count)
"""
    path = tmp_path / "flow.safetensors"
    flows = {seed: nvpflow.build(16, 4, (64,), seed=seed) for seed in (1, 2, 3)}
    contents = {}
    for seed, flow in flows.items():
        flow.save(path)
        contents[path.read_bytes()] = seed
    savers = [
        subprocess.Popen([sys.executable, "-c", script, str(path), str(seed), "1.5"], stdout=subprocess.PIPE)
        for seed in flows
    ]
    seen = set()
    while any(saver.poll() is None for saver in savers):
        seen.add(contents[path.read_bytes()])
        assert nvpflow.load(path) in flows.values()
        time.sleep(0.001)
    counts = [int(saver.communicate()[0]) for saver in savers]
    assert all(saver.returncode == 0 for saver in savers)
    assert min(counts) > 0
    assert len(seen) > 1, "the savers were not at work at the same time"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
