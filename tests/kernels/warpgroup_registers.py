"""Finds products of Hopper's tensor cores whose register operand is written while they may still run.

A warp group's product (HGMMA) runs on while its warps go on. One that takes its left operand from registers reads them
until it is done, so nothing may write these registers before a wait (WARPGROUP.DEPBAR) that covers the product. Triton
3.6 and 3.7 leave such a product running into a loop's next step, where its registers are handed out again
(triton-lang/triton issue 9433): seen on an H200 with triton 3.7.1 as rows of NaN in one of fifty backward passes while
other processes kept the tensor cores busy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str  # without its predicate
    conditional: bool

    @property
    def code(self) -> str:
        return self.text.split()[0]


def overwritten(program: list[Instruction]) -> list[str]:
    """A line for every register operand of a product that is written too early."""
    return [line for at, instruction in enumerate(program) if register_operand(instruction)
            for line in _first_writes(program, at)]


def parse(sass: str) -> list[Instruction]:
    """What `cuobjdump -sass` printed of one kernel."""
    found = []
    for line in sass.splitlines():
        matched = INSTRUCTION.match(line)
        if matched:
            text = matched[2]
            predicate = re.match(r"@!?U?P[0-9T]+\s+", text)
            found.append(Instruction(int(matched[1], 16), text[predicate.end():] if predicate else text,
                                     predicate is not None))
    return found


def register_operand(instruction: Instruction) -> frozenset[int]:
    """The registers of a product's left operand; none if it lies in shared memory. Four of 16-bit or tf32 numbers."""
    matched = re.match(r"HGMMA\S*\s+R\d+, R(\d+)(?:\.reuse)?,", instruction.text)
    return frozenset(range(int(matched[1]), int(matched[1]) + 4)) if matched else frozenset()


def _first_writes(program: list[Instruction], product: int) -> list[str]:
    """Follows every way on from the product until a wait covers it."""
    registers, index_of = register_operand(program[product]), {x.address: i for i, x in enumerate(program)}
    # (instruction, is the product's group closed, groups closed after it)
    open_ways, seen, found = [(product, False, 0)], set(), []
    while open_ways:
        way = at, closed, after = open_ways.pop()
        if way in seen:
            continue
        seen.add(way)
        instruction = program[at]
        if instruction.code.startswith("HGMMA") and "gsb0" in instruction.text:
            closed, after = True, min(after + closed, 8)
        waited = re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)", instruction.text)
        if waited and not instruction.conditional and closed and after >= int(waited[1]):
            continue
        if at != product and registers & written(instruction):
            found.append(f"{program[product].address:#x} {program[product].text}: R{min(registers)} and on written at "
                         f"{instruction.address:#x} {instruction.text}")
            continue
        open_ways += [(index_of[address], closed, after) for address in ways_on(program, at)]
    return found


def ways_on(program: list[Instruction], at: int) -> list[int]:
    """Addresses that may come next. A called function is looked into and passed by. ValueError: a jump to somewhere."""
    instruction = program[at]
    code, _, rest = instruction.text.partition(" ")
    following = [x.address for x in program[at + 1: at + 2]]
    if code.startswith(("EXIT", "RET")):
        return following if instruction.conditional else []
    if not code.startswith(("BRA", "BRX", "JMP", "JMX", "CALL")) or code.startswith("BREAK"):
        return following
    target = re.search(r"(?:^|[ ,])0x([0-9a-f]+)$", rest.strip())
    if not target or code.startswith(("BRX", "JMX")):
        raise ValueError(f"{instruction.address:#x} {instruction.text}: where it leads is not known")
    always = re.fullmatch(r"0x[0-9a-f]+", rest.strip()) and not instruction.conditional and not code.startswith("CALL")
    return [int(target[1], 16)] + ([] if always else following)


def written(instruction: Instruction) -> frozenset[int]:
    """Registers that an instruction writes; accumulators of products aside, which Triton's waits do cover."""
    code, _, rest = instruction.text.partition(" ")
    if code.startswith(("HGMMA", "ST", "RED", "BAR", "WARPGROUP", "UTMA")):
        return frozenset()
    operands = [x.strip() for x in rest.split(",")]
    if re.fullmatch(r"P\d|PT", operands[0]) and len(operands) > 1:
        operands = operands[1:]
    matched = re.fullmatch(r"R(\d+)(?:\.\w+)?", operands[0])
    if not matched:
        return frozenset()
    count = 1
    if re.search(r"\.128|\.MT?88\.4|^[HIQ]MMA", code):
        count = 4
    elif re.search(r"\.64|WIDE|CS2R|\.MT?88\.2|F64|^D[A-Z]+|LEPC", code):
        count = 2
    return frozenset(range(int(matched[1]), int(matched[1]) + count))
