"""TridentNet's blocks: parallel branches that share all weights and differ in the dilation of their 3x3 convolutions.

References:
    "Scale-Aware Trident Networks for Object Detection", Li et al., 2019, section 3.2 and figure 2.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError
from fusedet.models.backbones.stages import replace_convolutions


class BranchCopies(nn.Module):
    """Repeat a batch once per branch in train mode; keep it in eval mode, where one branch runs.

    Args:
        branches: B, the number of branches.
        branch: The branch that runs in eval mode; None for all, also there.
    """

    def __init__(self, branches: int, branch: int | None) -> None:
        super().__init__()
        self.branches, self.branch = branches, branch

    def forward(self, x: Tensor) -> Tensor:
        """Repeat x (N, ...) to (B * N, ...), all images of the first branch first."""
        return torch.cat([x] * self.branches) if self.training or self.branch is None else x


class TridentConv(nn.Conv2d):
    """A 3x3 convolution that applies its one weight with the dilation of each branch.

    Args:
        conv: The convolution that it replaces; it keeps its weight.
        dilations: B dilations, one per branch.
        branch: The branch that runs in eval mode; None for all, also there.
    """

    def __init__(self, conv: nn.Conv2d, dilations: Sequence[int], branch: int | None) -> None:
        size = conv.kernel_size
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            groups=conv.groups,
            bias=conv.bias is not None,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        self.load_state_dict(conv.state_dict())
        self.dilations, self.branch = tuple(dilations), branch

    def forward(self, x: Tensor) -> Tensor:
        """Convolve each branch of x (B * N, C, H, W), or, in eval mode with a chosen branch, x (N, C, H, W)."""
        if self.training or self.branch is None:
            branches = x.chunk(len(self.dilations))
            return torch.cat([self._dilated(own, d) for own, d in zip(branches, self.dilations)])
        return self._dilated(x, self.dilations[self.branch])

    def _dilated(self, x: Tensor, dilation: int) -> Tensor:
        padding = dilation * (self.kernel_size[0] // 2)
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, dilation, self.groups)


class BranchedStage(nn.Sequential):
    """The blocks of the first trident stage, on copies of its input; the blocks keep their names."""

    def __init__(self, blocks: nn.Module, copies: BranchCopies) -> None:
        super().__init__(OrderedDict(blocks.named_children()))
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        """Compute x (N, C, H, W) to (B * N, C', H', W') in train mode, to (N, C', H', W') in eval mode."""
        x = self.copies(x)
        for block in self.children():
            x = block(x) if block is not self.copies else x
        return x


def make_trident(
    model: nn.Module,
    stages: dict[int, list[nn.Module]],
    name: str,
    dilations: Sequence[int],
    branch: int | None,
) -> BranchCopies:
    """Make these stages trident stages; their weights stay.

    Args:
        model: The timm model.
        stages: The modules of each stage, by ResNet's layer numbers.
        name: Name of the model in messages.
        dilations: Dilation of each branch.
        branch: The branch that runs in eval mode; None for all.

    Returns:
        The module that repeats the maps of earlier stages.

    Raises:
        InputError: An option is out of its range, or a stage has no blocks of a ResNet.
    """
    if len(dilations) < 2 or min(dilations) < 1:
        raise InputError(f"trident_dilations={list(dilations)} must be two or more numbers from 1")
    if branch is not None and not 0 <= branch < len(dilations):
        raise InputError(
            f"trident_branch={branch} must be 0 to {len(dilations) - 1}, a branch of trident_dilations, or null: all"
        )
    if sorted(stages) != list(range(min(stages), max(stages) + 1)):
        raise InputError(f"trident_stages={sorted(stages)} must be consecutive stages")
    replace_convolutions(stages, name, "trident_stages", lambda conv: TridentConv(conv, dilations, branch))
    copies = BranchCopies(len(dilations), branch)
    first: Any = stages[min(stages)][-1]
    key = next(key for key, module in model.named_children() if module is first)
    setattr(model, key, BranchedStage(first, copies))
    return copies
