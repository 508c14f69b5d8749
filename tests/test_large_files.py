"""Large compressed files: TIFF by strips and tiles, JPEG and PNG in little memory, and a prediction's peak memory."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from fusedet.data import image_decoding, large_images
from fusedet.data.image_decoding import read_image
from fusedet.data.image_windows import decodes_windows
from fusedet.data.large_images import open_large_image
from fusedet.data.tiff_parts import read_layout
from fusedet.errors import InputError

HEIGHT, WIDTH = 150, 211
WINDOWS = [(0, 0, WIDTH, HEIGHT), (13, 7, 50, 20), (60, 40, 200, 150), (210, 149, 211, 150), (64, 48, 128, 96)]


def draw(channels: int = 3) -> np.ndarray:
    """Smooth noise, which JPEG keeps."""
    small = np.random.default_rng(0).integers(0, 256, (15, 21, 4), dtype=np.uint8)
    return np.asarray(Image.fromarray(small, "RGBA").resize((WIDTH, HEIGHT)))[..., :channels]


def write_tiles(path: Path, pixels: np.ndarray, width: int, height: int, endian: str = "II") -> None:
    """A TIFF file of deflated tiles, which Pillow does not write."""
    rows, columns = -(-pixels.shape[0] // height), -(-pixels.shape[1] // width)
    padded = np.zeros((rows * height, columns * width, 3), np.uint8)
    padded[: pixels.shape[0], : pixels.shape[1]] = pixels
    blocks = [
        zlib.compress(padded[y * height : (y + 1) * height, x * width : (x + 1) * width].tobytes())
        for y in range(rows)
        for x in range(columns)
    ]
    tags = TiffImagePlugin.ImageFileDirectory_v2(prefix=endian.encode())
    tags[256], tags[257], tags[258], tags[259] = pixels.shape[1], pixels.shape[0], (8, 8, 8), 8
    tags[262], tags[277], tags[284], tags[322], tags[323] = 2, 3, 1, width, height
    counts = [len(block) for block in blocks]
    for tag in (324, 325):
        tags.tagtype[tag] = 4
    tags[325] = tuple(counts)
    tags[324] = (0,) * len(counts)
    head = io.BytesIO()
    tags.save(head)
    begin = len(head.getvalue())
    tags[324] = tuple(begin + sum(counts[:i]) for i in range(len(counts)))
    head = io.BytesIO()
    tags.save(head)
    assert len(head.getvalue()) == begin
    path.write_bytes(head.getvalue() + b"".join(blocks))


def require_equal_windows(path: Path, whole: torch.Tensor) -> None:
    for window in WINDOWS:
        left, top, right, bottom = window
        assert torch.equal(read_image(path, window=window), whole[:, top:bottom, left:right]), window


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize("tags", [{}, {278: 16}, {278: 7, 317: 2}], ids=["one strip", "16 rows", "7 rows, predictor"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_windows_of_strips(compression: str, tags: dict[int, int], channels: int, tmp_path: Path) -> None:
    """They equal the windows of the file as Pillow decodes it whole."""
    if compression == "jpeg" and tags:
        tags = {278: 16}
    file = tmp_path / "image.tif"
    pixels = draw(channels)
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(file, compression=compression, tiffinfo=tags)
    assert decodes_windows(file)
    require_equal_windows(file, read_image(file))


def test_windows_of_sixteen_bits(tmp_path: Path) -> None:
    values = draw()[..., 0].astype(np.uint16) * 200
    Image.fromarray(values).save(tmp_path / "image.tif", compression="tiff_lzw", tiffinfo={278: 16})
    require_equal_windows(tmp_path / "image.tif", read_image(tmp_path / "image.tif"))


@pytest.mark.parametrize("endian", ["II", "MM"])
@pytest.mark.parametrize(("width", "height"), [(64, 48), (256, 16), (16, 160)])
def test_windows_of_tiles(width: int, height: int, endian: str, tmp_path: Path) -> None:
    file, pixels = tmp_path / "image.tif", draw()
    write_tiles(file, pixels, width, height, endian)
    whole = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(read_image(file), whole), "Pillow reads what the test wrote"
    assert decodes_windows(file)
    require_equal_windows(file, whole)


def test_only_the_parts_of_a_window_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 x 4 tiles, a window inside the second of a row needs one; a damaged other one does not matter."""
    file, pixels = tmp_path / "image.tif", draw()
    write_tiles(file, pixels, 64, 48)
    with Image.open(file) as image:
        layout = read_layout(image)
    assert layout is not None
    content = bytearray(file.read_bytes())
    content[layout.offsets[0] : layout.offsets[0] + 9] = b"\xff" * 9
    file.write_bytes(content)
    part = read_image(file, window=(70, 5, 120, 40))
    assert torch.equal(part, torch.from_numpy(pixels).permute(2, 0, 1)[:, 5:40, 70:120])
    with pytest.raises(InputError, match=r"image\.tif is truncated or damaged"):
        read_image(file, window=(0, 0, 70, 40))


