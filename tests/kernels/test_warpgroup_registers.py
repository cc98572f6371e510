"""The reader of machine code that looks for registers written under a running product."""

from __future__ import annotations

from warpgroup_registers import overwritten

LOOP = """
        /*0f40*/                   FMUL R26, R26, R48 ;                                  /* 0x000000301a1a7220 */
        /*0f50*/                   LDSM.16.M88.4 {loaded}, [R0+UR6+0x6000] ;             /* 0x006000060004783b */
        /*1000*/                   WARPGROUP.ARRIVE ;                                    /* 0x00000000000079c5 */
        /*1010*/                   HGMMA.64x64x16.F32.BF16 R56, R36, gdesc[UR4], R56, gsb0 ;
        /*1020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*1030*/                   HGMMA.64x64x16.F32.BF16 R56, R24, gdesc[UR4], R56, gsb0 ;
        /*1040*/                   WARPGROUP.DEPBAR.LE gsb0, {pending} ;
        /*1050*/              @!P0 LDGSTS.E [R9+0xa000], desc[UR24][R4.64], !PT ;
        /*1060*/               @P1 BRA 0xf40 ;
        /*1070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*1080*/                   FMUL R36, R56, R24 ;
        /*1090*/                   EXIT ;
"""


def test_a_product_that_runs_on_into_the_next_step_and_a_register_that_is_handed_out_again():
    (line,) = overwritten(LOOP.format(loaded="R4", pending="0x1"))
    assert "0x1030" in line and "0xf40 FMUL R26" in line


def test_a_load_writes_four_registers():
    lines = overwritten(LOOP.replace("R26", "R20").format(loaded="R24", pending="0x1"))
    assert len(lines) == 1 and "LDSM" in lines[0]
    assert not overwritten(LOOP.replace("R26", "R20").format(loaded="R20", pending="0x1"))


def test_a_wait_for_all_products_is_enough():
    assert not overwritten(LOOP.format(loaded="R4", pending="0x0"))


def test_a_wait_for_all_but_the_last_product_covers_the_one_before():
    """That of R36 is waited for behind the next product, and written behind the loop only."""
    assert not overwritten(LOOP.replace("R26", "R38").format(loaded="R4", pending="0x1"))


def test_what_is_only_read_is_left_alone():
    reads = LOOP.replace("FMUL R26, R26, R48", "STS.64 [R26], R24").replace("FMUL R36", "STG.E desc[UR4][R36.64]")
    assert not overwritten(reads.format(loaded="R4", pending="0x1"))
