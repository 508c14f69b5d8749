"""The settings of the dataset, its preprocessing and its augmentation."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from fusedet.config.fields import FloatPair, Pair, Texts, need
from fusedet.config.section import Section, to_builtins
from fusedet.errors import InputError


class Tiles(Section):
    """The tiles that training cuts out of large images."""

    key: ClassVar[str] = "data.tiles"
    size: int | None = Field(default=None, ge=32)
    """The side of a tile in pixels of the original image; null takes whole images."""
    overlap: float = Field(default=0.2, ge=0, lt=1)
    """The least overlap of neighboring tiles, as a share of their size."""


class Data(Section):
    """The dataset and its preprocessing."""

    key: ClassVar[str] = "data"
    path: str | None = None
    """The dataset: a folder or a file in one of the formats of docs/data.md, auto-detected."""
    train: str = "train"
    """The split to train on."""
    val: str | float = "val"
    """The split to validate on; or the share of the training images that is held out for it, stratified by class."""
    split_seed: int = Field(default=0, ge=0)
    """The seed that chooses the images held out, where `val` is a share."""
    classes: Texts = ()
    """The classes to keep, in this order, after `rename`; [] keeps all. Images without them are background."""
    rename: dict[str, str] | None = None
    """New names of classes: {truck: car}; null renames none. Classes of one name are joined."""
    images: str | None = None
    """The folder of COCO's images, where it is not found by itself; they may be found by their last part there."""
    exif: bool = True
    """Whether EXIF orientation is applied; false reads images as stored, for boxes that fit those pixels."""
    size: Pair = (800, 1333)
    """[short, longest]: images are resized to that short side, or to that long side if it would be exceeded."""
    multi_scale: Pair | None = None
    """[smallest, largest] short side: training draws one for every image."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """The probability of a horizontal flip in training."""
    scale_jitter: FloatPair | None = None
    """[least, most] factor of the resize, such as [0.1, 2.0]: one is drawn for every image, and larger ones cropped."""
    crop: FloatPair | None = None
    """[least, most] share of each side that a crop keeps, such as [0.5, 1]; it shows a whole object where any fits."""
    rotate: float = Field(default=0, ge=0, le=180)
    """The largest random rotation in degrees; boxes are those of the rotated masks, which every object needs."""
    shear: float = Field(default=0, ge=0, le=45)
    """The largest random shear in degrees; boxes are those of the sheared masks, which every object needs."""
    right_angles: bool = False
    """Whether images are turned by 0, 90, 180 or 270 degrees, where no side is up, as in aerial images."""
    mosaic: float = Field(default=0, ge=0, le=1)
    """The probability that an image is joined with three others, each in a quadrant of `size`."""
    mixup: float = Field(default=0, ge=0, le=1)
    """The probability that an image is blended with another; the boxes of both are targets."""
    mosaic_until: float = Field(default=0.85, gt=0, le=1)
    """The share of the epochs that have mosaic and mixup; the last ones show images as they are tested."""
    copy_paste: float = Field(default=0, ge=0, le=1)
    """The probability that objects of another image are pasted by their masks, which every object needs."""
    min_visible: float = Field(default=0.25, ge=0, le=1)
    """The share of an object that a crop, tile, mosaic or paste must leave; with less it is an ignored region."""
    tiles: Tiles = Field(default_factory=lambda: Tiles())
    """The tiles that training cuts out of large images."""
    photometric: bool = False
    """Whether training distorts brightness, contrast, saturation and hue."""
    antialias: bool = True
    """Whether downscaling is antialiased; false is OpenCV's, and so MMDetection's, plain bilinear resizing."""
    range: FloatPair | None = None
    """[low, high] values that become black and white in images of more than 8 bits; null is [0, 65535] of 16 bits."""
    channels: int = Field(default=3, ge=1)
    """The channels of the images; other numbers than 3 take the channels of TIFF and npy files as they are."""
    workers: int = Field(default=2, ge=0)
    """Processes that load images, per training process."""
    check: bool = True
    """Whether every image's header is read before training starts."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        need(self.size[0] >= 32, self, "size", "[short, longest] with a short side of at least 32 pixels")
        need(self.size[0] <= self.size[1], self, "size", "[short, longest] with short <= longest")
        short, long = self.multi_scale or (32, 32)
        need(32 <= short <= long, self, "multi_scale", "[smallest, largest] short side")
        low, high = self.range or (0, 1)
        need(low < high, self, "range", "[low, high] with low < high")
        low, high = self.scale_jitter or (1, 1)
        need(0 < low <= high, self, "scale_jitter", "[least, most] factors above 0, such as [0.1, 2.0]")
        low, high = self.crop or (1, 1)
        need(0 < low <= high <= 1, self, "crop", "[least, most] shares above 0 and at most 1, such as [0.5, 1]")
        self._refuse_both("scale_jitter", "multi_scale", "both draw the size of the image")
        self._refuse_both("scale_jitter", "crop", "both crop the image")
        self._refuse_both("mixup", "copy_paste", "one blends whole images, the other pastes objects")
        need(self.channels == 3 or not self.photometric, self, "photometric", "false where data.channels is not 3")
        need(len(set(self.classes)) == len(self.classes), self, "classes", "a list without repetitions")
        if isinstance(self.val, float):
            need(0 < self.val < 1, self, "val", "a split, or a share above 0 and below 1")
            need(self.train != self.val_split, self, "train", "another split than the share data.val makes")
        return self

    def _refuse_both(self, name: str, excluded: str, reason: str) -> None:
        first, second = getattr(self, name), getattr(self, excluded)
        if first and second:
            raise InputError(
                f"data.{name}={to_builtins(first)} and data.{excluded}={to_builtins(second)} exclude each other, "
                f"because {reason}: "
                f"leave out one of them"
            )

    @property
    def val_split(self) -> str:
        """The name of the validation split; "val" where it is a share of the training split."""
        return self.val if isinstance(self.val, str) else "val"
