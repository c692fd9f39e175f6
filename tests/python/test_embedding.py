"""nvpflow from C and C++: what an installed package brings for them, its examples, and the page that tells how."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import nvpflow
import pytest
from oracle import assert_same_bits, unit_data

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "python" / "docs" / "cpp.md"
INCLUDE = Path(nvpflow.get_include())
LIBRARIES = INCLUDE.parent / "lib"
CMAKE = shutil.which("cmake")
CXX = shutil.which(os.environ.get("CXX", "c++"))
CC = shutil.which(os.environ.get("CC", "cc"))
SHARED = next(iter(sorted(LIBRARIES.glob("libnvpflow.so.*"))), None) or next(
    iter(LIBRARIES.glob("libnvpflow.*dylib")), None
)

needs_cmake = pytest.mark.skipif(not (CMAKE and CXX and CC), reason="needs CMake, a C and a C++ compiler")
needs_compilers = pytest.mark.skipif(not (CXX and CC), reason="needs a C and a C++ compiler")
needs_static = pytest.mark.skipif(
    not (LIBRARIES / "libnvpflow.a").exists(), reason="a build with CUDA has no static library"
)
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="for ELF systems")


def run(*command: object, cwd: Path | None = None, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, timeout=600, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_flow):
    """A flow and the file it is saved in."""
    flow, _ = make_flow(6, 3, (32,), "tanh", dtype="float32", standardize=True)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    flow.save(path)
    return flow, path


# ---------------------------------------------------------------------------------------------- what is installed


def test_the_command_and_the_functions_say_where_things_are() -> None:
    # The same folders, not the same letters: an environment's lib64 may be a link to its lib.
    for option, here in (("--cmake-dir", nvpflow.get_cmake_dir()), ("--include-dir", nvpflow.get_include())):
        assert Path(run(sys.executable, "-m", "nvpflow", option).strip()).samefile(here)
    assert (Path(nvpflow.get_cmake_dir()) / "nvpflow-config.cmake").is_file()
    assert (INCLUDE / "nvpflow.h").is_file()
    assert SHARED is not None
    assert (LIBRARIES / "pkgconfig" / "nvpflow.pc").is_file()


def test_nothing_installed_names_the_machine_that_built_it() -> None:
    for path in [*LIBRARIES.rglob("*.cmake"), *LIBRARIES.rglob("*.pc")]:
        text = path.read_text()
        for place in (str(ROOT), str(INCLUDE.parent), "/tmp/", sys.prefix):
            assert place not in text, f"{path} names {place}"


@needs_compilers
def test_headers_stand_alone_and_know_the_standard_library_alone(tmp_path) -> None:
    headers = sorted(INCLUDE.rglob("*.h*"))
    assert len(headers) >= 8
    for header in headers:
        text = header.read_text()
        for name in re.findall(r"#\s*include\s*([<\"][^>\"]+[>\"])", text):
            assert re.fullmatch(r"<(nvpflow(/\w+\.(h|hpp)|\.h)|[a-z_]+(\.h)?)>", name), f"{header.name} includes {name}"
        assert not re.search(r"nlohmann|cuda_runtime|pybind|Python\.h", text)
    warnings = [
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Wshadow",
        "-Wconversion",
        "-Werror",
        "-fsyntax-only",
        f"-I{INCLUDE}",
    ]
    everything = tmp_path / "everything.cpp"
    # Each of them twice and each of them first: in a file of its own.
    for header in headers:
        name = header.relative_to(INCLUDE)
        everything.write_text(f"#include <{name}>\n#include <{name}>\n")
        run(CXX, "-std=c++20", *warnings, everything)
    only_c = tmp_path / "only.c"
    only_c.write_text("#include <nvpflow.h>\nint main(void) { return 0; }\n")
    run(CC, "-std=c99", *warnings, only_c)


@linux
@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_the_shared_library_has_a_soname_and_needs_the_system_alone() -> None:
    text = run("readelf", "-dW", SHARED)
    assert re.search(r"SONAME.*\[(.*?)\]", text).group(1) == SHARED.name
    assert "NODELETE" in text
    assert not re.search("RPATH|RUNPATH|TEXTREL", text)
    needed = re.findall(r"NEEDED.*\[(.*?)\.so", text)
    assert {re.sub(r"^ld-.*", "ld", name) for name in needed} <= {
        "libstdc++",
        "libm",
        "libgcc_s",
        "libc",
        "libpthread",
        "ld",
        "libdl",
        "librt",
    }


@pytest.mark.skipif(not shutil.which("doxygen"), reason="needs doxygen")
def test_everything_that_headers_offer_is_documented(tmp_path) -> None:
    settings = (ROOT / "cpp" / "Doxyfile").read_text() + f"OUTPUT_DIRECTORY = {tmp_path}\n"
    run("doxygen", "-", cwd=ROOT, input=settings)  # what is not documented is an error
    pages = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "html").glob("*.html")}
    assert "nvpflow_sample_f64" in pages["nvpflow_8h.html"]
    assert "round_trip_error" in pages["classnvpflow_1_1Flow.html"]


# ---------------------------------------------------------------------------------------------- CMake, pkg-config


def configure(source: Path, build: Path, *options: str) -> None:
    run(CMAKE, "-S", source, "-B", build, f"-Dnvpflow_DIR={nvpflow.get_cmake_dir()}", *options)


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    build = tmp_path_factory.mktemp("examples")
    configure(ROOT / "cpp" / "examples", build, "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Wshadow -Wconversion -Werror")
    run(CMAKE, "--build", build)
    return build


@needs_cmake
def test_example_latency(examples, model) -> None:
    output = run(examples / "latency", model[1], 20_000)
    assert re.search(r"p50 \d+ ns, p99 \d+ ns, p99\.9 \d+ ns, max \d+ ns", output)
    counts = [int(line.split()[3]) for line in output.splitlines() if line.startswith("  <")]
    assert sum(counts) == 20_000
    x = model[0].sample(1024, seed=1)
    expected = np.resize(model[0].log_prob(x), 20_000).astype(np.float64).mean()
    assert f"mean log p {expected:.4f} nats" in output
    failed = subprocess.run([examples / "latency", "nowhere"], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "nowhere" in failed.stderr


@needs_cmake
def test_example_server_reloads_without_losing_a_request(examples, model, tmp_path) -> None:
    flow = nvpflow.load(model[1])
    path = tmp_path / "served.safetensors"
    flow.save(path)
    server = subprocess.Popen([examples / "server", path, "60", "2"], stdout=subprocess.PIPE, text=True)
    # Each step waits for the server's word: on a busy machine a moment of sleep would not be enough.
    assert server.stdout.readline() == f"serving {path}\n"
    for seed in (1, 2):
        nvpflow.Flow(flow.spec, seed).save(path)
        assert server.stdout.readline() == f"reloaded {path}\n"
    (tmp_path / "broken").write_bytes(b"this is no model")
    os.replace(tmp_path / "broken", path)
    assert server.stdout.readline().startswith("kept the old model: ")
    server.terminate()
    output, _ = server.communicate(timeout=60)
    assert server.returncode == 0, output
    assert "reloaded " not in output
    assert "kept the old model: " not in output
    requests, _ = map(int, re.search(r"(\d+) requests, (\d+) rows", output).groups())
    assert requests > 100


@needs_cmake
def test_example_in_c(examples, model) -> None:
    x = unit_data(5, 6, 3, "float32")
    text = "\n".join(" ".join(f"{value:.9g}" for value in row) for row in x)
    scores = [float(line) for line in run(examples / "score", model[1], input=text).split()]
    np.testing.assert_allclose(scores, model[0].log_prob(x), rtol=1e-6)
    cut = subprocess.run([examples / "score", model[1]], input="1 2 3", capture_output=True, text=True, check=False)
    assert cut.returncode == 1
    assert "within a row" in cut.stderr


def _project(folder: Path, lines: str) -> Path:
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(f"cmake_minimum_required(VERSION 3.20)\nproject(p LANGUAGES C CXX)\n{lines}")
    return folder


@needs_cmake
@linux
@pytest.mark.parametrize("how", ["BUILD_SHARED_LIBS", "component", "target"])
def test_the_shared_library_by_cmake(how, model, tmp_path) -> None:
    components = "COMPONENTS shared" if how == "component" else ""
    target = "nvpflow::shared" if how == "target" else "nvpflow::nvpflow"
    source = _project(
        tmp_path / "p",
        f"find_package(nvpflow 0.1 CONFIG REQUIRED {components})\n"
        f"find_package(nvpflow 0.1 CONFIG REQUIRED {components})\n"  # as a dependency of a dependency does
        f"add_executable(score {ROOT / 'cpp' / 'examples' / 'score.c'})\n"
        f"target_link_libraries(score PRIVATE {target})\n",
    )
    configure(source, tmp_path / "b", *(["-DBUILD_SHARED_LIBS=ON"] if how == "BUILD_SHARED_LIBS" else []))
    run(CMAKE, "--build", tmp_path / "b")
    assert SHARED.name in run("ldd", tmp_path / "b" / "score")
    x = unit_data(1, 6, 3, "float32")
    score = run(tmp_path / "b" / "score", model[1], input=" ".join(f"{value:.9g}" for value in x[0]))
    assert float(score) == pytest.approx(float(model[0].log_prob(x)[0]), rel=1e-6)


@needs_cmake
@pytest.mark.parametrize("wanted", ["0.1 COMPONENTS gpu", "0.2", "1.0"])
def test_what_is_not_there_is_not_found(wanted, tmp_path) -> None:
    source = _project(
        tmp_path / "p",
        f'find_package(nvpflow {wanted} CONFIG QUIET)\nfile(WRITE ${{CMAKE_BINARY_DIR}}/found "${{nvpflow_FOUND}}")\n',
    )
    configure(source, tmp_path / "b")
    assert (tmp_path / "b" / "found").read_text() in ("0", "FALSE")


@needs_compilers
@linux
@pytest.mark.skipif(not shutil.which("pkg-config"), reason="needs pkg-config")
@pytest.mark.parametrize("static", [False, pytest.param(True, marks=needs_static)], ids=["shared", "static"])
def test_pkg_config(static, model, tmp_path) -> None:
    env = {**os.environ, "PKG_CONFIG_PATH": str(LIBRARIES / "pkgconfig")}
    assert run("pkg-config", "--modversion", "nvpflow", env=env).strip() == nvpflow.__version__
    flags = run("pkg-config", "--cflags", "--libs", *(["--static"] if static else []), "nvpflow", env=env).split()
    if static:  # a wheel's own line names the shared library
        flags = [str(LIBRARIES / "libnvpflow.a") if flag.startswith("-l:") else flag for flag in flags]
    program = tmp_path / "score"
    run(CC, ROOT / "cpp" / "examples" / "score.c", *flags, "-o", program)
    env["LD_LIBRARY_PATH"] = str(LIBRARIES)
    x = unit_data(1, 6, 3, "float32")
    score = run(program, model[1], input=" ".join(f"{value:.9g}" for value in x[0]), env=env)
    assert float(score) == pytest.approx(float(model[0].log_prob(x)[0]), rel=1e-6)


# ---------------------------------------------------------------------------------------------- as a part of a build

_OUTER = """
include(FetchContent)
FetchContent_Declare(nvpflow SOURCE_DIR {root})
FetchContent_MakeAvailable(nvpflow)
if(NOT TARGET nvpflow::nvpflow OR TARGET nvpflow::shared)
  message(FATAL_ERROR "expected the static library alone")
