"""`python -m fusedet.cli`, for launchers such as torchrun."""

from fusedet.cli import main

main()
