"""What is counted in the code of a kernel, on code short enough to count by hand."""

from compiled.instructions import (
    bytes_read,
    loop_code,
    main_loop,
    matrix_products,
    scalar_products,
)
from compiled.least_work import LeastWork, least_work

PTX = """
// %bb.0:
	ld.global.v4.b32 	{ %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	mov.b32 	%r9, 135267472;
$L__BB0_2:                              // =>This Loop Header: Depth=1
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, %r5;
// %bb.3:                               //   in Loop: Header=BB0_2 Depth=1
	@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r6 + 0 ], [ %r7 + 8 ], %rd3, %r9, %p2;
	@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r6 + 0 ], %rd4, %rd3, %r9, %p2;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};
	wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1;
	fma.rn.f32 	%r1, %r2, %r3, %r4;
	fma.rn.f32x2 	%rd1, %rd2, %rd3, %rd4;
	fma.rn.ftz.f32 	%r1, %r2, %r3, %r4;
$L__BB0_4:
	ret;
"""
ASSEMBLY = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x00 */
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;  /* 0x00 */
        /*0020*/              @!P0 BRA 0x60 ;               /* 0x00 */
        /*0030*/                   FFMA R1, R1, R1, R1 ;    /* 0x00 */
        /*0040*/               @P1 BRA 0x10 ;               /* 0x00 */
        /*0050*/                   EXIT ;                   /* 0x00 */
        /*0060*/                   NOP ;                    /* 0x00 */
        /*0070*/                   BRA 0x0 ;                /* 0x00 */
        /*0080*/                   BRA 0x80;                /* 0x00 */
"""


def test_what_is_in_a_loop_is_counted_alone() -> None:
    code = loop_code(PTX)
    assert "ld.global" not in code and "ret" not in code
    assert bytes_read(code, num_warps=4) == 16 * 128
    assert bytes_read(PTX, num_warps=4) == 2 * 16 * 128
    assert loop_code("// %bb.0:\n\tret;\n") == "// %bb.0:\n\tret;\n", "no loop"


def test_products_of_all_generations_are_added_up() -> None:
    by_descriptor = 2 * 128 * 64 * 16  # 135267472 says 128 lines and 64 columns
    by_warps, by_groups = 8 * 16 * 8 * 16, 2 * 64 * 32 * 16
    total, count = matrix_products(loop_code(PTX), PTX, num_warps=8)
    assert (total, count) == (by_descriptor + by_warps + by_groups, 4)
    assert scalar_products(loop_code(PTX), num_warps=1) == (3 * 32, 2)


def test_the_main_loop_ends_before_the_exit() -> None:
    assert main_loop(ASSEMBLY) == 4
    assert main_loop(ASSEMBLY.replace("@P1 BRA 0x10", "@P1 BRA 0x50")) == 0


def test_the_least_of_a_tile_is_its_products_exponentials_and_reads() -> None:
    sizes = {"POSITIONS": 64, "ITEMS": 32, "WIDTH": 16, "OUT": 16}
    tile: dict[str, int | bool | str] = {**sizes, "PRECISION": "ieee", "HOLD": True}
    held = least_work("full_states_backward", tile, 4)
    assert held == LeastWork(64 * 32 * 32, 64 * 32, 32 * 16 * 4)
    assert held.instructions(num_warps=2, multiply_adds_each=64) == 1024 + 32 + 2
    streamed = least_work("full_rows_backward", tile | {"HOLD": False}, 4)
    assert streamed.bytes_read == ((64 + 32) * 16 + 64 * 16) * 4
    gathered = least_work("gathered_forward_offsets", {"ITEMS": 8, "WIDTH": 16, "OFFSETS": True}, 2)
    assert gathered == LeastWork(8 * 16, 8, 8 * (16 * 2 + 8 + 4))
    assert least_work("draw_below", {"CALLS": 256}, 4) == LeastWork(0, 0, 0)
