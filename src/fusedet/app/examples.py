"""Example images that a visitor of the page can pick."""

import io
from collections.abc import Iterable
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path

from PIL import Image

from fusedet.api.image_sources import Sources
from fusedet.config import Config
from fusedet.data.image_decoding import read_image
from fusedet.data.splits import read_split
from fusedet.errors import InputError
from fusedet.visualization.annotators import to_pil_image

MOST = 12
"""Example images on the page, at most."""
THUMBNAIL = 160
"""The longer side of a thumbnail in pixels."""


class Examples:
    """Up to `MOST` example images, listed when they are asked for.

    Args:
        sources: Files, directories, globs and lists; None for validation images of `config`'s dataset.
        config: The config of the first model.

    Raises:
        InputError: A source does not exist or holds no image.
    """

    def __init__(self, sources: Iterable[str] | None, config: Config) -> None:
        self._sources = None if sources is None else Sources(sources)
        self._config = config

    @cached_property
    def files(self) -> list[Path]:
        """The image files; reading the annotations of a large dataset takes seconds."""
        if self._sources is not None:
            return list(islice(self._sources, MOST))
        data = self._config.data
        if data.path is None or not Path(data.path).exists():
            return []
        try:
            dataset = read_split(data, data.val_split, need_images=True)
        except InputError:  # no longer the data of the run: there are no examples then
            return []
        step = max(1, len(dataset) // MOST)
        return [Path(dataset.path(i)) for i in range(0, len(dataset), step)][:MOST]

    def get_file(self, number: int) -> Path | None:
        """Return an image file by its number; None for an unknown number or a file that was removed."""
        if not 0 <= number < len(self.files) or not self.files[number].is_file():
            return None
        return self.files[number]


@lru_cache(maxsize=MOST)
def make_thumbnail(file: Path) -> bytes:
    """Return a small JPEG of an image file, which is decoded once.

    Raises:
        InputError: The file cannot be read.
    """
    return encode_image(to_pil_image(read_image(file)), THUMBNAIL)


def encode_image(image: Image.Image, longest: int, quality: int = 85) -> bytes:
    """Return an image as JPEG, its longer side at most `longest` pixels."""
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return data.getvalue()
