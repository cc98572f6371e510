"""What flash attention over documents takes, for recipe checks, which import no torch.

tests/layers compares these with hola_kernels' own.
"""

FLASH_WIDTH = 256   # width of a head at most
FLASH_MULTIPLE = 8  # and what it is a multiple of