@pytest.mark.parametrize("kind", ["planar", "counts", "huge strip", "palette", "one bit"])
def test_other_layouts_are_decoded_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "image.tif"
    image = Image.fromarray(draw())
    image = image.convert({"palette": "P", "one bit": "1"}.get(kind, "RGB"))
    image.save(file, compression="tiff_adobe_deflate", tiffinfo={278: 16})
    if kind == "huge strip":
        monkeypatch.setattr("fusedet.data.tiff_parts._MOST", 16 * WIDTH - 1)
    with Image.open(file) as opened:
        tags: Any = opened.tag_v2  # type: ignore[attr-defined]
        if kind == "planar":
            tags[284] = 2
        if kind == "counts":
            tags[279] = tags[279][:-1]
        assert read_layout(opened) is None
        if kind in ("palette", "one bit"):
            assert not decodes_windows(file)


def test_turned_compressed_files_are_decoded_whole(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(draw()).save(tmp_path / "image.tif", compression="tiff_lzw", exif=exif)
    assert not decodes_windows(tmp_path / "image.tif")
    assert read_image(tmp_path / "image.tif", window=(0, 0, 20, 30)).shape == (3, 30, 20)


@pytest.mark.parametrize(("kept", "expected"), [(2**20, 2), (0, 6)])
def test_rows_are_decoded_once(kept: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of windows side by side; where rows would take too much memory, each window is decoded."""
    monkeypatch.setattr(large_images, "LARGE", 0)
    monkeypatch.setattr(large_images, "_KEPT", kept)
    file, pixels = tmp_path / "image.tif", draw()
    Image.fromarray(pixels).save(file, compression="tiff_lzw", tiffinfo={278: 16})
    whole = torch.from_numpy(pixels).permute(2, 0, 1)
    large = open_large_image(file, 3)
    assert large is not None
    decoded: list[Any] = []
    monkeypatch.setattr(
        large_images, "read_image", lambda *args, **options: (decoded.append(args), read_image(*args, **options))[1]
    )
    for top in (0, 70):
        for left in (0, 55, 111):
            part = large.crop((left, top, left + 100, top + 80))
            assert torch.equal(part, whole[:, top : top + 80, left : left + 100])
    assert len(decoded) == expected


LEAN = {
    "4:2:0": ("JPEG", {"quality": 92}),
    "4:4:4": ("JPEG", {"quality": 80, "subsampling": 0}),
    "4:2:2": ("JPEG", {"quality": 70, "subsampling": 1}),
    "progressive": ("JPEG", {"progressive": True}),
    "png": ("PNG", {}),
}


@pytest.mark.parametrize("case", LEAN)
def test_large_jpeg_and_png_have_the_pixels_of_pillow(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, options = LEAN[case]
    file = io.BytesIO()
    Image.fromarray(draw()).save(file, format=kind, **options)
    expected = read_image(file.getvalue())
    monkeypatch.setattr(image_decoding, "_LARGE", 0)
    calls: list[Any] = []
    original = image_decoding._decode_large
    monkeypatch.setattr(image_decoding, "_decode_large", lambda source: (calls.append(source), original(source))[1])
    path, cut = tmp_path / "image", tmp_path / "cut"
    path.write_bytes(file.getvalue())
    cut.write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    for source in (file.getvalue(), path):
        lean = read_image(source)
        assert torch.equal(lean, expected)
        assert lean.stride() == expected.stride()
    assert calls == [file.getvalue(), path]
    for source in (cut.read_bytes(), cut):
        with pytest.raises(InputError, match="is truncated or damaged") as error:
            read_image(source)
        assert ".cpp" not in str(error.value)


def test_what_torchvision_would_read_otherwise_stays_with_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gray, CMYK, turned, transparent and deep images."""
    monkeypatch.setattr(image_decoding, "_LARGE", 0)
    monkeypatch.setattr(image_decoding, "_decode_large", lambda source: pytest.fail("not by torchvision"))
    exif = Image.Exif()
    exif[0x0112] = 6
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "JPEG", {"exif": exif}),
        ("RGB", "PNG", {"transparency": (1, 2, 3)}),
        ("RGBA", "PNG", {}),
        ("P", "PNG", {}),
        ("RGB", "BMP", {}),
    ]
    for mode, kind, options in cases:
        file = io.BytesIO()
        Image.fromarray(draw()).convert(mode).save(file, format=kind, **options)
        assert read_image(file.getvalue()).shape[0] == 3


def measure_peak(kind: str, side: int) -> float:
    """Return the peak memory in GiB of predicting a square image, which is at most two."""
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "large_image.py"
    command = [sys.executable, str(script), "--formats", kind, "--side", str(side), "--limit", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[0])["peak_gib"]


@pytest.fixture(scope="module")
def peak_of_a_small_image() -> float:
    return measure_peak("JPEG", 500)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["JPEG", "TIFF, deflate"])
def test_8000_pixels_need_no_copy_of_the_image(kind: str, peak_of_a_small_image: float) -> None:
    """Decoded, the image has 0.18 GiB; with Pillow, a prediction needs 0.58 GiB more than one of a small image."""
    assert measure_peak(kind, 8000) - peak_of_a_small_image < 0.3


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["JPEG", "TIFF, deflate"])
def test_20000_pixels_need_less_than_two_gib(kind: str) -> None:
    measure_peak(kind, 20_000)
