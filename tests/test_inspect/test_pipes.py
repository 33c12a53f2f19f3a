"""The pipe model on snippets of assembly written by hand."""

import pytest

from deform_gqa.inspect import pipes, sass

SNIPPET = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDS.128 R4, [R7] ;
        /*0020*/                   MUFU.EX2 R4, R4 ;
        /*0030*/              @!P1 BRA `(.L_x_1) ;
        /*0040*/                   FSEL R4, R4, -INF , P0 ;
        /*0050*/                   FSEL R5, R5, -INF , P0 ;
.L_x_1:
        /*0060*/              @!P2 BRA `(.L_x_2) ;
        /*0070*/                 HGMMA.64x32x16.F32.BF16 R8, R4, gdesc[UR8], R8, gsb0 ;
.L_x_2:
        /*0080*/               @P3 FADD R4, R4, R5 ;
        /*0090*/               @P0 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
"""


def names(code, indices):
    return [sass.opcode(code.instructions[i]) for i in indices]


def test_loop_with_exp():
    code = sass.parse(SNIPPET)
    assert len(code.instructions) == 12
    assert sass.loop_with_exp(code) == range(1, 10)
    assert sass.loops(code) == [range(1, 10), range(11, 12)]


def test_a_block_that_only_masks_is_skipped_and_a_product_is_not():
    code = sass.parse(SNIPPET)
    assert names(code, sass.executed(code, range(1, 10))) == [
        *('LDS.128', 'MUFU.EX2', 'BRA', 'BRA'),
        *('HGMMA.64x32x16.F32.BF16', 'FADD', 'BRA'),
    ]


def test_two_branches_back_are_one_loop():
    code = sass.parse("""
.L_x_0:
        /*0000*/                   MUFU.EX2 R4, R4 ;
        /*0010*/               @P1 BRA `(.L_x_0) ;
        /*0020*/                   FADD R4, R4, R4 ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
""")
    assert sass.loop_with_exp(code) == range(4)


def test_inner_loop_is_chosen_and_none_without_exp():
    code = sass.parse("""
.L_x_0:
        /*0000*/                   FADD R4, R4, R4 ;
.L_x_1:
        /*0010*/                   MUFU.EX2 R4, R4 ;
        /*0020*/               @P1 BRA `(.L_x_1) ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
""")
    assert sass.loop_with_exp(code) == range(1, 3)
    assert sass.loop_with_exp(sass.parse('/*0000*/ EXIT ;')) == range(0)


@pytest.mark.parametrize(
    ('instruction', 'pipe', 'clocks'),
    [
        ('LDS R4, [R7]', 'shared', 1),
        ('LDS.U16 R4, [R7]', 'shared', 1),
        ('LDS.128 R4, [R7]', 'shared', 4),
        ('STS.64 [R7], R4', 'shared', 2),
        ('LDGSTS.E.BYPASS.128 [R4], desc[UR6][R2.64]', 'shared', 4),
        ('LDSM.16.M88.4 R4, [R7]', 'shared', 4),
        ('STSM.16.MT88.2 [R7], R4', 'shared', 2),
        ('LDSM.16.M88 R4, [R7]', 'shared', 1),
        ('SHFL.BFLY PT, R4, R5, 0x1, 0x1f', 'shared', 1),
        ('FMNMX R4, R5, R6, !PT', 'ALU', 0.5),
        ('LEA.HI.X.SX32 R4, R5, R6, 0x1, P0', 'ALU', 0.5),
        ('F2FP.BF16.F32.PACK_AB R4, R5, R6', 'ALU', 1),
        ('MUFU.EX2 R4, R5', 'MUFU', 2),
        ('FRND.FTZ.FLOOR R4, R5', 'MUFU', 2),
        ('F2I.TRUNC.NTZ R4, R5', 'MUFU', 2),
        ('FFMA R4, R5, R6, R7', 'FMA', 0.25),
        ('HADD2.F32 R4, -RZ, R5.H0_H0', 'FMA', 0.25),
        ('IMAD.MOV.U32 R4, RZ, RZ, R5', 'FMA', 0.5),
        ('HMMA.16816.F32.BF16 R4, R4, R8, R4', 'tensor', 1),
        ('HMMA.1688.F32.TF32 R4, R4, R8, R4', 'tensor', 1),
    ],
)
def test_an_instruction_takes_an_issue_slot_and_one_pipe(instruction, pipe, clocks):
    assert pipes.instruction_clocks(instruction) == {'issue': 0.25, pipe: clocks}


@pytest.mark.parametrize('instruction', ['BAR.SYNC 0x0', 'UIADD3 UR4, UR5, UR6, URZ'])
def test_other_instructions_take_an_issue_slot_alone(instruction):
    assert pipes.instruction_clocks(instruction) == {'issue': 0.25}


@pytest.mark.parametrize(
    ('instruction', 'shared', 'tensor'),
    [
        # 64 x 16 of A and 32 x 16 of B, two bytes each, by four warps.
        ('HGMMA.64x32x16.F32.BF16 R8, gdesc[UR8], R8, gsb0', 3072, 32768),
        ('HGMMA.64x32x16.F32.BF16 R8, R4, gdesc[UR8].tnspB, R8, gsb0', 1024, 32768),
        ('HGMMA.64x32x8.F32.TF32 R8, R4, gdesc[UR8], R8, gsb0', 1024, 32768),
    ],
)
def test_products_of_warp_groups(instruction, shared, tensor):
    clocks = pipes.instruction_clocks(instruction)
    assert clocks['shared'] == shared / 128 / 4
    assert clocks['tensor'] == tensor / 4096 / 4


def test_pipe_clocks_add_up():
    clocks = pipes.pipe_clocks(['MUFU.EX2 R4, R4', 'LDS.64 R4, [R7]'], warps=8)
    assert clocks == {
        'issue': 4.0,
        'shared': 16.0,
        'ALU': 0.0,
        'MUFU': 16.0,
        'FMA': 0.0,
        'tensor': 0.0,
    }


def test_programs_at_once():
    assert pipes.programs_at_once(126, 65 * 1024, warps=16) == 1  # registers
    assert pipes.programs_at_once(128, 30 * 1024, warps=8) == 2  # registers
    assert pipes.programs_at_once(129, 0, warps=8) == 1  # they are dealt out by eights
    assert pipes.programs_at_once(32, 80 * 1024, warps=8) == 2  # shared memory
    assert pipes.programs_at_once(16, 0, warps=16) == 4  # warps
    assert pipes.programs_at_once(16, 0, warps=1) == 32  # programs


def test_bound_is_set_by_the_busiest_multiprocessor_and_pipe():
    gpu = pipes.Gpu(multiprocessors=10, clock_ghz=2.0)
    clocks = {'issue': 1000.0, 'shared': 4000.0}
    assert pipes.bound_us(clocks, 10, gpu) == 2.0
    assert pipes.bound_us(clocks, 11, gpu) == 4.0
