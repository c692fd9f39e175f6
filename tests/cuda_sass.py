"""Count the machine instructions of the CUDA kernels: python tests/cuda_sass.py [FILE...] [--check | --update]

Takes cubins, objects or libraries with code for sm_90, disassembles the kernels and prints, for each kernel and each of
its loops that holds products, the instructions by class that stand in it: those of the loop itself, without the loops
inside it. Loops are the natural ones of the control flow. An instruction counts once, whatever its predicate says,
since it takes an issue slot all the same; so does NOP. Without files it compiles cuda/transform.cu and
cuda/gradient.cu, which takes minutes. No GPU is needed.

--check compares with tests/cuda_sass.json and fails where a loop, the registers or the local memory have grown by 5 %,
or where loops have come or gone; what has shrunk is told, so that the table follows. --update writes the table. With
other tools than the table's the comparison is shown and does not fail. Where there is no nvdisasm (and, for objects
and libraries, no cuobjdump), it says so and does nothing: `pip install nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "tests/cuda_sass.json"
GROWTH = 0.05
# The kernels of plain coupling layers: what the benchmark's flows A to E run.
MEASURED = r"plain|gradient_tiles<.*general|weight_gradient"
ARCHITECTURE = 90
REGISTERS, WARPS = 65536, 64  # of a multiprocessor of sm_90
REGISTER_UNIT = 256  # registers are given to warps in multiples of that

# The classes, in the order of the table, and the instructions that each holds.
CLASSES = {
    "tensor": "HMMA IMMA DMMA HGMMA QGMMA BGMMA",
    "fma": "FFMA DFMA HFMA2",
    "float": "FADD FMUL FMNMX FSETP FSEL FSET FCHK DADD DMUL DSETP HADD2 HMUL2",
    "mufu": "MUFU",
    "convert": "F2F F2FP F2I I2F I2FP F2IP FRND",
    "shared": "LDS STS LDSM ATOMS",
    "global": "LDG STG LD ST LDGSTS ATOM ATOMG RED",
    "local": "LDL STL",
    "shuffle": "SHFL VOTE MATCH REDUX VOTEU",
    "move": "MOV CS2R S2R LDC ULDC R2UR UMOV S2UR",
    "nop": "NOP",
    "control": "BRA BRX BSSY BSYNC BREAK CALL RET EXIT WARPSYNC BAR LDGDEPBAR DEPBAR YIELD ERRBAR MEMBAR NANOSLEEP",
}  # all others: integer
CLASS_OF = {name: key for key, names in CLASSES.items() for name in names.split()}
COLUMNS = [*CLASSES, "integer"]


class Unreadable(Exception):
    """What a file or a tool lacks."""


# ---- cubins --------------------------------------------------------------------------------------------------------


@dataclass
class Loop:
    depth: int
    counts: Counter[str]

    @property
    def total(self) -> int:
        return self.counts.total()

    def has_products(self, on_matrix_units: bool) -> bool:
        return self.counts["tensor"] > 0 if on_matrix_units else 2 * self.counts["fma"] > self.total

    def as_json(self) -> dict[str, int]:
        return {"total": self.total, **{key: self.counts[key] for key in COLUMNS if self.counts[key]}}


@dataclass
class Kernel:
    name: str
    symbol: int
    section: str
    registers: int = 0
    frame: int = 0  # bytes of local memory
    threads: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    loops: list[Loop] = field(default_factory=list)

    @property
    def warps(self) -> int:
        """Warps of a multiprocessor that the registers allow."""
        of_warp = -(-self.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        of_block = -(-self.threads // 32)
        return min(REGISTERS // of_warp // of_block * of_block, WARPS) if of_block else 0

    def as_json(self) -> dict[str, object]:
        return {
            "registers": self.registers,
            "frame": self.frame,
            "local": self.counts["local"],
            "total": self.counts.total(),
            "loops": [loop.as_json() for loop in self.loops],
        }


def short_name(mangled: str) -> str:
    """Return the name as one writes it in the source, without namespaces: the names of their files carry hashes."""
    enums = {
        "Multiply": ("fma", "tf32x3", "tf32", "bf16"),
        "Storage": ("resident", "streamed", "workspace"),
        "Reach": ("plain", "general", "all"),
    }
    found = re.search(r"_cu_[0-9a-f]{8}(?:_\d+?)?(\d{1,2})([a-z]\w+)$", mangled)
    if found is None:
        return mangled
    name, rest = found[2][: int(found[1])], found[2][int(found[1]) :].split("EEv")[0]
    if not rest.startswith("I"):
        return name
    arguments = ["float" if rest[1] == "f" else "double"] if rest[1] in "fd" else []
    arguments += [enums[kind][int(value)] for kind, value in re.findall(r"\d(Multiply|Storage|Reach)E(\d)", rest)]
    arguments += ["true" if value == "1" else "false" for value in re.findall(r"Lb(\d)", rest)]
    return f"{name}<{', '.join(arguments)}>"


class Cubin:
    """The parts of an ELF file with code for a GPU that tell of its kernels."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        if self.data[:4] != b"\x7fELF":
            raise Unreadable(f"{path} is no cubin: it begins with {self.data[:4]!r}, expected an ELF file")
        (offset,) = struct.unpack_from("<Q", self.data, 0x28)
        size, count, names = struct.unpack_from("<HHH", self.data, 0x3A)
        headers = [struct.unpack_from("<IIQQQQIIQQ", self.data, offset + i * size) for i in range(count)]
        self.sections: dict[str, bytes] = {}
        order = []
        for header in headers:
            name = self.text(headers[names][4] + header[0])
            order.append(name)
            if header[1] != 8:  # NOBITS
                self.sections[name] = self.data[header[4] : header[4] + header[5]]
        self.kernels = list(self.find_kernels(order))
        self.note_resources()

    def text(self, at: int) -> str:
        return self.data[at : self.data.index(b"\0", at)].decode()

    def find_kernels(self, order: list[str]) -> Iterator[Kernel]:
        symbols, names = self.sections.get(".symtab", b""), self.sections.get(".strtab", b"")
        for index in range(len(symbols) // 24):
            name, info, other, section = struct.unpack_from("<IBBH", symbols, 24 * index)
            if info & 15 == 2 and other & 0x10:  # a function, and an entry
                mangled = names[name : names.index(b"\0", name)].decode()
                yield Kernel(short_name(mangled), index, order[section])

    def records(self, section: str) -> Iterator[tuple[int, bytes]]:
        data, at = self.sections.get(section, b""), 0
        while at + 4 <= len(data):
            form, attribute, size = struct.unpack_from("<BBH", data, at)
            at += 4
            if form == 4:
                yield attribute, data[at : at + size]
                at += size

    def note_resources(self) -> None:
        by_symbol = {kernel.symbol: kernel for kernel in self.kernels}
        for attribute, data in self.records(".nv.info"):
            if attribute in (0x2F, 0x11):
                symbol, value = struct.unpack_from("<II", data)
                if symbol in by_symbol:
                    setattr(by_symbol[symbol], "registers" if attribute == 0x2F else "frame", value)
        for kernel in self.kernels:
            for attribute, data in self.records(kernel.section.replace(".text.", ".nv.info.")):
                if attribute == 0x05:
                    kernel.threads = struct.unpack_from("<I", data)[0]

    @property
    def compiler(self) -> str:
        found = re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", self.data)
        return found[1].decode() if found else "unknown"


def tool(name: str) -> str:
    """Return the path of a tool of the toolkit, which may be a Python package's."""
    folders = [Path(p) / "nvidia" for p in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}]
    packaged = [str(found) for folder in folders for found in folder.glob(f"cu*/bin/{name}")]
    found = shutil.which(name) or next(iter(packaged), None) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None:
        raise Unreadable(f"{name} not found: put CUDA's on PATH, or pip install nvidia-cuda-{name}")
    return found


