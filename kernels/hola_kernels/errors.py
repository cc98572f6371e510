"""Errors a caller of hola_kernels can cause."""


class KernelError(ValueError):
    """An argument has a shape, dtype or value the operation does not take; the message names it."""
