"""The reader of machine code that looks for registers written under a running product."""

from __future__ import annotations

import pytest
from warpgroup_registers import overwritten, parse

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


def found(sass):
    return overwritten(parse(sass))


def test_a_product_that_runs_on_into_the_next_step_and_a_register_that_is_handed_out_again():
    (line,) = found(LOOP.format(loaded="R4", pending="0x1"))
    assert "0x1030" in line and "0xf40 FMUL R26" in line


def test_a_load_writes_four_registers():
    lines = found(LOOP.replace("R26", "R20").format(loaded="R24", pending="0x1"))
    assert len(lines) == 1 and "LDSM" in lines[0]
    assert not found(LOOP.replace("R26", "R20").format(loaded="R20", pending="0x1"))


@pytest.mark.parametrize(("code", "first"), [
    ("LDSM.16.MT88.4", 22), ("HMMA.16816.F32.BF16", 21), ("LDS.64", 23), ("I2F.F64", 23), ("DADD", 23),
    ("LDG.E.128", 21)])
def test_instructions_that_write_several_registers(code, first):
    for register, expected in ((first, 1), (first - 4, 0)):
        line = f"{code} R{register}, [R2]"
        assert len(found(LOOP.replace("FMUL R26, R26, R48", line).format(loaded="R4", pending="0x1"))) == expected


@pytest.mark.parametrize("branch", ["BRA.DIV UR4, 0x1070", "BRA P1, 0x1070", "@P2 BRA 0x1070", "CALL.REL.NOINC 0x1070"])
def test_a_way_that_may_not_be_taken_is_followed_too(branch):
    line = "@!P0 LDGSTS.E [R9+0xa000], desc[UR24][R4.64], !PT"
    assert len(found(LOOP.replace(line, branch).format(loaded="R4", pending="0x1"))) == 1
    assert not found(LOOP.replace(line, "BRA 0x1070").format(loaded="R4", pending="0x1"))


def test_a_wait_that_may_not_be_done_covers_nothing():
    sass = LOOP.replace("WARPGROUP.DEPBAR.LE gsb0, {pending}", "@P3 WARPGROUP.DEPBAR.LE gsb0, 0x0")
    assert found(sass.format(loaded="R4"))


def test_a_jump_to_somewhere_is_no_answer():
    with pytest.raises(ValueError, match="where it leads is not known"):
        found(LOOP.replace("@P1 BRA 0xf40", "BRX R4 -0x1000").format(loaded="R4", pending="0x1"))


def test_a_wait_for_all_products_is_enough():
    assert not found(LOOP.format(loaded="R4", pending="0x0"))


def test_a_wait_for_all_but_the_last_product_covers_the_one_before():
    """That of R36 is waited for after the next product, and written after the loop only."""
    assert not found(LOOP.replace("R26", "R38").format(loaded="R4", pending="0x1"))


def test_what_is_only_read_is_left_alone():
    reads = LOOP.replace("FMUL R26, R26, R48", "STS.64 [R26], R24").replace("FMUL R36", "STG.E desc[UR4][R36.64]")
    assert not found(reads.format(loaded="R4", pending="0x1"))
