"""Pixel values as real files hold them: 10 and 12 bits in 16, floats, alpha, 1 bit, CMYK; data.range."""

import io
import struct
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

import fusedet
from fusedet.api.image_sources import Sources
from fusedet.config import Config
from fusedet.data import image_opening
from fusedet.data.image_decoding import inspect_image, read_image, read_image_size, to_tensor
from fusedet.data.splits import read_split
from fusedet.data.validation import require_usable_images
from fusedet.errors import InputError
from tiny import coco_dict

RAMP = np.arange(12 * 16).reshape(12, 16)


def store(array: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def png_16_bit(rgb: np.ndarray) -> bytes:
    """A PNG of 16 bits per channel in color, which Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = rgb.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if channels == 3 else 6, 0, 0, 0)
    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_range_of_16_bit_gray(bits: int, kind: str) -> None:
    high = 2**bits - 1
    gray = (RAMP * (high / RAMP.max())).astype(np.uint16)
    content = store(gray, kind)
    tensor, values = inspect_image(content, (0, high))
    assert values is not None
    assert (values.low, values.high, values.depth) == (0, high, 16)
    assert np.array_equal(tensor[1].numpy(), np.rint(gray * 255.0 / high).astype(np.uint8))
    assert torch.equal(tensor[0], tensor[2])
    assert int(read_image(content).max()) == (high + 128) // 257, "without a range 16 bits are the whole range"


def test_range_clips() -> None:
    gray = np.array([[0, 100, 150, 200, 65535]], dtype=np.uint16)
    assert read_image(store(gray), (100, 200))[0, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_range_of_floats_and_integers(dtype: Any) -> None:
    """Values without an agreed range are refused with the measured range, and read with data.range."""
    array = (RAMP - 50).astype(dtype)
    content = store(array, "TIFF")
    with pytest.raises(InputError, match=r"from -50 to 141, which have no agreed range.*set data\.range"):
        read_image(content)
    with pytest.raises(InputError, match=r"from -50 to 141.*such as \[-50,141\]"):
        read_image_size(content)
    assert read_image_size(content, value_range=(0, 141)) == (12, 16)
    expected = np.rint(array.clip(0, 141) * 255.0 / 141).astype(np.uint8)
    assert np.array_equal(read_image(content, (0, 141))[0].numpy(), expected)


@pytest.mark.parametrize(("high", "advice"), [(1.0, "[0,1]"), (200.0, "[0,255]"), (4000.0, "[0,4095]")])
def test_advice_for_floats(high: float, advice: str) -> None:
    content = store((RAMP / RAMP.max() * high).astype(np.float32), "TIFF")
    with pytest.raises(InputError) as error:
        read_image(content)
    assert f"from 0 to {high:g}" in str(error.value)
    assert advice in str(error.value)


def test_floats_with_nan() -> None:
    array = np.array([[0.0, np.nan, 1.0, np.inf, -np.inf]], dtype=np.float32)
    assert read_image(store(array, "TIFF"), (0, 1))[0, 0].tolist() == [0, 0, 255, 255, 0]


def test_range_of_16_bit_color() -> None:
    """Pillow cuts colors of 16 bits to 8; with a range all bits are used."""
    rgb = np.stack([RAMP * 21, RAMP * 3, 4095 - RAMP * 20], axis=2)
    content = png_16_bit(rgb)
    tensor, values = inspect_image(content, (0, 4095))
    assert values is not None
    assert values.depth == 16
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), np.rint(rgb * 255.0 / 4095).astype(np.uint8))
    assert int(read_image(content).max()) == 15, "the high byte"


def test_eight_bits_have_no_range() -> None:
    content = store(RAMP.astype(np.uint8))
    assert torch.equal(read_image(content, (0, 10)), read_image(content))


def test_one_bit() -> None:
    file = io.BytesIO()
    Image.fromarray(RAMP % 3 == 0).save(file, "PNG")
    assert Image.open(io.BytesIO(file.getvalue())).mode == "1"
    expected = np.where(RAMP % 3 == 0, 255, 0)
    assert np.array_equal(read_image(file.getvalue())[0].numpy(), expected)


def test_alpha_is_composited_over_white() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0], rgba[0, 1], rgba[1, 0] = (10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 128)
    tensor, values = inspect_image(store(rgba))
    assert values is not None
    assert values.transparent == 0.75
    assert tensor[:, 0, 0].tolist() == [10, 20, 30]
    assert tensor[:, 0, 1].tolist() == [255, 255, 255]
    assert tensor[:, 1, 0].tolist() == [127, 127, 127]


def test_cmyk_with_adobes_inversion() -> None:
    """Photoshop stores CMYK in JPEG inverted and marks it; libjpeg in torchvision is the oracle."""
    rgb = np.stack([RAMP, 255 - RAMP, RAMP // 2], axis=2).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    file = io.BytesIO()
    Image.fromarray(rgb).convert("CMYK").save(file, "JPEG", quality=100, subsampling=0)
    content = file.getvalue()
    assert b"Adobe" in content[:200]
    oracle = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
    own = read_image(content)
    assert (own.int() - oracle.int()).abs().max() <= 6
    assert (own.permute(1, 2, 0).int() - torch.from_numpy(rgb).int()).abs().float().mean() < 3, "not inverted"


def write_data(root: Path, images: dict[str, bytes]) -> Path:
    """The tiny COCO dataset in which both splits are the given files, of 40 x 30 and 20 x 10 pixels."""
    import json

    data = coco_dict()
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        for entry, (name, content) in zip(data["images"], images.items(), strict=True):
            entry["file_name"] = name
            (root / split / name).write_bytes(content)
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))
    return root


def gray_16(high: int) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    return {
        name: store(rng.integers(0, high + 1, shape).astype(np.uint16))
        for name, shape in (("b.png", (30, 40)), ("a.png", (10, 20)))
    }


def test_doctor_names_the_measured_range(tmp_path: Path) -> None:
    root = write_data(tmp_path, gray_16(1023))
    report = fusedet.check_dataset(data=root).reports["train"]
    assert not report.errors
    (warning,) = (w for w in report.warnings if "16 bits" in w)
    assert "2 images of 16 bits with values from 0 to 102" in warning
    assert "set data.range=[0,1023] if these are 10-bit data" in warning
    report = fusedet.check_dataset(data={"path": root, "range": [0, 1023]}).reports["train"]
    assert not any("bits" in w or "range" in w for w in report.warnings)
    full = write_data(tmp_path / "full", gray_16(65535))
    assert not any("16 bits" in w for w in fusedet.check_dataset(data=full).reports["train"].warnings)


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "L", "YCbCr"])
def test_values_are_those_of_what_is_shown(mode: str) -> None:
    """Not the numbers of a palette's colors, nor of ink."""
    file = io.BytesIO()
    image = Image.new("RGB", (8, 6), "white")
    image.paste("black", (0, 0, 4, 6))
    image.convert(mode).save(file, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    if (opened := Image.open(file).mode) != mode:
        pytest.skip(f"Pillow {PIL.__version__}, older than 13, takes an uncompressed TIFF of {mode} for {opened}")
    values = inspect_image(file.getvalue())[1]
    assert values is not None
    assert (values.low, values.high, values.depth) == (0, 255, 8)


def test_doctor_warns_of_dark_and_transparent_images(tmp_path: Path) -> None:
    mask = store((np.arange(1200).reshape(30, 40) % 2).astype(np.uint8))  # a mask of 0 and 1
    rgba = np.full((10, 20, 4), 255, np.uint8)
    rgba[:5, :, 3] = 0
    root = write_data(tmp_path, {"b.png": mask, "a.png": store(rgba)})
    warnings = fusedet.check_dataset(data=root).reports["train"].warnings
    assert any("1 image of 8 bits with values from 0 to 1 only" in w and "b.png" in w for w in warnings)
    assert any("transparent pixels, up to 50 % of an image" in w and "a.png" in w for w in warnings)


def test_the_loader_uses_the_range(tmp_path: Path) -> None:
    from fusedet.data.loader import build_eval_loader
    from fusedet.data.transforms import EvalTransform

    config = Config(data={"path": str(write_data(tmp_path, gray_16(1023))), "range": [0, 1023]})
    dataset = read_split(config.data, "val")
    brightest = [int(b.images.max()) for b in build_eval_loader(dataset, EvalTransform(30, 40), batch=1)]
    assert min(brightest) > 250
    plain = read_split(config.data.replace(range=None), "val")
    assert max(int(b.images.max()) for b in build_eval_loader(plain, EvalTransform(30, 40), batch=1)) <= 4


def test_training_warns_of_the_measured_range(tmp_path: Path) -> None:
    config = Config(data={"path": str(write_data(tmp_path, gray_16(4095)))})
    dataset = read_split(config.data, "train")
    said: list[str] = []
    require_usable_images(dataset, dataset, max_bad_share=0.0, warn=said.append)
    (line,) = said
    assert "of the first 2 training images: 2 images of 16 bits with values from 1 to 4093" in line
    assert "data.range=[0,4095]" in line
    said.clear()
    ranged = read_split(config.data.replace(range=(0.0, 4095.0)), "train")
    require_usable_images(ranged, ranged, max_bad_share=0.0, warn=said.append)
    assert not said


def test_range_is_checked() -> None:
    with pytest.raises(InputError, match=r"data\.range.*low < high"):
        fusedet.resolve_config("retinanet_r18_small", ["data.range=[255,0]"])
    assert fusedet.resolve_config("retinanet_r18_small", ["data.range=[0,4095]"]).data.range == (0, 4095)


def test_range_for_images_in_memory() -> None:
    image = Image.fromarray((RAMP / RAMP.max()).astype(np.float32))
    assert int(to_tensor(image, (0, 1)).max()) == 255
    with pytest.raises(InputError, match="the PIL image holds floating-point numbers from 0 to 1"):
        to_tensor(image)


# -- formats that Pillow reads with a plug-in only


def test_heic_without_its_plug_in(tmp_path: Path) -> None:
    if ".heic" in image_opening.Image.registered_extensions():
        pytest.skip("pillow-heif is installed")
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(InputError, match="not an image in a format that Pillow reads: pip install pillow-heif"):
        read_image(tmp_path / "a.heic")
    (tmp_path / "b.CR2").write_bytes(b"II*\0")
    with pytest.raises(InputError, match=r"matches no image: not read.*\.heic \(1\).*pip install pillow-heif"):
        Sources([str(tmp_path)])
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    sources = Sources([str(tmp_path)])
    assert [path.name for path in sources] == ["c.png"]
    assert sources.count_left_out() == {".heic": 1, ".cr2": 1}


def test_heic_is_read_by_its_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of pillow-heif's name and interface is asked to register its opener, before formats are listed."""
    called = []
    module = types.ModuleType("pillow_heif")
    module.register_heif_opener = lambda: called.append(True)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    assert "PNG" in image_opening.get_image_formats.__wrapped__()
    assert called == [True]


def test_heic_image(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    rgb = np.full((40, 64, 3), (200, 40, 90), np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.heic", quality=95)
    image_opening.get_image_formats.cache_clear()
    assert read_image_size(tmp_path / "a.heic") == (40, 64)
    assert (read_image(tmp_path / "a.heic").float().mean((1, 2)) - torch.tensor([200.0, 40, 90])).abs().max() < 5
