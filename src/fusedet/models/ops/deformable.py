"""Deformable convolutions.

References:
    "Deformable Convolutional Networks", Dai et al., 2017 (v1).
    "Deformable ConvNets v2: More Deformable, Better Results", Zhu et al., 2019 (v2, modulated).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from fusedet.errors import InputError
from fusedet.models.ops.autocast import without_autocast
from fusedet.models.ops.cells import sample_cells
from fusedet.models.ops.exporting import is_exporting


class DeformConv(nn.Module):
    """Deformable convolution with given offsets; keeps the size at stride 1.

    It computes in float32, the only type that the sampling kernels support; the result has the input's type.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        kernel: Side of the kernel, odd.
        stride: Of the convolution.
        groups: Of the convolution, as in `nn.Conv2d`.
        dilation: Distance of the kernel points, in cells.
        bias: Add a bias.

    Attributes:
        weight: (outputs, inputs / groups, kernel, kernel).
        bias: (outputs,) or None.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels, self.kernel, self.stride, self.dilation = outputs, kernel, stride, dilation
        self.padding = dilation * (kernel // 2)
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, kernel, kernel))
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs)) if bias else None)
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolve at the sampling points moved by `offset`, the samples scaled by `mask`.

        Shape:
            x (N, C, H, W); offset (N, G * 2 * kernel^2, H', W'), in cells, (dy, dx) pairs row by row for each of G
            groups of channels; mask (N, G * kernel^2, H', W') or None; result (N, outputs, H', W').
        """
        bias = None if self.bias is None else self.bias.float()
        # both compute the same: on a CPU torchvision's kernel is slower than sampling rows (benchmarks/operators.py)
        convolve = deform_conv2d_by_rows if x.device.type == "cpu" else deform_conv2d
        if is_exporting():
            convolve = deform_conv2d_by_grid
        with without_autocast(x):
            y = convolve(
                x.float(),
                offset.float(),
                self.weight.float(),
                bias,
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                mask=None if mask is None else mask.float(),
            )
        return y.to(x.dtype)


class DeformPack(DeformConv):
    """Deformable convolution that predicts its own offsets and, where `modulated`, its mask.

    It starts as the plain convolution, times 0.5 where modulated: the sigmoid of 0.

    Args:
        inputs: As in `DeformConv`.
        outputs: As in `DeformConv`.
        kernel: As in `DeformConv`.
        stride: As in `DeformConv`.
        groups: As in `DeformConv`.
        dilation: As in `DeformConv`.
        bias: As in `DeformConv`.
        modulated: Predict a mask too (DCNv2).
        offset_groups: Groups of input channels with offsets of their own.

    Raises:
        InputError: The groups do not divide the input channels.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        bias: bool = False,
        modulated: bool = False,
        offset_groups: int = 1,
    ) -> None:
        if inputs % offset_groups:
            raise InputError(
                f"a deformable convolution needs input channels in multiples of {offset_groups}, got {inputs}"
            )
        super().__init__(inputs, outputs, kernel, stride, groups, dilation, bias)
        self.modulated, self.points = modulated, offset_groups * kernel**2
        self.offset = nn.Conv2d(inputs, (3 if modulated else 2) * self.points, kernel, stride, self.padding, dilation)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Convolve x (N, C, H, W) to (N, outputs, H', W'); offset and mask are predicted from x."""
        offset = self.offset(x)
        if self.modulated:
            offset, logits = offset.split([2 * self.points, self.points], dim=1)
            mask = logits.sigmoid()
        return super().forward(x, offset, mask)


def offset_convolutions(module: nn.Module) -> set[nn.Module]:
    """Return the convolutions inside a module that predict offsets."""
    return {m.offset for m in module.modules() if isinstance(m, DeformPack)}


def deform_conv2d_by_rows(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute `torchvision.ops.deform_conv2d` of square kernels by torch's own operations.

    A feature map in channels_last is a table of rows of C numbers, and a sample is a weighted sum of four rows: an
    embedding bag. The samples, 9 C numbers per cell for a 3x3 kernel, are saved for the backward pass.

    Shape:
        x (N, C, H, W); offset (N, 2 * G * kernel^2, H', W'), G offset groups, per kernel point dy and dx in cells;
        weight (outputs, C / groups, kernel, kernel); bias (outputs,); mask (N, G * kernel^2, H', W'); result (N,
        outputs, H', W').
    """
    kernel, groups = weight.shape[-1], x.shape[1] // weight.shape[1]
    offset_groups, parts = split_offset_groups(x, offset, mask, kernel)
    samples = sample_rows(*parts, kernel, stride, padding, dilation)  # (N * G, H' * W', K, C / G)
    samples = samples.unflatten(0, (-1, offset_groups)).permute(0, 2, 3, 1, 4).flatten(3)  # (N, H' * W', K, C)
    if groups == 1:
        out = samples.flatten(2) @ weight.permute(2, 3, 1, 0).flatten(0, 2)  # (N, H' * W', outputs)
    else:
        # (groups, N * H' * W', K * C / groups) and (groups, K * C / groups, outputs / groups)
        columns = samples.unflatten(3, (groups, -1)).permute(3, 0, 1, 2, 4).flatten(3).flatten(1, 2)
        weights = weight.unflatten(0, (groups, -1)).permute(0, 3, 4, 2, 1).flatten(1, 3)
        out = (columns @ weights).transpose(0, 1).flatten(1).unflatten(0, samples.shape[:2])
    if bias is not None:
        out = out + bias
    return out.transpose(1, 2).unflatten(2, offset.shape[2:])