def output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unreadable(f"{Path(command[0]).name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def cubins_of(path: Path, folder: Path) -> list[Path]:
    if path.suffix == ".cubin":
        return [path]
    into = folder / f"{len(list(folder.iterdir()))}"
    into.mkdir()
    done = subprocess.run(
        [tool("cuobjdump"), "-xelf", "all", str(path.resolve())], cwd=into, capture_output=True, text=True, check=False
    )
    found = sorted(into.glob(f"*sm_{ARCHITECTURE}*.cubin"))
    if not found:
        raise Unreadable(f"{path} holds no code for sm_{ARCHITECTURE} {done.stderr.strip()}".rstrip())
    return found


def compiled(folder: Path) -> list[Path]:
    """Return cubins of the sources, compiled as cuda/CMakeLists.txt does."""
    nvcc = tool("nvcc")
    found = []
    for source in ("transform", "gradient"):
        found.append(folder / f"{source}.cubin")
        command = [nvcc, "-std=c++20", f"-arch=sm_{ARCHITECTURE}", "-O3", "-fmad=false", "-cubin"]
        command += ["-I", str(ROOT / "cpp/include"), "-o", str(found[-1]), str(ROOT / f"cuda/{source}.cu")]
        print(f"compiling cuda/{source}.cu", file=sys.stderr, flush=True)
        output(command)
    return found


# ---- control flow --------------------------------------------------------------------------------------------------

LABEL = re.compile(r"^(\.L_[\w.]+|\$?[\w$.]+):$")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{ *)?(@!?U?P\w+ )?\s*([A-Z][A-Z0-9_]*)([.\w]*)\s*(.*?) ?;")
TARGET = re.compile(r"`\((\.L_[\w.]+)\)")


def class_of(opcode: str, modifiers: str) -> str:
    if opcode == "IMAD" and modifiers.startswith(".MOV"):
        return "move"
    return CLASS_OF.get(opcode, "integer")


@dataclass
class Block:
    counts: Counter[str] = field(default_factory=Counter)
    targets: list[str] = field(default_factory=list)
    falls_through: bool = True


class Graph:
    """The basic blocks of a kernel."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.blocks = [Block()]
        self.labels: dict[str, int] = {}
        regions: dict[str, str] = {}
        for line in lines:
            if label := LABEL.match(line):
                if self.blocks[-1].counts:
                    self.blocks.append(Block())
                self.labels[label[1]] = len(self.blocks) - 1
            elif found := INSTRUCTION.match(line):
                self.add(found, regions)
        self.next_of = [self.successors(i) for i in range(len(self.blocks))]

    def add(self, found: re.Match[str], regions: dict[str, str]) -> None:
        predicate, opcode, modifiers, operands = found.groups()
        block = self.blocks[-1]
        block.counts[class_of(opcode, modifiers)] += 1
        targets = TARGET.findall(operands)
        if opcode == "BSSY":
            regions[operands.split(",")[0]] = targets[0]
        elif opcode == "BSYNC":
            block.targets, block.falls_through = [regions[operands.strip()]], predicate is not None
            self.blocks.append(Block())
        elif opcode in ("BRA", "BRX", "EXIT", "RET"):
            conditional = predicate is not None or "DIV" in modifiers or (opcode == "BRA" and "," in operands)
            block.targets = targets if opcode == "BRA" else re.findall(r"\.L_[\w.]+", operands)
            block.falls_through = conditional
            self.blocks.append(Block())

    def successors(self, i: int) -> list[int]:
        block = self.blocks[i]
        found = [self.labels[target] for target in block.targets if target in self.labels]
        if block.falls_through and i + 1 < len(self.blocks):
            found.append(i + 1)
        return found

    def dominators(self) -> dict[int, int]:
        """Return the immediate dominator of each block that is reached (Cooper, Harvey and Kennedy 2001)."""
        order: list[int] = []
        seen = {0}
        stack = [(0, iter(self.next_of[0]))]
        while stack:
            for to in stack[-1][1]:
                if to not in seen:
                    seen.add(to)
                    stack.append((to, iter(self.next_of[to])))
                    break
            else:
                order.append(stack.pop()[0])
        place = {block: i for i, block in enumerate(order)}
        before: dict[int, list[int]] = {}
        for block in order:
            for to in self.next_of[block]:
                before.setdefault(to, []).append(block)
        above = {0: 0}
        changed = True
        while changed:
            changed = False
            for block in reversed(order[:-1]):
                new = -1
                for other in before[block]:
                    if other not in above:
                        continue
                    new = other if new < 0 else self.meet(new, other, above, place)
                changed |= above.get(block) != new
                above[block] = new
        return above

    @staticmethod
    def meet(a: int, b: int, above: dict[int, int], place: dict[int, int]) -> int:
        while a != b:
            while place[a] < place[b]:
                a = above[a]
            while place[b] < place[a]:
                b = above[b]
        return a

    def bodies(self) -> dict[int, set[int]]:
        """Return the blocks of each natural loop, by its head."""
        above = self.dominators()
        before: dict[int, list[int]] = {}
        for block in above:
            for to in self.next_of[block]:
                before.setdefault(to, []).append(block)

        def dominates(a: int, b: int) -> bool:
            while b > 0 and b != a:
                b = above[b]
            return a == b

        found: dict[int, set[int]] = {}
        for block in above:
            for head in self.next_of[block]:
                if not dominates(head, block):
                    continue
                body = found.setdefault(head, {head})
                todo = [block]
                while todo:
                    at = todo.pop()
                    if at not in body:
                        body.add(at)
                        todo.extend(before[at])
        return found

    def loops(self) -> list[Loop]:
        """Return the loops in the order of their heads, with what stands in them and in no loop inside them."""
        bodies = self.bodies()
        heads = sorted(bodies)
        found = []
        for head in heads:
            inside = [bodies[other] for other in heads if other != head and bodies[other] < bodies[head]]
            own = bodies[head].difference(*inside)
            depth = sum(bodies[head] < bodies[other] for other in heads)
            found.append(Loop(depth, sum((self.blocks[i].counts for i in own), Counter())))
        return found


def count(cubin: Cubin, kernels: list[Kernel]) -> None:
    """Disassemble the kernels and fill in what stands in them."""
    if not kernels:
        return
    wanted = ",".join(str(kernel.symbol) for kernel in kernels)
    text = output([tool("nvdisasm"), "-c", "-fun", wanted, str(cubin.path)])
    parts = re.split(r"^\t\.section\t([^,\n]+),.*\n", text, flags=re.MULTILINE)
    of_section = dict(zip(parts[1::2], parts[2::2], strict=True))
    for kernel in kernels:
        graph = Graph(of_section[kernel.section].splitlines())
        kernel.counts = sum((block.counts for block in graph.blocks), Counter())
        kernel.loops = [loop for loop in graph.loops() if loop.has_products(kernel.counts["tensor"] > 0)]


# ---- the table -----------------------------------------------------------------------------------------------------


def show(kernels: list[Kernel]) -> None:
    print(f"{'':26}{'total':>7}" + "".join(f"{key:>8}" for key in COLUMNS))
    for kernel in kernels:
        print(
            f"{kernel.name}: {kernel.registers} registers, {kernel.frame} bytes of local memory, "
            f"{kernel.threads} threads, {kernel.warps} warps a multiprocessor ({100 * kernel.warps // WARPS} %)"
        )
        rows = [("all of it", kernel.counts)]
        rows += [(f"loop {i}, {loop.depth} deep", loop.counts) for i, loop in enumerate(kernel.loops)]
        for name, counts in rows:
            print(f"  {name:24}{counts.total():7}" + "".join(f"{counts[key] or '':>8}" for key in COLUMNS))


def differences(kernels: list[Kernel], stored: dict[str, dict[str, object]]) -> tuple[list[str], list[str]]:
    """Return what has grown, and what has shrunk, by more than GROWTH."""
    worse: list[str] = []
    better: list[str] = []

    def compare(what: str, now: int, before: int) -> None:
        if now > before * (1 + GROWTH):
            worse.append(f"{what}: {now}, the table has {before}")
        elif now < before * (1 - GROWTH):
            better.append(f"{what}: {now}, the table has {before}")

    for kernel in kernels:
        if kernel.name not in stored:
            worse.append(f"{kernel.name}: not in the table")
            continue
        now, before = kernel.as_json(), stored[kernel.name]
        for key, name in (("registers", "registers"), ("frame", "bytes of local memory"), ("local", "local accesses")):
            compare(f"{kernel.name}, {name}", int(str(now[key])), int(str(before[key])))
        loops = before["loops"]
        assert isinstance(loops, list)
        if len(loops) != len(kernel.loops):
            worse.append(f"{kernel.name}: {len(kernel.loops)} loops with products, the table has {len(loops)}")
            continue
        for i, (loop, old) in enumerate(zip(kernel.loops, loops, strict=True)):
            compare(f"{kernel.name}, instructions of loop {i}", loop.total, old["total"])
    return worse, better


def check(kernels: list[Kernel], tools: dict[str, str]) -> int:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    worse, better = differences(kernels, table["kernels"])
    for line in better:
        print(f"less than the table: {line}")
    for line in worse:
        print(f"MORE THAN THE TABLE: {line}")
    if tools != table["tools"]:
        print(f"the tools are {tools}, the table's are {table['tools']}: shown, not judged")
        return 0
    print(f"{len(kernels)} kernels compared with {TABLE.relative_to(ROOT)}: {len(worse)} grown, {len(better)} shrunk")
    if worse:
        print("Where that is wanted: python tests/cuda_sass.py --update, and say why in the commit.")
    return int(bool(worse))


def update(kernels: list[Kernel], tools: dict[str, str]) -> None:
    """Write the table, one line a loop."""
    table = {"tools": tools, "kernels": {kernel.name: kernel.as_json() for kernel in kernels}}
    text = json.dumps(table, indent=1)
    flat = re.sub(r'\{\s+("total"[^{}]+?)\s+\}', lambda found: "{" + re.sub(r"\s+", " ", found[1]) + "}", text)
    TABLE.write_text(flat + "\n", encoding="utf-8")


def run(options: argparse.Namespace, folder: Path) -> int:
    version = re.search(r"V([\d.]+)", output([tool("nvdisasm"), "--version"]))
    paths = [cubin for path in options.files for cubin in cubins_of(path, folder)] or compiled(folder)
    kernels: list[Kernel] = []
    compilers = set()
    for cubin in map(Cubin, paths):
        chosen = [kernel for kernel in cubin.kernels if re.search(options.kernels, kernel.name)]
        count(cubin, chosen)
        kernels += chosen
        compilers.add(cubin.compiler)
    if not kernels:
        raise Unreadable(f"--kernels is {options.kernels!r}, expected a pattern that some kernel's name matches")
    kernels.sort(key=lambda kernel: kernel.name)
    tools = {
        "nvcc": ", ".join(sorted(compilers)),
        "nvdisasm": version[1] if version else "unknown",
        "architecture": f"sm_{ARCHITECTURE}",
    }
    if options.update:
        update(kernels, tools)
    elif options.check:
        return check(kernels, tools)
    else:
        print(", ".join(f"{key} {value}" for key, value in tools.items()))
        show(kernels)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Count the machine instructions of the CUDA kernels.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="cubins, objects or libraries")
    parser.add_argument("--kernels", default=MEASURED, metavar="REGEX", help="kernels by name (default: %(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare with the stored table; fail where code has grown")
    what.add_argument("--update", action="store_true", help="write the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            tool("nvdisasm")
        except Unreadable as problem:
            print(f"skipped: {problem}")
            return 0
        try:
            return run(options, Path(folder))
        except Unreadable as problem:
            sys.exit(f"cuda_sass.py: {problem}")


if __name__ == "__main__":
    sys.exit(main())
