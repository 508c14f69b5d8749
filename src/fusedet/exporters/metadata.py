"""What is known about an exported model: model.json beside the files, and the same text inside each of them."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fusedet.atomic_io import write_atomically
from fusedet.errors import InputError
from fusedet.file_hash import hash_file

VERSION: Literal[1] = 1
"""Version of model.json; a file of another version is refused."""
DESCRIPTION = "model.json"
SUFFIXES = (".onnx", ".xml", ".pt2")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Resize(_Strict):
    """How an image becomes the input: its short side `short` pixels, or its long side `long` if that is exceeded."""

    short: int = Field(ge=1)
    long: int = Field(ge=1)
    antialias: bool


class Thresholds(_Strict):
    """The settings of the selection inside the file; `score` may have one per class name, and `default`."""

    score: float | dict[str, float]
    nms: float
    max_det: int = Field(ge=1)
    pre_nms: int = Field(ge=1)


class License(_Strict):
    """Licenses; None where the checkpoint does not state one."""

    code: str
    weights: str | None


class Metadata(_Strict):
    """The description of an exported model.

    Attributes:
        version: Version of this description.
        fusedet: fusedet's version.
        name: Name of the run or config.
        names: (K,) class names.
        category_ids: (K,) category ids of the training data.
        size: Height and width of the input; None for any multiple of `multiple`.
        batch: Number of images; None for any.
        multiple: The divisor of height and width.
        smallest: The smallest side that the .pt2 file takes where `size` is None; ONNX and OpenVINO take `multiple`.
        resize: How an image is resized before padding at the right and the bottom with zeros.
        thresholds: The settings of the selection inside the file.
        strides: Strides of the feature levels.
        mask_size: Cells per side of a mask; None without a mask branch.
        precision: "fp32", "fp16" (weights only), "bf16" (computation only) or "int8" (convolutions).
        raw: Whether the final selection is left out.
        opset: ONNX's operator set.
        outputs: Names of the outputs, in order.
        weights_sha256: Hash of the checkpoint; None for a model without a checkpoint.
        training_data: Name of the dataset; None if it is unknown.
        license: Licenses of code and weights.
        versions: Versions of the packages that wrote the files.
        config: The config of the run.
    """

    version: Literal[1] = VERSION
    fusedet: str
    name: str
    names: list[str]
    category_ids: list[int]
    size: list[int] | None
    batch: int | None
    multiple: int
    smallest: int
    resize: Resize
    thresholds: Thresholds
    strides: list[int]
    mask_size: int | None
    precision: str
    raw: bool
    opset: int
    outputs: list[str]
    weights_sha256: str | None
    training_data: str | None
    license: License
    versions: dict[str, str]
    config: dict[str, Any]

    def to_json(self) -> str:
        """Return the text that stands inside each file."""
        return json.dumps(self.model_dump(), ensure_ascii=False, sort_keys=True)


def write_description(folder: Path, metadata: Metadata, files: dict[str, list[Path]]) -> None:
    """Write model.json: the metadata, and the files of each format with their hashes.

    Raises:
        StorageError: The file cannot be written.
    """
    hashes = {name: {path.name: hash_file(path) for path in paths} for name, paths in files.items()}
    content = {"model": metadata.model_dump(), "files": hashes}
    write_atomically(folder / DESCRIPTION, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def find_export(path: str | Path) -> Path | None:
    """Return the directory of an exported model, given by itself or by one of its files; None for anything else."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    return folder if (path.is_dir() or path.suffix in SUFFIXES) and (folder / DESCRIPTION).is_file() else None


def read_export(folder: Path) -> tuple[Metadata, dict[str, list[Path]]]:
    """Read the description of an exported model and check that its files are the described ones.

    Returns:
        The metadata, and the files of each format, the model first.

    Raises:
        InputError: model.json is damaged or of another version, or a file is absent or was changed.
    """
    source = folder / DESCRIPTION
    try:
        content = json.loads(source.read_bytes())
        version = content["model"]["version"]
        hashes = {str(name): {str(k): str(v) for k, v in files.items()} for name, files in content["files"].items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{source} is damaged: export the model again") from error
    if version != VERSION:
        raise InputError(
            f"{source} has version {version!r}, but this fusedet reads version {VERSION}: export the model again"
        )
    try:
        metadata = Metadata.model_validate(content["model"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"{source}: {key} is not as exported ({first['msg']}): export the model again") from error
    paths: dict[str, list[Path]] = {}
    for name, files in hashes.items():
        for file, digest in files.items():
            path = folder / file
            if Path(file).name != file or not path.is_file():
                raise InputError(f"{path} is missing, but {source} names it: copy the whole directory")
            if hash_file(path) != digest:
                raise InputError(f"{path} was changed after the export: its hash is not that of {source}")
            paths.setdefault(name, []).append(path)
    return metadata, paths
