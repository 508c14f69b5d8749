"""The command line as a module: python -m fusedet.cli, which torchrun can start."""

import sys

from fusedet.cli import run

sys.exit(run())
