"""Limits of the delta rule's Triton kernels, for plans and recipe checks, which import no torch.

tests/plan compares these with the kernels' own.
"""

KERNEL_WIDTHS = (64, 128, 256)  # key and value widths of a head
KERNEL_TAPS = 4                 # maximum width of the short convolution, in tokens
CHUNK = 64                      # tokens per chunk of the state kernels
SAVED_STATE_WIDTH = 128                # the forward pass saves chunk states up to this width, in 16 bits
