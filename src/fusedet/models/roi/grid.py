"""Grid R-CNN's branch: "Grid R-CNN", Lu et al., 2019, and "Grid R-CNN Plus", 2019, with the semantics of MMDetection 3.x."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError
from fusedet.models.ops.layers import GroupNorm, conv, kaiming, start_at
from fusedet.models.ops.losses import mean_over_ranks
from fusedet.models.roi.pooling import LevelPooling, PoolingFactory, boxes_to_rois
from fusedet.models.roi.sampling import RoISamples
from fusedet.types import BatchDetections, Features, Levels, Losses, Target


class GridBranch(nn.Module):
    """Finds side x side points of a regular grid on the object, each in a heat map of its own, and makes the box of them.

    Points are counted column by column: number x * side + y. The whole map spans twice the region and has 4 * size cells a side;
    a point's heat map is the part of it, half as wide and high, where the point is to be expected (Plus, 3.1).

    levels: of the pyramid. num_classes: not used, the branch knows no classes. pooling: makes the pooling of a size, `LevelPooling` by
    default. size: of the pooled features, in cells a side. side: points along one side of the grid. convs: 3x3 convolutions before
    the fusion, the first with stride 2. point_channels: of each point's features. groups: of their GroupNorm.
    radius: of the cells around a point that are its target, in cells. jitter: in training a region's centre and size change by up
    to this share of its size. num: regions of a batch that are trained on. weight: of the loss in the total.
    """

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
        # where each point's heat map begins in the whole map: at its start, a quarter before the point, or at its middle
        starts = [0, *(max(int((i / (side - 1) - 0.25) * 2 * self.cells), 0) for i in range(1, side - 1)), self.cells]
        corners = torch.cartesian_prod(torch.tensor(starts), torch.tensor(starts))  # (P, 2) as x, y
        self.register_buffer("corners", corners, persistent=False)
        kaiming(self.convs)
        for layer in (self.up, self.heat):
            nn.init.normal_(layer.weight, std=0.001)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        start_at(self.heat.bias, 0.01)

    corners: Tensor

    def forward(self, features: Features, rois: Tensor) -> Tensor:
        """Levels (N, C, H, W) and rois (M, 5) to the logits of every point's heat map (M, P, 2 * size, 2 * size)."""
        return self.maps(self.fuse(self.convs(self.pooling(features, rois))))

    def fuse(self, x: Tensor) -> Tensor:
        """Each point's features (M, P * c, h, w) with those of its neighbours, and of theirs (3.3)."""
        return self.second_order(x, self.first_order(x, x))

    def maps(self, x: Tensor) -> Tensor:
        """Point features (M, P * c, h, w) to the logits of heat maps (M, P, 4 * h, 4 * w)."""
        return self.heat(F.relu(self.norm(self.up(x))))

    def loss(self, features: Features, samples: RoISamples, targets: Sequence[Target], sizes: Tensor) -> Losses:
        """Binary cross-entropy of fused and of unfused heat maps, each the mean over `num` positive samples, jittered, and their
        cells; the number of samples is averaged over ranks.

        sizes (N, 2): of the images. Chance is torch's. Zero where no sample is positive.
        """
        chosen = torch.randperm(len(samples.positive), device=samples.owners.device)[: self.num]  # (R,)
        rows, objects = samples.positive[chosen], samples.objects(targets)[0][chosen]
        rois = samples.rois[rows].float()
        boxes = self.jittered(rois[:, 1:], sizes[samples.image[rows]])
        wanted = self.wanted(boxes, objects)
        x = self.convs(self.pooling(features, torch.cat([rois[:, :1], boxes], dim=1)))
        costs = [
            F.binary_cross_entropy_with_logits(self.maps(y).float(), wanted, reduction="sum") for y in (self.fuse(x), x)
        ]
        count = mean_over_ranks(wanted.new_tensor(len(wanted))) * self.points * self.cells**2
        return {"loss_grid": sum(costs, wanted.new_zeros(())) / count}

    def jittered(self, boxes: Tensor, sizes: Tensor) -> Tensor:
        """Boxes (R, 4), each with its centre and size changed at random, inside images of sizes (R, 2) less one pixel."""
        change = (2 * torch.rand_like(boxes) - 1) * self.jitter
        wh = boxes[:, 2:] - boxes[:, :2]
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + wh * change[:, :2]
        half = wh * (1 + change[:, 2:]) / 2
        limit = (sizes.flip(1) - 1).repeat(1, 2).to(boxes.dtype)  # (R, 4)
        return torch.minimum(torch.cat([centre - half, centre + half], dim=1).clamp(min=0), limit)

    @torch.no_grad()
    def wanted(self, boxes: Tensor, objects: Tensor) -> Tensor:
        """The heat maps (R, P, cells, cells) that boxes (R, 4) should give of objects (R, 4): 1 within `radius` of a point, else 0.

        Boxes whose doubled width or height is at most `side` pixels have no points.
        """
        wh = boxes[:, 2:] - boxes[:, :2]
        low, high = boxes[:, :2] - wh / 2, boxes[:, 2:] + wh / 2
        span = high - low  # (R, 2), of the whole map
        part = 1 - torch.arange(self.side, device=boxes.device) / (
            self.side - 1
        )  # 1 at an object's left or upper side, 0 at the other
        lines = part[:, None] * objects[:, None, :2] + (1 - part[:, None]) * objects[:, None, 2:]  # (R, side, 2)
        places = ((lines - low[:, None]) / span[:, None] * 2 * self.cells).trunc()  # in cells of the whole map
        xs = (
            places[:, :, 0].repeat_interleave(self.side, dim=1) - self.corners[:, 0]
        )  # (R, P), in cells of the point's own map
        ys = places[:, :, 1].repeat(1, self.side) - self.corners[:, 1]
        cell = torch.arange(self.cells, device=boxes.device)
        square = (cell[:, None] - ys[..., None, None]) ** 2 + (cell - xs[..., None, None]) ** 2  # (R, P, cells, cells)
        large = (span > self.side).all(dim=1)[:, None, None, None]
        return ((square <= self.radius**2) & large).to(boxes.dtype)

    def decode(self, logits: Tensor, boxes: Tensor) -> Tensor:
        """Heat maps (M, P, cells, cells) of regions with boxes (M, 4) to better boxes (M, 4), which may reach outside the image.

        Each point is where its map is highest; a side is the mean of its points, weighted by their probabilities (eq. 3).
        """
        score, place = logits.float().flatten(2).sigmoid().max(dim=2)  # (M, P)
        at = (
            torch.stack([place % self.cells, place // self.cells], dim=2) + self.corners
        )  # (M, P, 2) as x, y in the whole map
        wh = (boxes[:, 2:] - boxes[:, :2])[:, None]
        points = (at + 0.5) / self.cells * wh + boxes[:, None, :2] - wh / 2
        grid, weight = (
            points.unflatten(1, (self.side, self.side)),
            score.unflatten(1, (self.side, self.side)),
        )  # (M, x, y[, 2])
        sides = [
            (grid[:, 0, :, 0], weight[:, 0]),
            (grid[:, :, 0, 1], weight[:, :, 0]),
            (grid[:, -1, :, 0], weight[:, -1]),
            (grid[:, :, -1, 1], weight[:, :, -1]),
        ]
        return torch.stack([(place * share).sum(dim=1) / share.sum(dim=1) for place, share in sides], dim=1)

    def refine(self, features: Features, found: BatchDetections) -> BatchDetections:
        """Detections with the boxes that their grid points make; scores and order stay."""
        boxes = self.decode(self(features, boxes_to_rois(found.boxes)), found.boxes.flatten(0, 1).float())
        return found._replace(boxes=boxes.unflatten(0, found.labels.shape))


class Transition(nn.Module):
    """One order of feature fusion (3.3): to each point's features come those of its neighbours, each through a 5x5 and a 1x1 of its own.

    All edges of the grid, in the order of the point that they lead to, are groups of one depth-wise and one grouped convolution.
    """

    sources: Tensor

    def __init__(self, side: int, channels: int) -> None:
        super().__init__()
        neighbours = [_neighbours(i // side, i % side, side) for i in range(side * side)]
        edges = sum(map(len, neighbours))
        self.points, self.degrees = side * side, [len(n) for n in neighbours]
        self.register_buffer("sources", torch.tensor([s for n in neighbours for s in n]), persistent=False)
        self.depthwise = nn.Conv2d(edges * channels, edges * channels, 5, padding=2, groups=edges * channels)
        self.pointwise = nn.Conv2d(edges * channels, edges * channels, 1, groups=edges)
        for layer in (self.depthwise, self.pointwise):
            for edge in layer.weight.chunk(edges):  # each edge starts as convolutions of its own would
                nn.init.kaiming_normal_(edge, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, own: Tensor, others: Tensor) -> Tensor:
        """Features own (M, P * c, h, w), and those from which the neighbours' come, to own and neighbours' together."""
        sent = others.unflatten(1, (self.points, -1))[:, self.sources].flatten(1, 2)  # (M, E * c, h, w)
        sent = self.pointwise(self.depthwise(sent)).unflatten(1, (len(self.sources), -1))
        return own + torch.cat([part.sum(dim=1) for part in sent.split(self.degrees, dim=1)], dim=1)


def _neighbours(x: int, y: int, side: int) -> list[int]:
    """The points left of, above, below and right of (x, y), as far as there are any."""
    around = [(x - 1, y), (x, y - 1), (x, y + 1), (x + 1, y)]
    return [a * side + b for a, b in around if 0 <= a < side and 0 <= b < side]