def split_offset_groups(
    x: Tensor, offset: Tensor, mask: Tensor | None, kernel: int
) -> tuple[int, tuple[Tensor, Tensor, Tensor | None]]:
    """Make images of the groups of channels that have offsets of their own: their number G, and x, offset and mask.

    Shape:
        x (N, C, H, W) to (N * G, C / G, H, W); offset and mask likewise.
    """
    number = offset.shape[1] // (2 * kernel**2)
    if number == 1:
        return 1, (x, offset, mask)
    split = [None if part is None else part.unflatten(1, (number, -1)).flatten(0, 1) for part in (x, offset, mask)]
    return number, (split[0], split[1], split[2])  # type: ignore[return-value]


def sample_rows(
    x: Tensor, offset: Tensor, mask: Tensor | None, kernel: int, stride: int, padding: int, dilation: int
) -> Tensor:
    """Sample x bilinearly at every cell's kernel points plus offsets, 0 outside the map.

    Shape:
        x (N, C, H, W); offset (N, 2 * kernel^2, H', W'), per kernel point dy and dx in cells; mask (N, kernel^2, H',
        W'); result (N, H' * W', kernel^2, C).
    """
    (n, channels, height, width), (rows, columns) = x.shape, offset.shape[2:]
    steps = torch.arange(kernel, device=x.device) * dilation - padding
    moves = offset.unflatten(1, (-1, 2)).permute(2, 0, 3, 4, 1)  # (2, N, H', W', K), dy and dx
    y = moves[0] + (torch.arange(rows, device=x.device) * stride)[:, None, None] + steps.repeat_interleave(kernel)
    x_ = moves[1] + (torch.arange(columns, device=x.device) * stride)[:, None] + steps.repeat(kernel)
    top, left = y.detach().floor(), x_.detach().floor()
    first = (torch.arange(n, device=x.device) * height * width)[:, None, None, None]  # of each image's rows
    indices, weights_of_corners = [], []
    for i, weight_y in ((top, top + 1 - y), (top + 1, y - top)):
        for j, weight_x in ((left, left + 1 - x_), (left + 1, x_ - left)):
            inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
            # a NaN offset may index any cell: its weight is NaN too
            cell = i.nan_to_num().clamp(0, height - 1) * width + j.nan_to_num().clamp(0, width - 1)
            indices.append(cell.long() + first)
            weights_of_corners.append(weight_y * weight_x * inside)
    corner_weights = torch.stack(weights_of_corners, dim=-1)  # (N, H', W', K, 4)
    if mask is not None:
        corner_weights = corner_weights * mask.permute(0, 2, 3, 1)[..., None]
    table = x.permute(0, 2, 3, 1).reshape(-1, channels)
    samples = F.embedding_bag(
        torch.stack(indices, dim=-1).view(-1, 4), table, mode="sum", per_sample_weights=corner_weights.view(-1, 4)
    )
    return samples.view(n, rows * columns, kernel**2, channels)


def deform_conv2d_by_grid(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute what `deform_conv2d_by_rows` does by `sample_cells`, which all exported formats have.

    OpenVINO reads neither an embedding bag nor ONNX's DeformConv.
    """
    kernel, groups = weight.shape[-1], x.shape[1] // weight.shape[1]
    offset_groups, (x, offset, mask) = split_offset_groups(x, offset, mask, kernel)
    rows, columns = offset.shape[2:]
    steps = torch.arange(kernel, device=x.device) * dilation - padding
    moves = offset.unflatten(1, (-1, 2)).permute(2, 0, 1, 3, 4)  # (2, N, K, H', W'), dy and dx
    down = steps.expand(kernel, kernel).mT.flatten()  # repeat_interleave is not exported to ONNX by torch 2.6
    tall = (torch.arange(rows, device=x.device) * stride)[:, None] + down[:, None, None]
    wide = torch.arange(columns, device=x.device) * stride + steps.repeat(kernel)[:, None, None]
    # (N * G, C / G, K, H' * W')
    samples = sample_cells(x, (moves[1] + wide).flatten(2), (moves[0] + tall).flatten(2))
    if mask is not None:
        samples = samples * mask.flatten(2)[:, None]
    samples = samples.unflatten(0, (-1, offset_groups)).flatten(1, 2)  # (N, C, K, H' * W')
    samples = samples.unflatten(1, (groups, -1)).flatten(2, 3)  # (N, groups, C / groups * K, H' * W')
    weights = weight.flatten(2).unflatten(0, (groups, -1)).flatten(2)  # (groups, outputs / groups, C / groups * K)
    out = (weights @ samples).flatten(1, 2).unflatten(2, (rows, columns))
    return out if bias is None else out + bias[:, None, None]
