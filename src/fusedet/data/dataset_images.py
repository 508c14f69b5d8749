"""The pixels of a dataset's images and tiles, read as the dataset says."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fusedet.data.channel_decoding import is_array_file, read_array_size, read_channels
from fusedet.data.dataset import DetectionDataset, ImageAnnotations
from fusedet.data.image_decoding import read_image, read_image_size
from fusedet.data.image_windows import Window
from fusedet.data.large_images import LargeImage, crop_image, open_large_image
from fusedet.data.transforms import check_image_size


def read_dataset_image(dataset: DetectionDataset, annotations: ImageAnnotations) -> Tensor:
    """Decode an image or tile of a dataset, uint8 (C, H, W).

    Raises:
        InputError: It cannot be read, or has another number of channels, or a tile's image has another size.
    """
    path, tile, exif = annotations.path, annotations.tile, dataset.exif
    window = None
    if tile:
        is_array = is_array_file(path)
        actual = read_array_size(path) if is_array else read_image_size(path, any_mode=True, exif=exif)
        check_image_size(path, actual, (tile.image_height, tile.image_width))
        window = (tile.left, tile.top, tile.left + annotations.width, tile.top + annotations.height)
    return _read(dataset, path, window)


@dataclass
class TileReader:
    """Reads tiles image by image, and decodes an image once: the last one is kept.

    Attributes:
        path: The file of the image that is kept.
        image: The image; one that is too large for memory is decoded tile by tile.
    """

    path: Path | None = None
    image: Tensor | LargeImage | None = None

    def read(self, dataset: DetectionDataset, annotations: ImageAnnotations) -> Tensor | LargeImage:
        """Return a tile (C, H, W), or where it is all of the image, the image.

        Raises:
            InputError: As `read_dataset_image`.
        """
        path, tile = annotations.path, annotations.tile
        assert tile is not None, "a dataset of tiles"
        if path != self.path or self.image is None:
            self.path, self.image = None, None  # before the next one is decoded
            large = open_large_image(path, dataset.channels, dataset.value_range, exif=dataset.exif)
            self.path, self.image = path, _read(dataset, path) if large is None else large
        check_image_size(path, self.image.shape[1:], (tile.image_height, tile.image_width))
        window = (tile.left, tile.top, tile.left + annotations.width, tile.top + annotations.height)
        return crop_image(self.image, window)


def _read(dataset: DetectionDataset, path: Path, window: Window | None = None) -> Tensor:
    exif, value_range = dataset.exif, dataset.value_range
    if dataset.channels == 3 and not is_array_file(path):
        return read_image(path, value_range, exif=exif, window=window)
    return read_channels(path, dataset.channels, value_range, exif=exif, window=window)
