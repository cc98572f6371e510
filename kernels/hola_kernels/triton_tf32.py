"""Numbers that a product in tf32 takes as they are.

A tensor core's tf32 product cuts 13 bits off its operands, which makes everything a little too small: 2.6e-3 after 16
maps multiplied one by another. Operands rounded to the nearest number that is kept are off by no more, and evenly so.
"""

import triton
import triton.language as tl


@triton.jit
def nearest_tf32(x):
    """x float32, rounded to 10 bits of mantissa (halves away from zero); what is no number stays none."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # the bits of a NaN may be all ones, and would run over
