"""``python -m teco_kernels``: the command `teco-kernels`."""

from teco_kernels.cli import main

main()
