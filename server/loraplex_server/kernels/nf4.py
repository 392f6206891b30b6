"""The seam through which the model uses NF4 matrices."""

from loraplex_server.kernels.nf4_weight import Nf4FormatError, Nf4Weight

__all__ = ["Nf4FormatError", "Nf4Weight"]
