"""Decoding of images: modes, EXIF orientation, damaged files."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fusedet.data.image_decoding import read_image, read_image_size, to_tensor
from fusedet.errors import InputError

HEIGHT, WIDTH = 24, 40


@pytest.fixture
def rgb():
    """Smooth colors, so that JPEG keeps them."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x * 6, y * 10, 255 - x * 3], axis=2).astype(np.uint8)


def encoded(source, file_format, **options):
    out = io.BytesIO()
    source.save(out, file_format, **options)
    return out.getvalue()


def close(image, expected, atol=0):
    assert image.dtype == torch.uint8
    assert tuple(image.shape) == (3, HEIGHT, WIDTH)
    assert (image.permute(1, 2, 0).int() - torch.from_numpy(np.array(expected)).int()).abs().max() <= atol


@pytest.mark.parametrize(
    ("file_format", "options", "atol"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("PPM", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95, "subsampling": 0}, 6),
        ("JPEG", {"quality": 95, "progressive": True, "subsampling": 0}, 6),
    ],
)
def test_file_formats(tmp_path, rgb, file_format, options, atol):
    path = tmp_path / "image"
    path.write_bytes(encoded(Image.fromarray(rgb), file_format, **options))
    for source in (path, str(path), path.read_bytes()):
        close(read_image(source), rgb, atol)
        assert read_image_size(source) == (HEIGHT, WIDTH)


def test_gray_binary_and_palette(rgb):
    gray = Image.fromarray(rgb).convert("L")
    close(read_image(encoded(gray, "PNG")), np.repeat(np.array(gray)[..., None], 3, 2))
    binary = gray.point(lambda v: 255 * (v > 100), "1")
    close(read_image(encoded(binary, "PNG")), np.repeat(np.array(binary.convert("L"))[..., None], 3, 2))
    palette = Image.fromarray(rgb).quantize(16)
    close(read_image(encoded(palette, "PNG")), palette.convert("RGB"))
    close(read_image(encoded(palette, "GIF")), palette.convert("RGB"))


def test_transparency_is_composited_over_white(rgb):
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[:, 10:20], alpha[:, 20:] = 128, 255
    over = Image.fromarray(np.dstack([rgb, alpha]))
    weight = alpha[..., None] / 255
    close(read_image(encoded(over, "PNG")), (rgb * weight + 255 * (1 - weight)).astype(np.uint8), atol=1)
    gray = Image.merge("LA", [Image.fromarray(rgb[..., 0]), Image.fromarray(alpha)])
    expected = (rgb[..., :1] * weight + 255 * (1 - weight)).repeat(3, 2).astype(np.uint8)
    close(read_image(encoded(gray, "PNG")), expected, atol=1)


def test_transparent_palette_color_becomes_white():
    palette = Image.new("P", (WIDTH, HEIGHT), 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.paste(0, (0, 0, 8, HEIGHT))
    image = read_image(encoded(palette, "PNG", transparency=0))
    assert image[:, 0, 0].tolist() == [255, 255, 255]
    assert image[:, 0, 20].tolist() == [200, 100, 50]


def test_transparent_color_of_an_rgb_png_becomes_white():
    source = Image.new("RGB", (WIDTH, HEIGHT), (1, 2, 3))
    source.paste((9, 9, 9), (0, 0, 8, HEIGHT))
    image = read_image(encoded(source, "PNG", transparency=(9, 9, 9)))
    assert image[:, 0, 0].tolist() == [255, 255, 255]
    assert image[:, 0, 20].tolist() == [1, 2, 3]


def test_cmyk(rgb):
    cmyk = Image.fromarray(rgb).convert("CMYK")
    close(read_image(encoded(cmyk, "TIFF")), cmyk.convert("RGB"))
    close(read_image(encoded(cmyk, "JPEG", quality=98, subsampling=0)), cmyk.convert("RGB"), atol=8)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_to_8(file_format):
    deep = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    expected = np.rint(deep / 257).astype(np.uint8)
    close(read_image(encoded(Image.fromarray(deep), file_format)), np.repeat(expected[..., None], 3, 2))


def test_16_bit_color_is_scaled_to_8(rgb):
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in rgb)
    close(read_image(png(WIDTH, HEIGHT, rows, depth=16, color=2)), rgb)


