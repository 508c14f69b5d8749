"""torch's deterministic algorithms, with which a GPU computes the same numbers twice."""

import contextlib
import os
from collections.abc import Iterator

import torch

from fusedet.errors import InputError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
REFUSED = "does not have a deterministic implementation"  # torch's words


@contextlib.contextmanager
def enable_determinism(wanted: bool) -> Iterator[None]:
    """Let torch use deterministic algorithms only, inside the block and if wanted. On a CPU little changes.

    Enter it before the GPU is used, because cuBLAS reads its variable once.

    Raises:
        InputError: An operation has no deterministic algorithm.
    """
    if not wanted:
        yield
        return
    cudnn, variable = torch.backends.cudnn, os.environ.get(WORKSPACE)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark
    os.environ[WORKSPACE] = variable or ":4096:8"
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if REFUSED not in str(error):
            raise
        name = str(error).split(REFUSED)[0].split()[-1]
        raise InputError(
            f"train.deterministic=true: torch has no deterministic {name} on this device, use a model without it, "
            "or leave the key out"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = flags
        if variable is None:
            os.environ.pop(WORKSPACE, None)