endif()
foreach(name CMAKE_BUILD_TYPE CMAKE_CXX_STANDARD CMAKE_CXX_EXTENSIONS CMAKE_CXX_VISIBILITY_PRESET
             CMAKE_POSITION_INDEPENDENT_CODE BUILD_SHARED_LIBS)
  if(DEFINED ${{name}} AND NOT "${{${{name}}}}" STREQUAL "")
    message(FATAL_ERROR "${{name}} is ${{${{name}}}}")
  endif()
endforeach()
get_property(options DIRECTORY PROPERTY COMPILE_OPTIONS)
if(options)
  message(FATAL_ERROR "options for every target: ${{options}}")
endif()
add_executable(latency {root}/cpp/examples/latency.cpp)
target_link_libraries(latency PRIVATE nvpflow::nvpflow)
"""


def _outer(tmp_path: Path) -> Path:
    source, build = _project(tmp_path / "outer", _OUTER.format(root=ROOT)), tmp_path / "b"
    configured = subprocess.run(
        [CMAKE, "-S", source, "-B", build, f"-DPython_EXECUTABLE={sys.executable}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if "needs the header nlohmann/json.hpp" in configured.stderr:
        pytest.skip("needs the header nlohmann/json.hpp")
    assert configured.returncode == 0, configured.stderr
    return build


@needs_cmake
def test_as_a_subproject_it_leaves_the_outer_build_alone(tmp_path) -> None:
    build = _outer(tmp_path)
    cache = (build / "CMakeCache.txt").read_text()
    assert "NVPFLOW_CUDA:STRING=OFF" in cache
    switches = re.findall(r"^(\w+):BOOL=", cache, flags=re.MULTILINE)
    foreign = [name for name in switches if not re.match("NVPFLOW_|CMAKE_|FETCHCONTENT_", name)]
    assert foreign == []
    run(CMAKE, "--install", build, "--prefix", tmp_path / "prefix")
    assert not [path for path in (tmp_path / "prefix").rglob("*") if path.is_file()]


@needs_cmake
@pytest.mark.slow
def test_as_a_subproject_it_builds_links_and_runs(tmp_path, model) -> None:
    build = _outer(tmp_path)
    run(CMAKE, "--build", build)
    assert "p50" in run(build / "latency", model[1], 1000)


@needs_cmake
@pytest.mark.slow
def test_installed_from_the_sources_the_examples_find_it(tmp_path, model) -> None:
    options = [
        "-DNVPFLOW_CUDA=OFF",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_INSTALL_PREFIX={tmp_path / 'prefix'}",
    ]
    run(CMAKE, "-S", ROOT, "-B", tmp_path / "b", *options)
    run(CMAKE, "--build", tmp_path / "b")
    run(CMAKE, "--install", tmp_path / "b")
    moved = (tmp_path / "prefix").rename(tmp_path / "elsewhere")  # nothing in it knows where it was
    assert (moved / "share" / "doc" / "nvpflow" / "nlohmann-json.txt").is_file()
    for kind in ("OFF", "ON"):
        build = tmp_path / f"examples-{kind}"
        prefix = f"-DCMAKE_PREFIX_PATH={moved}"
        run(CMAKE, "-S", ROOT / "cpp" / "examples", "-B", build, prefix, f"-DBUILD_SHARED_LIBS={kind}")
        run(CMAKE, "--build", build)
        assert "p50" in run(build / "latency", model[1], 1000)


# ---------------------------------------------------------------------------------------------- pages


@needs_cmake
def test_the_page_s_cmake_lines_and_program_work_as_they_stand(tmp_path) -> None:
    (lists,), program = blocks(PAGE, "cmake"), blocks(PAGE, "cpp")[0]
    assert "cmake_minimum_required(VERSION 3.20)" in lists
    (tmp_path / "CMakeLists.txt").write_text(lists)
    (tmp_path / "main.cpp").write_text(program)
    configure(tmp_path, tmp_path / "b")
    run(CMAKE, "--build", tmp_path / "b")
    assert "nats" in run(tmp_path / "b" / "app", cwd=tmp_path)


@needs_compilers
@linux
def test_the_page_s_other_programs_work(tmp_path) -> None:
    programs = [*blocks(PAGE, "cpp")[1:], *blocks(PAGE, "c")]
    assert len(programs) >= 4
    nvpflow.build(4, 2, (8,)).save(tmp_path / "model.safetensors")
    env = {**os.environ, "LD_LIBRARY_PATH": str(LIBRARIES)}
    for program in programs:
        name = re.match(r"/[/*] (\w+\.\w+)", program).group(1)
        (tmp_path / name).write_text(program)
        compiler = [CXX, "-std=c++20", "-pthread"] if name.endswith(".cpp") else [CC, "-std=c99"]
        warnings = ["-Wall", "-Wextra", "-Werror", f"-I{INCLUDE}"]
        run(*compiler, *warnings, tmp_path / name, SHARED, "-o", tmp_path / "program")
        assert run(tmp_path / "program", cwd=tmp_path, env=env).strip(), name


# ---------------------------------------------------------------------------------------------- ctypes


class Library:
    """The C interface as a foreign-function interface sees it."""

    def __init__(self) -> None:
        self.c = ctypes.CDLL(str(SHARED))
        self.c.nvpflow_last_error.restype = ctypes.c_char_p
        self.c.nvpflow_version.restype = ctypes.c_char_p
        for name in ("input_size", "num_layers", "num_couplings", "num_parameters", "context_size"):
            function = getattr(self.c, f"nvpflow_{name}")
            function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_void_p]
        self.c.nvpflow_free.restype = None
        self.c.nvpflow_free.argtypes = [ctypes.c_void_p]

    def call(self, name: str, *arguments: object) -> int:
        return getattr(self.c, f"nvpflow_{name}")(*arguments)

    def load(self, path: Path) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        assert self.call("load", os.fsencode(path), ctypes.byref(handle)) == 0, self.c.nvpflow_last_error()
        return handle


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.fixture(scope="module")
def library() -> Library:
    return Library()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [0, 1, 700])
def test_ctypes_gives_the_bits_that_python_gives(library, make_flow, tmp_path, dtype, rows) -> None:
    flow, _ = make_flow(5, 3, (24,), "silu", dtype=dtype, standardize=True)
    flow.save(tmp_path / "m")
    handle, kind, c = library.load(tmp_path / "m"), "f32" if dtype == "float32" else "f64", library.c
    assert c.nvpflow_version().decode() == nvpflow.__version__
    assert c.nvpflow_input_size(handle) == 5
    assert c.nvpflow_dtype_of(handle) == ("float32", "float64").index(dtype)
    assert (c.nvpflow_num_couplings(handle), c.nvpflow_num_layers(handle)) == (3, 4)
    assert c.nvpflow_num_parameters(handle) == flow.num_parameters
    text = ctypes.create_string_buffer(10_000)
    assert library.call("spec_json", handle, text, ctypes.c_size_t(len(text)), None) == 0
    assert nvpflow.FlowSpec.from_json(text.value.decode()) == flow.spec

    x = unit_data(rows, 5, 4, dtype)
    z, back, log_det, log_prob, drawn = (np.full(s, -9, dtype) for s in (x.shape, x.shape, rows, rows, x.shape))
    n = ctypes.c_int64(rows)
    assert library.call(f"log_prob_{kind}", handle, _pointer(x), n, _pointer(log_prob)) == 0
    assert library.call(f"forward_{kind}", handle, _pointer(x), n, _pointer(z), _pointer(log_det)) == 0
    assert library.call(f"inverse_{kind}", handle, _pointer(z), n, _pointer(back), None) == 0
    seed, first = ctypes.c_uint64(2**63 + 1), ctypes.c_uint64(5)
    assert library.call(f"sample_{kind}", handle, seed, first, n, _pointer(drawn)) == 0
    assert_same_bits(log_prob, flow.log_prob(x), "log_prob")
    assert_same_bits(z, flow.forward(x)[0], "z")
    assert_same_bits(log_det, flow.forward(x)[1], "log_det")
    assert_same_bits(back, flow.inverse(flow.forward(x)[0]), "x")
    assert_same_bits(drawn, flow.sample(rows, seed=2**63 + 1, start=5), "sample")
    if rows:
        nll, gradient = ctypes.c_double(), np.full(flow.num_parameters, -9, dtype)
        status = library.call(f"nll_gradient_{kind}", handle, _pointer(x), n, ctypes.byref(nll), _pointer(gradient))
        assert status == 0
        assert nll.value == flow.nll_gradient(x)[0]
        assert_same_bits(gradient, flow.nll_gradient(x)[1], "gradient")
    c.nvpflow_free(handle)


def test_ctypes_takes_contexts(library, tmp_path) -> None:
    flow = nvpflow.build(3, 2, (8,), context_size=2, network="residual")
    flow.save(tmp_path / "m")
    handle, given = library.load(tmp_path / "m"), ctypes.c_void_p()
    assert library.c.nvpflow_context_size(handle) == 2
    x, context, n = unit_data(20, 3, 1, "float32"), unit_data(20, 2, 2, "float32"), ctypes.c_int64(20)
    out, one = np.empty(20, np.float32), ctypes.c_int64(1)
    for rows, of in ((n, context), (one, context[0])):
        arguments = _pointer(x), n, _pointer(context), rows, _pointer(out)
        assert library.call("log_prob_context_f32", handle, *arguments) == 0
        assert_same_bits(out, flow.log_prob(x, context=of), "log_prob")
    assert library.call("condition_f32", handle, _pointer(context), ctypes.byref(given)) == 0
    assert library.call("sample_f32", given, ctypes.c_uint64(7), ctypes.c_uint64(0), n, _pointer(x)) == 0
    assert_same_bits(x, flow.condition(context[0]).sample(20, seed=7), "sample")
    assert library.call("log_prob_f32", handle, _pointer(x), n, _pointer(out)) == 1
    assert b"call nvpflow_log_prob_context_f32" in library.c.nvpflow_last_error()
    library.c.nvpflow_free(handle)
    library.c.nvpflow_free(given)


def test_ctypes_gets_names_and_threshold(library, tmp_path) -> None:
    flow = nvpflow.build(3, 2, (8,))
    flow.column_names = ("east", "Höhe", "")
    flow.set_threshold(-12.5, 0.01)
    flow.save(tmp_path / "m")
    handle = library.load(tmp_path / "m")
    needed, text = ctypes.c_size_t(), ctypes.create_string_buffer(6)
    for i, name in enumerate(flow.column_names):
        column = ctypes.c_int64(i)
        assert library.call("column_name", handle, column, text, ctypes.c_size_t(6), ctypes.byref(needed)) == 0
        assert text.value.decode() == name
        assert needed.value == len(name.encode()) + 1
    assert library.call("column_name", handle, ctypes.c_int64(1), text, ctypes.c_size_t(5), None) == 1
    assert library.call("context_name", handle, ctypes.c_int64(0), text, ctypes.c_size_t(6), None) == 1
    assert b"the flow has no context" in library.c.nvpflow_last_error()
    limit, quantile = ctypes.c_double(), ctypes.c_double()
    assert library.call("threshold", handle, ctypes.byref(limit), ctypes.byref(quantile)) == 0
    assert (limit.value, quantile.value) == (-12.5, 0.01)
    flow.set_threshold(-3)
    flow.save(tmp_path / "m")
    assert library.call("reload", handle, os.fsencode(tmp_path / "m")) == 0
    assert library.call("threshold", handle, ctypes.byref(limit), ctypes.byref(quantile)) == 0
    assert limit.value == -3
    assert np.isnan(quantile.value)
    library.c.nvpflow_free(handle)


def test_ctypes_gets_the_names_of_a_context(library, tmp_path) -> None:
    flow = nvpflow.build(3, 2, (8,), context_size=2)
    flow.save(tmp_path / "unnamed")
    flow.context_names = ("Höhe", "")
    flow.save(tmp_path / "m")
    needed, text = ctypes.c_size_t(), ctypes.create_string_buffer(6)
    for path, names in ((tmp_path / "m", flow.context_names), (tmp_path / "unnamed", ("", ""))):
        handle = library.load(path)
        for i, name in enumerate(names):
            column = ctypes.c_int64(i)
            assert library.call("context_name", handle, column, text, ctypes.c_size_t(6), ctypes.byref(needed)) == 0
            assert text.value.decode() == name
            assert needed.value == len(name.encode()) + 1
        for wrong in (-1, 2):
            assert library.call("context_name", handle, ctypes.c_int64(wrong), text, ctypes.c_size_t(6), None) == 1
            assert library.c.nvpflow_last_error() == f"column is {wrong}, expected 0 to 1".encode()
        library.c.nvpflow_free(handle)


def test_ctypes_gets_statuses_and_messages(library, model, tmp_path) -> None:
    handle = ctypes.c_void_p()
    assert library.call("load", b"no/such/file", ctypes.byref(handle)) == 4
    assert handle.value is None
    assert b"no/such/file" in library.c.nvpflow_last_error()
    assert library.c.nvpflow_system_error() == 2
    handle = library.load(model[1])
    x, out = np.zeros((2, 6)), np.zeros(2)
    n = ctypes.c_int64(2)
    assert library.call("log_prob_f64", handle, _pointer(x), n, _pointer(out)) == 2
    assert library.c.nvpflow_last_error().startswith(b"the flow is float32, the arrays are float64; ")
    nvpflow.build(6, 3, (33,), standardize=False).save(tmp_path / "other")
    assert library.call("reload", handle, os.fsencode(tmp_path / "other")) == 5
    assert b"expected 4" in library.c.nvpflow_last_error()  # layers: the model has a standardize layer
    library.c.nvpflow_free(handle)


@pytest.mark.gpu
def test_the_c_interface_on_a_cuda_device(library, model, tmp_path) -> None:
    flow, path = model
    handle, other = ctypes.c_void_p(), library.load(path)
    assert library.call("load_on", os.fsencode(path), b"cuda", b"float32", None, ctypes.byref(handle)) == 0
    x, n = unit_data(20, 6, 3, "float32"), ctypes.c_int64(20)
    out = np.empty(20, np.float32)
    nvpflow.Flow(flow.spec, 5).save(tmp_path / "new")
    new = nvpflow.load(tmp_path / "new")
    assert library.call("reload", handle, os.fsencode(tmp_path / "new")) == 0
    for served in (new, flow):
        assert library.call("log_prob_f32", handle, _pointer(x), n, _pointer(out)) == 0
        np.testing.assert_allclose(out, served.log_prob(x), rtol=1e-5, atol=1e-5)
        assert library.call("swap", handle, other) == 0  # between a device and the host
    assert library.call("prepare", handle, n) == 1
    assert b"on cuda:0" in library.c.nvpflow_last_error()
    library.c.nvpflow_free(handle)
    library.c.nvpflow_free(other)


@linux
def test_the_library_can_be_closed_while_its_threads_sleep(model, run_python) -> None:
    """Its code stays: the pool's threads, and fork handlers, would otherwise run into nothing."""
    script = """
import ctypes, os, sys, _ctypes
path, model = sys.argv[1:]
for _ in range(2):
    c = ctypes.CDLL(path)
    flow = ctypes.c_void_p()
    assert c.nvpflow_load(model.encode(), ctypes.byref(flow)) == 0
    x, out = (ctypes.c_float * 600000)(), (ctypes.c_float * 100000)()
    c.nvpflow_set_num_threads(flow, 3)
    assert c.nvpflow_log_prob_f32(flow, x, ctypes.c_int64(100000), out) == 0
    c.nvpflow_free.argtypes = [ctypes.c_void_p]
    c.nvpflow_free(flow)
    _ctypes.dlclose(c._handle)
    child = os.fork()
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
print("done")
"""
    assert (
        run_python(
            "import warnings; warnings.simplefilter('ignore', DeprecationWarning)\n" + script, SHARED, model[1]
        ).strip()
        == "done"
    )
