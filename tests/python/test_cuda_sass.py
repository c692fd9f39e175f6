"""The counter of machine instructions, on listings as nvdisasm prints them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
import cuda_sass

# A loop of products in a loop of tiles, with a part of it that lies behind the end, and a branch back from there that
# makes no loop.
LISTING = """
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_1:
        /*0020*/                   LDS.128 R4, [R2] ;
        /*0030*/               @P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0040*/                   HMMA.1688.F32.TF32 R8, R4, R6, RZ ;
        /*0050*/                   NOP ;
        /*0060*/              @!P0 BRA `(.L_x_1) ;
        /*0070*/                   IMAD.MOV.U32 R3, RZ, RZ, R8 ;
        /*0080*/               @P2 BRA `(.L_x_0) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   FADD R4, R4, 1 ;
        /*00b0*/                   BRA `(.L_x_2) ;
"""


def test_loops_hold_their_own_instructions() -> None:
    outer, inner = cuda_sass.Graph(LISTING.splitlines()).loops()
    assert (outer.depth, inner.depth) == (0, 1)
    assert outer.counts == {"integer": 1, "move": 1, "control": 1}
    assert inner.counts == {"shared": 1, "tensor": 1, "nop": 1, "float": 1, "control": 3}
    assert inner.has_products(on_matrix_units=True)
    assert not outer.has_products(on_matrix_units=True)


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        (
            "_ZN7nvpflow4cuda45_GLOBAL__N__0076d4a0_12_transform_cu_18e9b47a18transform_streamedIfLNS0_8MultiplyE1ELNS0_"
            "7StorageE2ELNS0_5ReachE0EEEvNS0_13TransformPlanENS0_7ProgramIT_EENS0_13TransformCallIS8_EEPS8_",
            "transform_streamed<float, tf32x3, workspace, plain>",
        ),
        (
            "_ZN7nvpflow4cuda44_GLOBAL__N__41841e93_11_gradient_cu_d477fbb5_244112add_partialsIdEEvPKT_illbPS3_",
            "add_partials<double>",
        ),
        ("_ZN7nvpflow4cuda44_GLOBAL__N__41841e93_11_gradient_cu_d477fbb510set_doubleEPdd", "set_double"),
        ("my_kernel", "my_kernel"),
    ],
)
def test_names_are_those_of_the_source(mangled: str, name: str) -> None:
    assert cuda_sass.short_name(mangled) == name


def kernel(name: str, registers: int = 100, total: int = 100, loops: int = 1) -> cuda_sass.Kernel:
    loop = cuda_sass.Loop(1, cuda_sass.Counter(tensor=total))
    return cuda_sass.Kernel(name, 0, "", registers=registers, threads=256, loops=[loop] * loops)


@pytest.mark.parametrize(
    ("now", "worse", "better"),
    [
        (kernel("k", total=105), 0, 0),
        (kernel("k", total=106), 1, 0),
        (kernel("k", registers=110), 1, 0),
        (kernel("k", registers=90), 0, 1),
        (kernel("k", loops=2), 1, 0),
        (kernel("other"), 1, 0),
    ],
)
def test_growth_beyond_a_twentieth_is_told(now: cuda_sass.Kernel, worse: int, better: int) -> None:
    grown, shrunk = cuda_sass.differences([now], {"k": kernel("k").as_json()})
    assert (len(grown), len(shrunk)) == (worse, better)


def test_registers_bound_the_warps() -> None:
    assert kernel("k", registers=168).warps == 8
    assert kernel("k", registers=128).warps == 16
    assert kernel("k", registers=32).warps == 64


def test_the_table_fits_the_tool() -> None:
    table = json.loads(cuda_sass.TABLE.read_text(encoding="utf-8"))
    assert set(table["tools"]) == {"nvcc", "nvdisasm", "architecture"}
    for name, entry in table["kernels"].items():
        assert entry["loops"], name
        for loop in entry["loops"]:
            assert loop["total"] == sum(value for key, value in loop.items() if key != "total")
