"""Images of other channels than RGB: TIFF and npy files of 1 to N channels, from the file to a trained detector."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fusedet import check_dataset, cli, load
from fusedet.api.export import export
from fusedet.config import parse
from fusedet.data.channel_decoding import read_channels
from fusedet.data.image_decoding import read_image
from fusedet.data.loader import build_train_loader
from fusedet.data.splits import read_split
from fusedet.data.synthetic import generate_dataset
from fusedet.data.tiling import tile_dataset
from fusedet.data.transforms import TrainTransform
from fusedet.data.validation import require_usable_images
from fusedet.errors import InputError
from fusedet.models.backbones import TimmBackbone
from shared_fixtures import SMALL

pytestmark = pytest.mark.usefixtures("unrendered")

NOISE = np.random.default_rng(0).integers(0, 256, (40, 50, 5), dtype=np.uint8)


def planes(image):
    return image.permute(1, 2, 0).numpy()


def write_arrays(folder: Path, values: np.ndarray, box: tuple[int, ...] = (5, 5, 20, 20), turned: bool = False) -> Path:
    """COCO data of one npy file per split, with one box; `turned` swaps its annotated width and height."""
    (folder / "annotations").mkdir(parents=True)
    height, width = values.shape[:2][:: -1 if turned else 1]
    for k, split in enumerate(("train", "val")):
        np.save(folder / f"{split}.npy", values + values.dtype.type(k))
        content = {
            "images": [{"id": 1, "file_name": f"{split}.npy", "height": height, "width": width}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "iscrowd": 0}],
            "categories": [{"id": 1, "name": "car"}],
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_arrays(tmp_path, channels):
    values, path = NOISE[..., :channels], tmp_path / "image.npy"
    np.save(path, values)
    assert np.array_equal(planes(read_channels(path, channels)), values)
    assert np.array_equal(planes(read_channels(path.read_bytes(), channels)), values)
    assert np.array_equal(planes(read_channels(path, channels, window=(3, 5, 20, 11))), values[5:11, 3:20])


def test_an_array_without_a_third_axis_has_one_channel(tmp_path):
    np.save(tmp_path / "image.npy", NOISE[..., 0])
    assert np.array_equal(planes(read_channels(tmp_path / "image.npy", 1)), NOISE[..., :1])


def test_values_of_more_bits_by_hand(tmp_path):
    deep = np.array([[0, 257, 65535], [1000, 500, 2000]], np.uint16)
    np.save(tmp_path / "deep.npy", deep)
    assert read_channels(tmp_path / "deep.npy", 1)[0].tolist() == [[0, 1, 255], [4, 2, 8]]
    assert read_channels(tmp_path / "deep.npy", 1, (0, 1000))[0].tolist() == [[0, 66, 255], [255, 128, 255]]
    np.save(tmp_path / "real.npy", np.array([[0.0, 0.5], [1.0, 2.0]]))
    assert read_channels(tmp_path / "real.npy", 1, (0, 1))[0].tolist() == [[0, 128], [255, 255]]
    with pytest.raises(InputError, match=r"real\.npy holds float64 numbers.*: set data\.range"):
        read_channels(tmp_path / "real.npy", 1)


def test_sixteen_bits_of_which_a_part_is_used(tmp_path):
    data = [f"data={write_arrays(tmp_path, NOISE[..., :4].astype(np.uint16) * 11)}", "data.channels=4"]
    report = check_dataset(*data)
    assert report.ok
    assert any("of 16 bits with values from 0 to 2805 only" in text for text in report.reports["train"].warnings)
    assert "widen data.range" in str(check_dataset(*data, "data.range=[0,1000]").reports["train"].warnings)
    config = parse({"data": {"path": str(tmp_path), "channels": 4}}).data
    warnings: list[str] = []
    splits = (read_split(config, split) for split in ("train", "val"))
    require_usable_images(*splits, max_bad_share=0, warn=warnings.append)
    assert len(warnings) == 1
    assert "set data.range=[0,4095]" in warnings[0]


@pytest.mark.parametrize(("box", "turned"), [((5, 5, 70, 20), False), ((5, 5, 20, 20), True)])
def test_arrays_have_no_orientation(tmp_path, box, turned):
    """A box far outside and a swapped size make other images be read as they are stored."""
    data = write_arrays(tmp_path, NOISE[..., :4], box, turned)
    report = check_dataset(f"data={data}", "data.channels=4")
    assert report.ok is not turned
    assert [error.partition(".npy ")[2] for error in report.reports["train"].errors] == [
        "is 50x40 pixels, but its annotation says 40x50"
    ] * turned


def test_pages_of_a_tiff_are_channels(tmp_path):
    pages = [Image.fromarray(NOISE[..., k]) for k in range(5)]
    pages[0].save(tmp_path / "pages.tiff", save_all=True, append_images=pages[1:])
    assert np.array_equal(planes(read_channels(tmp_path / "pages.tiff", 5)), NOISE)


def test_a_fourth_channel_is_no_transparency(tmp_path):
    Image.fromarray(NOISE[..., :4]).save(tmp_path / "four.tiff")
    assert np.array_equal(planes(read_channels(tmp_path / "four.tiff", 4)), NOISE[..., :4])
    Image.fromarray(NOISE[..., :3]).save(tmp_path / "three.png")
    assert torch.equal(read_channels(tmp_path / "three.png", 3), read_image(tmp_path / "three.png"))


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("meaning", [0, 1, 2])
def test_a_fourth_channel_of_any_meaning(tmp_path, meaning, compression):
    """ExtraSamples of TIFF: 0 unspecified, 1 associated alpha, 2 alpha."""
    path, image = tmp_path / "four.tiff", Image.fromarray(NOISE[..., :4])
    image.save(path, compression=compression)
    content = path.read_bytes()
    entry = struct.pack("<HHI", 338, 3, 1)
    assert content.count(entry) == 1
    path.write_bytes(content.replace(entry + b"\2", entry + bytes([meaning])))
    assert Image.open(path).tag_v2[338] == (meaning,)
    assert np.array_equal(planes(read_channels(path, 4)), NOISE[..., :4])


def test_pages_of_more_channels_than_pillow_reads(tmp_path):
    tags = [(256, 4, 5), (257, 4, 4), (258, 3, 8), (259, 3, 1), (262, 3, 2), (273, 4, 0), (277, 3, 5), (278, 4, 4)]
    tags += [(279, 4, 100), (338, 3, 0)]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = [
        struct.pack("<HHII", tag, kind, 2 if tag == 338 else 1, start if tag == 273 else value)
        for tag, kind, value in tags
    ]
    header = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(entries) + bytes(4)
    (tmp_path / "five.tiff").write_bytes(header + NOISE[:4, :5].tobytes())
    with pytest.raises(InputError, match=r"five\.tiff has a page of 5 channels, of which Pillow reads 3: save it with"):
        read_channels(tmp_path / "five.tiff", 5)
    rgb, gray = (struct.pack("<HHII", 262, 3, 1, value) for value in (2, 1))
    (tmp_path / "grays.tiff").write_bytes(header.replace(rgb, gray))
    with pytest.raises(
        InputError, match=r"grays\.tiff is .* not an image in a format that Pillow reads: save other channels than RGB"
    ):
        read_channels(tmp_path / "grays.tiff", 5)


def test_a_turned_image_with_one_channel(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(NOISE[..., 0]).save(tmp_path / "turned.jpg", exif=exif)
    assert read_channels(tmp_path / "turned.jpg", 1).shape == (1, 50, 40)
    assert read_channels(tmp_path / "turned.jpg", 1, exif=False).shape == (1, 40, 50)


def test_files_that_cannot_be_read(tmp_path):
    np.save(tmp_path / "image.npy", NOISE)
    cases = {
        "absent.npy": "does not exist",
        "cut.npy": "no whole numpy file",
        "objects.npy": "no whole numpy file of numbers",
        "flat.npy": r"must be an array \(H, W\) or \(H, W, C\), it is \(7,\)",
        "image.npy": r"has 5 channels, but data\.channels=4",
    }
    (tmp_path / "cut.npy").write_bytes((tmp_path / "image.npy").read_bytes()[:300])
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "flat.npy", np.zeros(7))
    for name, text in cases.items():
        with pytest.raises(InputError, match=text):
            read_channels(tmp_path / name, 4)
    pages = [Image.new("L", (9, 8)), Image.new("L", (9, 9))]
    pages[0].save(tmp_path / "pages.tiff", save_all=True, append_images=pages[1:])
    with pytest.raises(InputError, match="pages of several sizes"):
        read_channels(tmp_path / "pages.tiff", 2)


def test_the_backbone_takes_the_channels():
    rgb, four = (TimmBackbone("lcnet_050", pretrained=False, channels=channels) for channels in (3, 4))
    assert four.scale.shape == four.shift.shape == (4, 1, 1)
    assert float(four.scale[0]) == pytest.approx(float(1 / (1 / rgb.scale).mean()))
    assert [m.shape for m in four(torch.zeros(1, 4, 64, 64))] == [m.shape for m in rgb(torch.zeros(1, 3, 64, 64))]
    own = TimmBackbone("lcnet_050", pretrained=False, channels=2, mean=(1.0, 2.0), std=(4.0, 5.0))
    assert own.scale.flatten().tolist() == pytest.approx([0.25, 0.2])
    with pytest.raises(InputError, match=r"mean=\[1\.0\] must have a number for each of the 2 channels"):
        TimmBackbone("lcnet_050", pretrained=False, channels=2, mean=(1.0,))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_weights_of_rgb_are_converted(tmp_path, channels):
    """As timm does: summed for one channel, else repeated and scaled by 3 / C."""
    rgb = TimmBackbone("lcnet_050", pretrained=False)
    torch.save(rgb.body.state_dict(), tmp_path / "rgb.pth")
    loaded = TimmBackbone("lcnet_050", weights=str(tmp_path / "rgb.pth"), channels=channels)
    first, converted = (backbone.body.conv_stem.weight for backbone in (rgb, loaded))
    expected = first.sum(1, keepdim=True) if channels == 1 else first[:, [0, 1, 2, 0][:channels]] * 3 / channels
    assert torch.allclose(converted, expected, atol=1e-6)


def test_wrong_settings():
    with pytest.raises(InputError, match=r"data\.channels=0 must be 1 or more"):
        parse({"data": {"channels": 0}})
    with pytest.raises(InputError, match=r"data\.photometric=True must be false where data\.channels is not 3"):
        parse({"data": {"channels": 4, "photometric": True}})


@pytest.fixture(scope="module")
def multispectral(tmp_path_factory) -> Path:
    """Generated data with a fourth channel, as npy files: two images to train on, two to validate on."""
    folder = tmp_path_factory.mktemp("multispectral")
    splits = {"train": 0.5, "val": 0.5}
    scenes = generate_dataset(tmp_path_factory.mktemp("rgb") / "data", images=4, seed=0, size=(64, 96), splits=splits)
    (folder / "annotations").mkdir()
    for source in sorted((scenes / "annotations").glob("*.json")):
        content = json.loads(source.read_text())
        split = source.stem.removeprefix("instances_")
        images = read_split(parse({"data": {"path": str(scenes)}}).data, split)
        for image, annotated in zip(content["images"], images, strict=True):
            rgb = planes(read_image(annotated.path))
            image["file_name"] = f"{split}_{Path(image['file_name']).stem}.npy"
            np.save(folder / image["file_name"], np.concatenate([rgb, 255 - rgb[..., :1]], axis=2))
        (folder / "annotations" / source.name).write_text(json.dumps(content))
    return folder


def test_tiles_of_arrays(multispectral):
    dataset = read_split(parse({"data": {"path": str(multispectral), "channels": 4}}).data, "train")
    tiles = tile_dataset(dataset, 48, 0.2, 0.3)
    batches = list(build_train_loader(tiles, TrainTransform([48], 48, flip=0), batch=4).epoch(0))
    assert batches
    for batch in batches:
        assert batch.images.shape[1:] == (4, 64, 64)
        inside = batch.images[:, :, :48, :48].int()
        assert (inside[:, 3] == 255 - inside[:, 0]).all()


def test_from_the_file_to_a_detector(multispectral, tmp_path, capsys):
    """doctor, browse, train, val and predict take four channels; export refuses them."""
    out, data = tmp_path / "run", [f"data={multispectral}", "data.channels=4"]
    assert cli.run(["doctor", *data]) == 0, capsys.readouterr()
    assert cli.run(["browse", *data, "data.size=[64,96]", f"out={tmp_path / 'browse.png'}"]) == 0
    level = ["model.pyramid.finest=5", "model.pyramid.coarsest=5"]
    augmentation = ["data.scale_jitter=[0.5,2]", "data.mosaic=0.5"]
    assert cli.run(["train", "retinanet_tiny", *data, f"out={out}", *SMALL, *level, *augmentation]) == 0
    assert cli.run(["val", str(out), f"data={multispectral}", f"out={tmp_path / 'val'}"]) == 0
    image = next(multispectral.glob("val_*.npy"))
    predictor = load(out)
    first = predictor.predict(image)
    second = predictor.predict(np.load(image))
    assert len(first)
    assert torch.equal(first.boxes, second.boxes)
    first.plot(tmp_path / "drawn.png")
    assert cli.run(["predict", str(out), str(image), f"out={tmp_path / 'predicted'}"]) == 0
    with pytest.raises(InputError, match="an image of 4 channels must be"):
        predictor.predict(Image.new("RGB", (64, 64)))
    with pytest.raises(InputError, match="takes images of 4 channels: exported files take RGB images only"):
        export(out, f"out={tmp_path / 'exported'}", formats="torch")


def test_rgb_images_with_four_expected(scenes, tmp_path, capsys):
    arguments = ["train", "retinanet_tiny", f"data={scenes}", "data.channels=4", f"out={tmp_path / 'run'}", *SMALL]
    assert cli.run(arguments) == 2
    assert "has 3 channels, but data.channels=4" in " ".join(capsys.readouterr().err.split())
