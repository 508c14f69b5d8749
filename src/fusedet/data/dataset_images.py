"""The pixels of a dataset's images and tiles, read as the dataset says."""

from __future__ import annotations

from torch import Tensor

from fusedet.data.channel_decoding import is_array_file, read_array_size, read_channels
from fusedet.data.dataset import DetectionDataset, ImageAnnotations
from fusedet.data.image_decoding import read_image, read_image_size
from fusedet.data.transforms import check_image_size


def read_dataset_image(dataset: DetectionDataset, annotations: ImageAnnotations) -> Tensor:
    """Decode an image or tile of a dataset, uint8 (C, H, W).

    Raises:
        InputError: It cannot be read, or has another number of channels, or a tile's image has another size.
    """
    path, tile, exif, value_range = annotations.path, annotations.tile, dataset.exif, dataset.value_range
    window = None
    if tile:
        is_array = is_array_file(path)
        actual = read_array_size(path) if is_array else read_image_size(path, any_mode=True, exif=exif)
        check_image_size(path, actual, (tile.image_height, tile.image_width))
        window = (tile.left, tile.top, tile.left + annotations.width, tile.top + annotations.height)
    if dataset.channels == 3 and not is_array_file(path):
        return read_image(path, value_range, exif=exif, window=window)
    return read_channels(path, dataset.channels, value_range, exif=exif, window=window)
