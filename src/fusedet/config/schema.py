"""The settings of a config: each one declared once, with its type, default, range and help.

Those of `data` stand in `data_settings`.
"""

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fusedet.config.data_settings import Data, Tiles
from fusedet.config.fields import Floats, Integers, Loggers, Part, need
from fusedet.config.interval import parse_interval
from fusedet.config.section import Section, text_keys, to_builtins
from fusedet.errors import InputError


class Pyramid(Section):
    """The feature pyramid that the first neck of a chain makes."""

    key: ClassVar[str] = "model.pyramid"
    channels: int = Field(default=256, ge=1)
    """Channels of every level."""
    finest: int = 3
    """The finest level: P3 has stride 8."""
    coarsest: int = 7
    """The coarsest level: P7 has stride 128."""
    top: Literal["max_pool", "on_input", "on_output", "on_input_relu", "on_output_plain"] = "on_input"
    """How the levels above the backbone's last are made: by pooling, or by convolutions on C5 or the neck's output."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        need(self.finest <= self.coarsest, self, "finest", f"at most model.pyramid.coarsest={self.coarsest}")
        return self


class Model(Section):
    """The detector's parts. A slot is a name or {type, options}; the neck may be a list, a chain."""

    key: ClassVar[str] = "model"
    backbone: dict = Field(default_factory=dict)
    """The timm backbone: {name, pretrained, frozen_stages, norm_eval, ...}."""
    plugin: Part = None
    """The module in the backbone's blocks: msfm, context_block."""
    neck: Part = "fpn"
    """The neck, or a list of necks, each on the maps of the one before."""
    interact: Part = None
    """The module between the two branches of a dense head: msil."""
    head: Part = "retina"
    """The dense head, or the region proposal network (rpn) of a two-stage detector."""
    roi: Part = None
    """The RoI head of a two-stage detector: {stages: [...], branches: [...], valid_ranges: [...]}."""
    pyramid: Pyramid = Field(default_factory=lambda: Pyramid())
    """The feature pyramid that the first neck makes."""


class Train(Section):
    """The training recipe."""

    key: ClassVar[str] = "train"
    schedule: str | None = None
    """A schedule, which sets epochs, milestones and image sizes: 1x, 2x, 2x_ms, short, tiny; finetune: the rate too."""
    epochs: int = Field(default=12, ge=1)
    """Passes over the training split."""
    batch: int | Literal["auto"] = 16
    """Images per step in total: over all processes and accumulated batches; auto is what fits into memory, up to 64."""
    accumulate: int = Field(default=1, ge=1)
    """Batches whose gradients make one step; `batch` must be a multiple of it."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """The optimizer."""
    lr: float = Field(default=0.01, gt=0)
    """The learning rate at a total batch of `base_batch`."""
    base_batch: int | None = Field(default=16, ge=1)
    """The batch that `lr` belongs to: the rate is scaled linearly to `batch`; null takes `lr` as it is."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD's momentum."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """The weight decay."""
    decay_norm_and_bias: bool = True
    """Whether norms, biases and other vectors have weight decay."""
    decay_bias: bool = True
    """Whether biases, other than those of norms, have weight decay."""
    bias_lr: float = Field(default=1.0, gt=0)
    """The factor of the learning rate of biases, other than those of norms."""
    policy: Literal["multistep", "cosine"] = "multistep"
    """How the learning rate falls: by `gamma` at each of `milestones`, or as a cosine to zero at the end."""
    milestones: Floats = (8, 11)
    """Epochs, fractions allowed, at which `multistep` lowers the learning rate."""
    gamma: float = Field(default=0.1, gt=0)
    """The factor of the learning rate at each milestone."""
    warmup: Literal["linear", "constant"] = "linear"
    """How the learning rate warms up: it rises linearly from `warmup_ratio`, or stays there for the warm-up's steps."""
    warmup_steps: int = Field(default=500, ge=0)
    """Steps of the warm-up at the start."""
    warmup_ratio: float = Field(default=0.001, gt=0, le=1)
    """The factor of the learning rate at the first step of the warm-up."""
    clip_norm: float | None = Field(default=None, gt=0)
    """The largest gradient norm; null does not clip."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """The decay of averaged weights, such as 0.999, which are then validated and kept; null trains without them."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """The precision of the forward pass; auto is bf16 on a GPU that computes in it, else fp32; fp16 needs a GPU."""
    validate_every: int = Field(default=1, ge=1)
    """Epochs between validations; the last epoch is always validated."""
    validation_loss: bool = False
    """Whether a validation also computes the loss; it takes a second forward pass. A rising one shows over-fitting."""
    checkpoint_every: str | int | None = None
    """How often last.ckpt is also written within an epoch: 30min, 2h, 90s or 500steps."""
    monitor: str = "AP"
    """The metric that chooses the best weights."""
    patience: int | None = Field(default=None, ge=1)
    """Validations without improvement after which training ends; null trains for all epochs."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What happens at an image that cannot be read."""
    max_bad_images: float = Field(default=0.01, ge=0, le=1)
    """The share of training images that may be skipped."""
    balance: float | None = Field(default=None, gt=0, le=1)
    """The share of images below which a class is rare, such as 0.001; its images are repeated. null repeats none."""
    seed: int = Field(default=0, ge=0)
    """The seed of the initial weights, of the order of the images and of their augmentation."""
    deterministic: bool = False
    """Whether a GPU gives the same numbers twice, as far as torch can; slower."""
    compile: bool = False
    """Whether torch.compile compiles the forward pass; of a two-stage detector, up to the proposal head."""
    cuda_graphs: bool = False
    """Whether the compiled forward pass replays CUDA graphs on a GPU; for images of one size, with `compile`."""
    checkpoint_backbone: bool = False
    """Whether the backward pass computes the stages of the backbone again, which needs less memory and more time."""
    loggers: Loggers = ()
    """Experiment trackers to log to."""
    weights: str | None = None
    """A run, checkpoint or name of published weights to start from; classes with equal names keep their rows."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        parse_interval(self.checkpoint_every, "train.checkpoint_every")
        batch = self.accumulate if self.batch == "auto" else self.batch
        need(batch >= 1, self, "batch", "1 or more")
        need(batch % self.accumulate == 0, self, "batch", f"a multiple of train.accumulate={self.accumulate}")
        need(self.compile or not self.cuda_graphs, self, "cuda_graphs", "false without train.compile=true")
        need(list(self.milestones) == sorted(self.milestones), self, "milestones", "increasing epochs")
        return self

    @property
    def total_batch(self) -> int:
        """Images per step in total; raises InputError where a training has not chosen the number yet."""
        if self.batch == "auto":
            raise InputError("train.batch=auto is chosen when a training starts: give a number here")
        return self.batch


class PredictionTiles(Tiles):
    """The tiles in which validation and prediction see large images."""

    key: ClassVar[str] = "test.tiles"
    whole: bool = True
    """Whether the whole image is seen beside its tiles, for objects larger than a tile."""
    ios: float | None = Field(default=None, gt=0, le=1)
    """The intersection over the smaller box (IoS) from which an object cut by a tile is joined; null joins none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, is_default in (("whole", self.whole), ("ios", self.ios is None)):
            if self.size is None and not is_default:
                value = json.dumps(getattr(self, name))
                raise InputError(f"test.tiles.{name}={value} needs tiles: set test.tiles.size, such as 640")
        return self


