"""The choice of the batch size where train.batch is auto."""

from collections.abc import Callable

import torch
from lightning_fabric import Fabric

from fusedet.config import Config
from fusedet.data.dataset import DetectionDataset
from fusedet.data.transforms import keep_ratio_size
from fusedet.engine.batch_size import MAX_BATCH, find_batch
from fusedet.errors import format_count
from fusedet.models.detectors import DetectorModule

_STEPS = 10  # that an epoch has at least: fewer and larger steps learn little from a small dataset


def choose_batch(
    fabric: Fabric,
    config: Config,
    detector: DetectorModule,
    images: DetectionDataset,
    masks: bool,
    say: Callable[[str], None],
) -> Config:
    """Return the config with the largest batch that fits, the same in all processes; all of them call it.

    A batch has at most `MAX_BATCH` images, and an epoch at least `_STEPS` steps.

    Args:
        fabric: Its device and precision are used.
        config: Of a training, with train.batch=auto.
        detector: The detector.
        images: The images or tiles to train on.
        masks: Whether targets have masks.
        say: Takes the sentence that names the choice.
    """
    train, world = config.train, fabric.world_size
    limit = max(1, min(MAX_BATCH, len(images) // _STEPS) // (world * train.accumulate))
    states = (1 if train.optimizer == "sgd" else 2) + (train.ema is not None)
    detector.to(fabric.device).train()
    size, channels = find_largest_size(config, images), config.data.channels
    own = find_batch(fabric, detector, size, states=states, masks=masks, limit=limit, channels=channels)
    least = fabric.all_reduce(torch.tensor(float(own), device=fabric.device), reduce_op="min")
    fitting = int(least)  # type: ignore[arg-type]
    batch = fitting * world * train.accumulate
    reason = "more do not fit into memory" if fitting < limit else f"the most for {format_count(len(images), 'image')}"
    say(f"train.batch=auto: {format_count(batch, 'image')} per step, {reason}")
    return config.replace(train=train.replace(batch=batch))


def find_largest_size(config: Config, images: DetectionDataset) -> tuple[int, int]:
    """Return the largest (height, width) that a batch of these images can have, before rounding up.

    Portrait and landscape images may share a batch, which is then as high as the ones and as wide as the others.
    """
    data = config.data
    short, longest = max(data.multi_scale or data.size[:1]), data.size[1]
    height, width = images.sizes.numpy().T
    # data augmentation fills a canvas of the image's orientation
    fills = bool(data.scale_jitter or data.mosaic or data.mixup or data.copy_paste or data.crop)
    sizes = set(zip(height.tolist(), width.tolist(), strict=True))
    if fills:
        sizes = {(longest, short) if h > w else (short, longest) for h, w in sizes}
    if data.right_angles:
        sizes |= {(w, h) for h, w in sizes}
    largest = [(h, w) if fills else keep_ratio_size(h, w, short, longest) for h, w in sizes]
    return max(h for h, _ in largest), max(w for _, w in largest)
