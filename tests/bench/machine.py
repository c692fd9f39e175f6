"""The machine a benchmark ran on: what it is, and what it can do at most."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np

ISAS = ("avx512", "avx2", "baseline", "neon")
PAGE = 4096


class ProbeUnavailableError(RuntimeError):
    """There is no C compiler to build the probe with; the message says what to do."""


class Probe:
    """probe.c, compiled on the spot. ctypes releases the GIL, so that threads measure side by side."""

    def __init__(self) -> None:
        compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise ProbeUnavailableError(
                "the machine's limits are not measured: it takes a C compiler; install gcc or clang, or name one in CC"
            )
        source = Path(__file__).with_name("probe.c")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "probe.so"
            flags = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-shared", "-fPIC"]
            done = subprocess.run(
                [compiler, *flags, str(source), "-o", str(library)], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise ProbeUnavailableError(f"the machine's limits are not measured: {compiler} says\n{done.stderr}")
            self._library = ctypes.CDLL(str(library))  # stays mapped when the folder goes
        self.isas = tuple(isa for isa in ISAS if self._library.supported(isa.encode()))

    def fma_peak(self, isa: str, threads: int = 1, windows: int = 60) -> float:
        """FLOP/s of independent multiply-adds in registers; the best of many windows of about a millisecond.

        Another process can only take time away, so the best window is the machine's.
        """
        function = self._library[f"fma_{isa}"]
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_long]
        with ThreadPoolExecutor(threads) as pool:
            rates = pool.map(lambda _: max(function(100_000) for _ in range(windows)), range(threads))
            return sum(rates)

    def reader(self, size: int):
        """A function of a number of passes that reads the same `size` bytes and returns the seconds of one pass."""
        function = self._library[f"read_{self.isas[0]}"]
        function.restype = ctypes.c_double
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
        size = max(size, 1024)
        memory = np.ones(size + PAGE, np.uint8)
        aligned = -(-memory.ctypes.data // PAGE) * PAGE

        def read(passes: int, _owner: np.ndarray = memory) -> float:
            return function(aligned, size, passes)

        return read

    def read_bandwidth(self, size: int, windows: int = 30) -> float:
        """Bytes per second of reading `size` bytes again and again on one core; the best of many windows."""
        read = self.reader(size)
        passes = max(1, (4 << 20) // size)
        return size / min(read(passes) for _ in range(windows))


def caches() -> dict[str, int]:
    """Bytes of each level's data cache as one core sees it; empty where the system does not say."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = int(size.removesuffix("K")) * 1024
    return found


def read_sizes() -> dict[str, int]:
    """How much to read to see each level: well inside it and well outside the one before."""
    found = {"L1": 32 << 10, "L2": 1 << 20, "L3": 16 << 20, **caches()}
    return {
        "L1": found["L1"] // 2,
        "L2": found["L2"] // 2,
        "L3": max(4 * found["L2"], min(found["L3"] // 4, 32 << 20)),
        "DRAM": min(max(4 * found["L3"], 256 << 20), 1 << 30),
    }


def limits(probe: Probe, threads: int) -> dict:
    """FLOP/s per instruction set, of all threads together, and bytes/s per level of memory, of one core."""
    return {
        "fma": {isa: probe.fma_peak(isa, threads) for isa in probe.isas},
        "read": {
            level: {"bytes": size, "rate": probe.read_bandwidth(size, windows=30 if size < 64 << 20 else 3)}
            for level, size in read_sizes().items()
        },
    }


def _lscpu() -> dict[str, str]:
    if shutil.which("lscpu") is None:
        return {}
    text = subprocess.run(["lscpu", "-J"], capture_output=True, text=True, check=False).stdout
    entries = json.loads(text)["lscpu"] if text else []
    flat = {}
    while entries:  # newer versions nest them
        entry = entries.pop()
        flat[entry["field"].rstrip(":")] = entry.get("data") or ""
        entries.extend(entry.get("children", []))
    return flat


def describe() -> dict:
    """Processor, caches, governor where it can be read, operating system."""
    lscpu = _lscpu()
    family = f"family {lscpu['CPU family']}, model {lscpu['Model']}" if "CPU family" in lscpu else ""
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": lscpu.get("Model name") or platform.processor() or platform.machine(),
        "family": family,
        "virtual": lscpu.get("Hypervisor vendor", ""),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],  # above zero before the benchmark has begun: others are at work
        "caches": caches(),
        "governor": governor.read_text().strip() if governor.exists() else "not readable",
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
    }


def versions(packages: list[str]) -> dict[str, str]:
    """Of Python and of those of `packages` that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
