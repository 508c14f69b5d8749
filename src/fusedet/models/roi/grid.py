"""Grid R-CNN's branch: boxes from heat maps of grid points, with the semantics of MMDetection 3.x.

References:
    "Grid R-CNN", Lu et al., 2019.
    "Grid R-CNN Plus: Faster and Better", Lu et al., 2019.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError
from fusedet.models.ops.layers import GroupNorm, conv, init_kaiming, init_prior_bias
from fusedet.models.ops.losses import mean_over_ranks
from fusedet.models.roi.pooling import LevelPooling, PoolingFactory, boxes_to_rois
from fusedet.models.roi.sampling import RoISamples
from fusedet.types import BatchDetections, Features, Levels, Losses, Target


class GridBranch(nn.Module):
    """Localize a regular grid of side x side points on an instance by heat maps, and build its box from them.

    Points are counted column by column: index x * side + y. The full map spans twice the RoI and has 4 * size cells per
    side; a point's heat map is the part of it, half as wide and high, where the point is expected (Plus, section 3.1).

    Args:
        levels: Levels of the pyramid.
        num_classes: Unused, the branch is class-agnostic.
        pooling: Makes the pooling of a size; `LevelPooling` by default.
        size: Size of the pooled features, in cells per side.
        side: Points along one side of the grid.
        convs: Number of 3x3 convolutions before the fusion, the first with stride 2.
        point_channels: Channels of each point's features.
        groups: Groups of their GroupNorm.
        radius: Radius of a point's target, in cells.
        jitter: In training, maximum change of an RoI's center and size, as a share of its size.
        num: RoIs of a batch to train on.
        weight: Weight of the loss, relative to the stage's.

    Raises:
        InputError: An option is out of its range.
    """

    corners: Tensor

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        pooling: PoolingFactory | None = None,
        size: int = 14,
        side: int = 3,
        convs: int = 8,
        point_channels: int = 64,
        groups: int = 36,
        radius: int = 1,
        jitter: float = 0.15,
        num: int = 192,
        weight: float = 15.0,
    ) -> None:
        super().__init__()
        if side < 2 or convs < 1:
            raise InputError(f"side={side} must be at least 2 and convs={convs} at least 1")
        if size < 2 or size % 2:
            raise InputError(f"size={size} must be even and at least 2: the first convolution halves it")
        if min(point_channels, groups, num) < 1 or jitter < 0 or radius < 0:
            raise InputError(
                f"point_channels={point_channels}, groups={groups}, num={num} must be at least 1, jitter={jitter} and "
                f"radius={radius} at least 0"
            )
        points = side * side
        channels = points * point_channels
        if channels % groups:
            raise InputError(f"groups={groups} must divide the channels, side * side * point_channels = {channels}")
        self.side, self.points, self.cells = side, points, 2 * size
        self.radius, self.jitter, self.num = radius, jitter, num
        self.loss_weights = {"loss_grid": weight}
        self.pooling = pooling(size) if pooling else LevelPooling(levels, size)
        layers: list[nn.Module] = []
        for i in range(convs):
            first = i == 0
            width = levels.channels[0] if first else channels
            layers += [conv(width, channels, 3, 2 if first else 1), GroupNorm(groups, channels), nn.ReLU(inplace=True)]
        self.convs = nn.Sequential(*layers)
        self.first_order, self.second_order = Transition(side, point_channels), Transition(side, point_channels)
        self.up = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1, groups=points)
        self.norm = GroupNorm(points, channels)
        self.heat = nn.ConvTranspose2d(channels, points, 4, stride=2, padding=1, groups=points)
        # where each point's heat map begins in the full map: at its start, a quarter before the point, or at its middle
        starts = [0, *(max(int((i / (side - 1) - 0.25) * 2 * self.cells), 0) for i in range(1, side - 1)), self.cells]
        corners = torch.cartesian_prod(torch.tensor(starts), torch.tensor(starts))  # (P, 2) as x, y
        self.register_buffer("corners", corners, persistent=False)
        init_kaiming(self.convs)
        for layer in (self.up, self.heat):
            nn.init.normal_(layer.weight, std=0.001)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        init_prior_bias(self.heat.bias, 0.01)

    def forward(self, features: Features, rois: Tensor) -> Tensor:
        """Compute the logits of every point's heat map.

        Shape:
            features: levels (N, C, H, W); rois (M, 5), index of the image in the batch, then a box in pixels; result
            (M, P, 2 * size, 2 * size).
        """
        return self.heat_maps(self.fuse(self.convs(self.pooling(features, rois))))

    def fuse(self, x: Tensor) -> Tensor:
        """Add to each point's features (M, P * c, h, w) those of its neighbors, in two orders (section 3.3)."""
        return self.second_order(x, self.first_order(x, x))

    def heat_maps(self, x: Tensor) -> Tensor:
        """Compute the logits of heat maps (M, P, 4 * h, 4 * w) from point features (M, P * c, h, w)."""
        return self.heat(F.relu(self.norm(self.up(x))))

    def loss(self, features: Features, samples: RoISamples, targets: Sequence[Target], sizes: Tensor) -> Losses:
        """Compute the binary cross-entropy of the heat maps with and without fusion.

        Each is the mean over `num` random positive samples, jittered, and their cells; the number of samples is
        averaged over ranks. The loss is 0 without positives.

        Shape:
            sizes (N, 2), height and width of the images.
        """
        chosen = torch.randperm(len(samples.positive), device=samples.instances.device)[: self.num]  # (R,)
        rows, gt_boxes = samples.positive[chosen], samples.gather(targets)[0][chosen]
        rois = samples.rois[rows].float()
        boxes = self.jitter_boxes(rois[:, 1:], sizes[samples.image[rows]])
        wanted = self.target_heat_maps(boxes, gt_boxes)
        x = self.convs(self.pooling(features, torch.cat([rois[:, :1], boxes], dim=1)))
        losses = [
            F.binary_cross_entropy_with_logits(self.heat_maps(y).float(), wanted, reduction="sum")
            for y in (self.fuse(x), x)
        ]
        count = mean_over_ranks(wanted.new_full((), len(wanted))) * self.points * self.cells**2
        return {"loss_grid": sum(losses, wanted.new_zeros(())) / count}

    def jitter_boxes(self, boxes: Tensor, sizes: Tensor) -> Tensor:
        """Change the centers and sizes of boxes (R, 4) at random, inside images of sizes (R, 2) less one pixel."""
        change = (2 * torch.rand_like(boxes) - 1) * self.jitter
        wh = boxes[:, 2:] - boxes[:, :2]
        center = (boxes[:, :2] + boxes[:, 2:]) / 2 + wh * change[:, :2]
        half = wh * (1 + change[:, 2:]) / 2
        limit = (sizes.flip(1) - 1).repeat(1, 2).to(boxes.dtype)  # (R, 4)
        return torch.minimum(torch.cat([center - half, center + half], dim=1).clamp(min=0), limit)

    @torch.no_grad()
    def target_heat_maps(self, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        """Compute the target heat maps: 1 within `radius` of a point, else 0.

        RoIs whose doubled width or height is at most `side` pixels have no points.

        Shape:
            boxes (R, 4) of the RoIs; gt_boxes (R, 4) of their instances; result (R, P, cells, cells).
        """
        wh = boxes[:, 2:] - boxes[:, :2]
        low, high = boxes[:, :2] - wh / 2, boxes[:, 2:] + wh / 2
        span = high - low  # (R, 2), of the full map
        # 1 at the left or upper side of an instance, 0 at the opposite one
        part = 1 - torch.arange(self.side, device=boxes.device) / (self.side - 1)
        lines = part[:, None] * gt_boxes[:, None, :2] + (1 - part[:, None]) * gt_boxes[:, None, 2:]  # (R, side, 2)
        cells = ((lines - low[:, None]) / span[:, None] * 2 * self.cells).trunc()  # of the full map
        # (R, P), in cells of the point's own map
        xs = cells[:, :, 0].repeat_interleave(self.side, dim=1) - self.corners[:, 0]
        ys = cells[:, :, 1].repeat(1, self.side) - self.corners[:, 1]
        cell = torch.arange(self.cells, device=boxes.device)
        square = (cell[:, None] - ys[..., None, None]) ** 2 + (cell - xs[..., None, None]) ** 2  # (R, P, cells, cells)
        large = (span > self.side).all(dim=1)[:, None, None, None]
        return ((square <= self.radius**2) & large).to(boxes.dtype)

    def decode(self, logits: Tensor, boxes: Tensor) -> Tensor:
        """Decode heat maps to boxes, which may reach outside the image.

        A point lies at its map's maximum. A side is the mean of its points, weighted with their probabilities (eq. 3).

        Shape:
            logits (M, P, cells, cells); boxes (M, 4) of the RoIs; result (M, 4).
        """
        score, index = logits.float().flatten(2).sigmoid().max(dim=2)  # (M, P)
        cell = torch.stack([index % self.cells, index // self.cells], dim=2) + self.corners  # x, y in the full map
        wh = (boxes[:, 2:] - boxes[:, :2])[:, None]
        points = (cell + 0.5) / self.cells * wh + boxes[:, None, :2] - wh / 2  # (M, P, 2)
        grid = points.unflatten(1, (self.side, self.side))  # (M, x, y, 2)
        weight = score.unflatten(1, (self.side, self.side))  # (M, x, y)
        sides = [
            (grid[:, 0, :, 0], weight[:, 0]),
            (grid[:, :, 0, 1], weight[:, :, 0]),
            (grid[:, -1, :, 0], weight[:, -1]),
            (grid[:, :, -1, 1], weight[:, :, -1]),
        ]
        return torch.stack([(place * share).sum(dim=1) / share.sum(dim=1) for place, share in sides], dim=1)

    def refine(self, features: Features, detections: BatchDetections) -> BatchDetections:
        """Replace the boxes of detections by those of their grid points; scores and order stay."""
        boxes = self.decode(self(features, boxes_to_rois(detections.boxes)), detections.boxes.flatten(0, 1).float())
        return detections._replace(boxes=boxes.unflatten(0, detections.labels.shape))


class Transition(nn.Module):
    """One order of feature fusion: each point receives its neighbors' features (section 3.3).

    Each edge of the grid has a 5x5 and a 1x1 convolution of its own. All edges, ordered by their target point, are
    groups of one depth-wise and one grouped convolution.

    Args:
        side: Points along one side of the grid.
        channels: Channels of each point's features.
    """

    sources: Tensor

    def __init__(self, side: int, channels: int) -> None:
        super().__init__()
        neighbors = [_neighbors(i // side, i % side, side) for i in range(side * side)]
        edges = sum(map(len, neighbors))
        self.degrees = [len(n) for n in neighbors]
        # single channels, not points: a selection of points may have a layout whose points and channels no view joins
        sources = torch.tensor([s for n in neighbors for s in n])[:, None] * channels + torch.arange(channels)
        self.register_buffer("sources", sources.flatten(), persistent=False)  # (E * c,)
        self.depthwise = nn.Conv2d(edges * channels, edges * channels, 5, padding=2, groups=edges * channels)
        self.pointwise = nn.Conv2d(edges * channels, edges * channels, 1, groups=edges)
        for layer in (self.depthwise, self.pointwise):
            for edge in layer.weight.chunk(edges):  # each edge is initialized like a convolution of its own
                nn.init.kaiming_normal_(edge, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor, neighbors: Tensor) -> Tensor:
        """Add the convolved features of each point's neighbors to its features.

        Shape:
            features (M, P * c, h, w); neighbors (M, P * c, h, w), the source of the neighbors' features; result
            (M, P * c, h, w).
        """
        sent = self.pointwise(self.depthwise(neighbors[:, self.sources])).unflatten(1, (sum(self.degrees), -1))
        return features + torch.cat([part.sum(dim=1) for part in sent.split(self.degrees, dim=1)], dim=1)


def _neighbors(x: int, y: int, side: int) -> list[int]:
    """Return the indices of the points left of, above, below and right of (x, y) that exist."""
    candidates = [(x - 1, y), (x, y - 1), (x, y + 1), (x + 1, y)]
    return [a * side + b for a, b in candidates if 0 <= a < side and 0 <= b < side]