class Test(Section):
    """How a head's outputs become detections, in validation and prediction."""

    key: ClassVar[str] = "test"
    score: float | dict[str, float] = 0.05
    """The lowest score of a detection, 0 to 1; or one per class, such as {person: 0.5, default: 0.3}."""
    nms: float = Field(default=0.5, ge=0, le=1)
    """The IoU above which class-wise NMS suppresses the lower score."""
    soft_nms: Literal["linear", "gaussian"] | None = None
    """Soft-NMS: boxes lose score where NMS would suppress them; null is hard NMS."""
    soft_sigma: float = Field(default=0.5, gt=0)
    """The width of Soft-NMS's gaussian."""
    soft_min_score: float = Field(default=0.001, ge=0, le=1)
    """The score below which Soft-NMS drops a box."""
    max_det: int = Field(default=100, ge=1)
    """Detections per image."""
    pre_nms: int = Field(default=1000, ge=1)
    """Candidates per feature level before NMS; in two-stage detectors, those of the RPN."""
    batch: int | None = Field(default=None, ge=1)
    """Images per batch; null is `train.batch`."""
    scales: Integers | None = None
    """Short sides for test-time augmentation, such as [600, 800, 1000]; null is that of `data.size`."""
    flip: bool = False
    """Whether test-time augmentation also sees every image flipped."""
    size_bins: Floats | None = None
    """Edges in pixels of size bins, such as [0, 16, 64, 256]: AP of objects by the square root of their area."""
    tiles: PredictionTiles = Field(default_factory=lambda: PredictionTiles())
    """The tiles in which large images are seen."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        edges = (0.0, 1.0) if self.size_bins is None else self.size_bins
        is_valid = len(edges) > 1 and edges[0] >= 0 and all(a < b for a, b in pairwise(edges)) and edges[-1] <= 1e5
        need(is_valid, self, "size_bins", "increasing edges in 0..100000, such as [0, 16, 64, 256], or null")
        scales = (32,) if self.scales is None else self.scales
        is_valid = bool(scales) and min(scales) >= 32 and len(set(scales)) == len(scales)
        scores = self.score if isinstance(self.score, dict) else {"": self.score}
        for name, score in scores.items():
            if not 0 <= score <= 1:
                raise InputError(f"{'.'.join(['test.score', name]).rstrip('.')}={score:g} must be 0 to 1")
        right = "different short sides of at least 32 pixels, such as [600, 800, 1000], or null"
        need(is_valid, self, "scales", right)
        return self


class Config(Section):
    """Everything that a run needs."""

    model: Model = Field(default_factory=lambda: Model())
    """The detector's parts."""
    data: Data = Field(default_factory=lambda: Data())
    """The dataset and its preprocessing."""
    train: Train = Field(default_factory=lambda: Train())
    """The training recipe."""
    test: Test = Field(default_factory=lambda: Test())
    """How a head's outputs become detections."""
    device: str = "auto"
    """The device: auto, cpu, cuda, cuda:1, ..."""
    out: str | None = None
    """The run directory; null is the next free one below runs/."""

    def to_yaml(self) -> str:
        """Write the resolved config as YAML: enough to run the same again."""
        from omegaconf import OmegaConf  # slow to import, and `--help` does not need it

        return OmegaConf.to_yaml(OmegaConf.create(self.tree()))

    def tree(self) -> dict[str, Any]:
        """Return the config as nested dicts and lists."""
        return dict(to_builtins(self.model_dump()))


def parse(tree: Any) -> Config:
    """Validate a nested mapping.

    Raises:
        InputError: For an unknown key, with the nearest known one, and for a wrong value.
    """
    if not isinstance(tree, Mapping):
        raise InputError(f"a config must be a mapping with {', '.join(Config.model_fields)}, got {tree!r}")
    return Config(**text_keys(tree))