def png(width, height, rows, depth=8, color=0):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(rgb, file_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = encoded(Image.fromarray(rgb), file_format, exif=exif)
    image = read_image(stored)
    # the meaning of each value, by EXIF: the position of the stored first row and column in the upright image
    rows_cols = {
        1: rgb,
        2: rgb[:, ::-1],
        3: rgb[::-1, ::-1],
        4: rgb[::-1],
        5: rgb.transpose(1, 0, 2),
        6: np.rot90(rgb, -1),
        7: rgb.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(rgb, 1),
    }
    expected = torch.from_numpy(rows_cols[orientation].copy())
    assert read_image_size(stored) == tuple(image.shape[1:]) == tuple(expected.shape[:2])
    assert (image.permute(1, 2, 0).int() - expected.int()).abs().max() <= (0 if file_format in ("PNG", "TIFF") else 40)
    assert (image.permute(1, 2, 0).int() - expected.int()).abs().float().mean() < 6
    assert torch.equal(to_tensor(Image.open(io.BytesIO(stored))), image)
    reference = ImageOps.exif_transpose(Image.open(io.BytesIO(stored))).convert("RGB")
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(reference))


def test_missing_file(tmp_path):
    for read in (read_image, read_image_size, to_tensor):
        with pytest.raises(InputError, match=r"gone\.jpg does not exist"):
            read(tmp_path / "gone.jpg")


@pytest.mark.parametrize("content", [b"", b"not an image at all", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_not_an_image(tmp_path, content):
    path = tmp_path / "text.jpg"
    path.write_bytes(content)
    for read in (read_image, read_image_size):
        with pytest.raises(InputError, match=r"text\.jpg is (empty or not an image|truncated or damaged)"):
            read(path)


def test_folder(tmp_path):
    with pytest.raises(InputError, match=str(tmp_path)):
        read_image(tmp_path)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF"])
def test_truncated_anywhere(file_format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), file_format)
    for part in (0.1, 0.3, 0.5, 0.7, 0.9):
        with pytest.raises(InputError, match="the image of"):
            read_image(whole[: int(len(whole) * part)])


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged tags
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM"])
def test_damage_gives_an_input_error_or_an_image(file_format):
    rng = np.random.default_rng(0)
    whole = encoded(Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)), file_format)
    for _ in range(60):
        bad = bytearray(whole)
        for at in rng.integers(0, min(len(bad), 400), 4):
            bad[at] = rng.integers(256)
        with contextlib.suppress(InputError):
            assert read_image(bytes(bad)).dtype == torch.uint8


def test_no_pixels():
    with pytest.raises(InputError):
        read_image(png(0, 0, b""))
    with pytest.raises(InputError, match="no pixels"):
        to_tensor(np.zeros((0, 4, 3), np.uint8))
    with pytest.raises(InputError, match="no pixels"):
        to_tensor(torch.zeros(3, 0, 4))
    with pytest.raises(InputError, match="no pixels"):
        to_tensor(Image.new("RGB", (0, 4)))


def test_arrays_and_tensors(rgb):
    close(to_tensor(rgb), rgb)
    close(to_tensor(rgb[:, :, 0]), rgb[:, :, :1].repeat(3, 2))
    close(to_tensor(rgb[:, ::-1]), rgb[:, ::-1])
    image = torch.from_numpy(rgb).permute(2, 0, 1)
    close(to_tensor(image), rgb)
    close(to_tensor(image / 255), rgb)
    close(to_tensor((image / 255).double()), rgb)
    close(to_tensor(Image.fromarray(rgb)), rgb)
    read_only = rgb.copy()
    read_only.flags.writeable = False
    to_tensor(read_only)[:] = 0
    close(to_tensor(read_only), rgb)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros(4, np.uint8),
        torch.zeros(4, 4),
        torch.zeros(1, 4, 4),
        torch.zeros(4, 4, 3),
        torch.zeros(3, 4, 4, dtype=torch.int64),
        torch.full((3, 4, 4), 1.5),
        torch.full((3, 4, 4), float("nan")),
        None,
        3,
    ],
)
def test_anything_else_is_refused(bad):
    with pytest.raises(InputError):
        to_tensor(bad)


def test_real_images_equal_pillow(shared):
    for path in sorted((shared / "data/coco_tiny/val2017").glob("*.jpg"))[:8]:
        with Image.open(path) as source:
            assert np.array_equal(read_image(path).permute(1, 2, 0).numpy(), np.array(source.convert("RGB")))
