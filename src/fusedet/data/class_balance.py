"""Repeat-factor sampling: images of rare classes are seen several times per epoch."""

import numpy as np

from fusedet.data.dataset import DetectionDataset


def count_images_per_class(dataset: DetectionDataset) -> np.ndarray:
    """Count the images (K,) that show each class; ignored annotations do not count."""
    counted = ~dataset.ignore.numpy()
    pairs = np.stack([dataset.image_indices[counted], dataset.labels.numpy()[counted]], axis=1)
    return np.bincount(np.unique(pairs, axis=0)[:, 1], minlength=len(dataset.names))


def compute_repeat_factors(dataset: DetectionDataset, threshold: float) -> np.ndarray:
    """Compute how often each image is seen per epoch on average, (N,) float64, 1 or more.

    A class that is in the share f of the images has the factor max(1, sqrt(threshold / f)). An image has the largest
    factor of its classes, and without any class 1.

    Args:
        dataset: The training split.
        threshold: The share of the images below which a class is rare, above 0.

    References:
        Gupta et al., LVIS: A Dataset for Large Vocabulary Instance Segmentation, CVPR 2019, appendix B.2.
    """
    share = count_images_per_class(dataset) / max(1, len(dataset))
    of_class = np.sqrt(threshold / np.maximum(share, 1 / max(1, len(dataset)))).clip(min=1)
    factors = np.ones(len(dataset))
    counted = ~dataset.ignore.numpy()
    np.maximum.at(factors, dataset.image_indices[counted], of_class[dataset.labels.numpy()[counted]])
    return factors


def count_entries(factors: np.ndarray) -> int:
    """Count the images of an epoch, with their repetitions: the sum of the factors, rounded up."""
    return int(np.ceil(round(float(factors.sum()), 6)))


def draw_entries(factors: np.ndarray, seed: int, epoch: int) -> list[int]:
    """Draw the images of an epoch in random order, each one factor times on average.

    An image with the factor 2.3 is there two or three times (systematic sampling in random order), and the epoch always
    has `count_entries` entries. The k-th repetition of image i, from 0, is the entry i + k N.

    Args:
        factors: (N,) repeat factors.
        seed: Seed of the order.
        epoch: The epoch, from 0.
    """
    rng = np.random.default_rng([seed, epoch])
    order, total = rng.permutation(len(factors)), count_entries(factors)
    # the last one is exact, so that rounding never adds or loses an entry
    ends = np.append(np.cumsum(factors[order])[:-1] * total / factors.sum(), total)
    counts: np.ndarray = np.diff(np.floor(ends + rng.random()).astype(np.int64), prepend=0)
    images = np.repeat(order, counts)
    repetition = np.arange(len(images)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rng.permutation(images + repetition * len(factors)).tolist()
