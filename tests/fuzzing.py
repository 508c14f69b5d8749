"""Malformed files for every parser, which may raise InputError and nothing else."""

# ruff: noqa: SIM905  # a list of many short words is easier to read as a text
from __future__ import annotations

import copy
import json
import random
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st

from fusedet import config as configs
from fusedet.api.detector_evaluation import evaluate_results
from fusedet.api.worst_images import draw_worst_images
from fusedet.data.collate import make_samples
from fusedet.data.dataset import DetectionDataset
from fusedet.data.readers.coco import read_coco
from fusedet.data.readers.voc import parse_voc_xml, read_voc
from fusedet.data.readers.yolo import read_yolo
from fusedet.data.segmentation import count_rle_pixels, fits_image, pack_coco_segmentation
from fusedet.data.transforms import EvalTransform, decode_mask
from fusedet.data.validation import validate_split
from fusedet.errors import InputError
from fusedet.evaluation import load_results
from tiny import coco_dict, write_coco, write_voc, write_yolo, xml

ATOMS: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 9, 2**31, 2**63, -(2**63) - 1, 10**40, 0.5, -0.5, 1e308, -1e308, 1e-320),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        "0",
        "-1",
        "1e3",
        "nan",
        "٣",
        "a.jpg",
        "../a.jpg",
        "/etc/passwd",
        "\0",
        "\ud800",
    ),
    *(
        [],
        {},
        [[]],
        [{}],
        [1, 2, 3, 4],
        [1, 2, float("nan"), 4],
        ["1", "2", "3", "4"],
        [[1, 1, 5, 1, 5, 5]],
        [[1e9] * 6],
        [0, 10**9],
    ),
    *({"counts": [1], "size": [1, 1]}, {"counts": "X6", "size": [10, 20]}, {"counts": "~", "size": [10, 20]}),
]
JUNK = rb"""[ ] { } , : " \ ' - 1e999 NaN < & &a; <!DOCTYPE <![CDATA[ <?xml?> ]]> / .. *a""".split()
JUNK += [b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"9" * 400, b"\n", b"\r", b"\t", b"\x85", b"&a ", b"!!int "]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(ATOMS),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "bbox", "images", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)
SEEDS = st.integers(0, 2**40)


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The addresses of all values in a tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in inner for place in ((*at, key), *places(value, (*at, key)))]


def changed(tree: Any, rng: random.Random, value: Any) -> Any:
    """The tree with one of its values replaced, taken away, doubled, or exchanged for another of its values."""
    tree = copy.deepcopy(tree)
    addresses = places(tree)
    if not addresses:
        return value
    *path, key = rng.choice(addresses)
    parent = tree
    for step in path:
        parent = parent[step]
    way = rng.randrange(5)
    if way == 0:
        del parent[key]
    elif way == 1 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    elif way == 2:
        other = tree
        for step in rng.choice(addresses):
            with suppress(Exception):  # what was just changed may be on the way
                other = other[step]
        parent[key] = copy.deepcopy(other)
    else:
        parent[key] = value if way == 3 else rng.choice(ATOMS)
    return tree


def damaged(text: bytes, rng: random.Random) -> bytes:
    """Bytes put in, taken away, exchanged or cut off."""
    at = rng.randrange(len(text) + 1)
    if rng.random() < 0.1:
        return text[:at]
    return text[:at] + rng.choice(JUNK) + text[at + rng.choice([0, 0, 1, 2, 5, 20]) :]


def used(read: Callable[[], DetectionDataset]) -> None:
    """Read, and if that goes well, look at everything as a training does; InputError is what may come out."""
    with suppress(InputError):
        dataset = read()
        validate_split(dataset, (64, 64), read_images=False)
        assert len(dataset.fingerprint()) == 16
        for record in dataset:
            if record.height * record.width < 1 << 14:
                make_samples(
                    torch.zeros(3, record.height, record.width, dtype=torch.uint8),
                    record,
                    [EvalTransform(32, 64)],
                    masks=all(record.segmentations),
                )


def check_coco(seed: int, value: Any, count: int) -> None:
    """A valid COCO file with some values changed, and at times some bytes."""
    rng = random.Random(seed)
    tree = coco_dict()
    for _ in range(count):
        tree = changed(tree, rng, value)
    text = json.dumps(tree).encode("utf-8", "surrogatepass")
    for _ in range(rng.choice([0, 0, 1, 3])):
        text = damaged(text, rng)
    _coco(text)


def check_json(tree: Any) -> None:
    """Any json at all, and the sections of a COCO file with anything in them."""
    _coco(json.dumps(tree).encode())
    _coco(json.dumps({"images": tree, "annotations": tree, "categories": tree}).encode())
    _coco(json.dumps(coco_dict() | {"annotations": tree}).encode())


def _coco(text: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = write_coco(Path(folder))
        file = root / "annotations" / "instances_train2017.json"
        file.write_bytes(text)
        used(lambda: read_coco(file, root / "train2017"))


def check_voc(seed: int, count: int) -> None:
    """A valid VOC folder with some bytes of its annotations and its list changed."""
    rng = random.Random(seed)
    one = xml(("dog", 1, 1, 10, 20, 0), ("cat", 5.5, 6.5, 8.5, 9.5, 1)).encode()
    tokens = b"1 nan -1e999 <a> </object> <bndbox> <object><name>x</name></object> \xd9\xa3".split()
    tokens += [b"", b"9" * 400]
    listed = b"a\nb\n"
    for _ in range(count):
        if rng.random() < 0.5 and one:
            begin = one.find(b">", rng.randrange(len(one))) + 1
            one = one[:begin] + rng.choice(tokens) + one[one.find(b"<", begin) if rng.random() < 0.7 else begin :]
        elif rng.random() < 0.8:
            one = damaged(one, rng)
        else:
            listed = damaged(listed, rng)
    with tempfile.TemporaryDirectory() as folder:
        root = write_voc(Path(folder))
        (root / "Annotations" / "a.xml").write_bytes(one)
        (root / "ImageSets" / "Main" / "train.txt").write_bytes(listed)
        with suppress(InputError):
            parse_voc_xml(str(root / "Annotations" / "a.xml"))
        used(lambda: read_voc(root, "train"))


def check_yolo(seed: int, count: int) -> None:
    """A valid YOLO folder with its labels, its yaml and its list changed."""
    rng = random.Random(seed)
    tokens = ["", *"0 1 0.5 -0.5 1.7 nan inf -inf 1e400 1e9 x 0x1 1_0 ٣ 0,5".split(), "1" * 400]
    lines = [
        " ".join(rng.choice(tokens) for _ in range(rng.choice([1, 4, 5, 5, 5, 6, 7, 9])))
        for _ in range(rng.randrange(4))
    ]
    texts = [
        "\n".join(lines).encode(),
        b"train: list.txt\nval: images/val\nnc: 2\nnames: [dog, cat]\n",
        b"./images/train/a.jpg\n",
    ]
    for _ in range(count):
        which = rng.randrange(3)
        texts[which] = damaged(texts[which], rng)
    with tempfile.TemporaryDirectory() as folder:
        file = write_yolo(Path(folder), texts[0])
        file.write_bytes(texts[1])
        (Path(folder) / "list.txt").write_bytes(texts[2])
        used(lambda: read_yolo(file, "train"))


FOUND: list[Any] = [
    {
        "image_id": 3,
        "category_id": 9,
        "bbox": [1, 2, 3, 4],
        "score": 0.9,
        "segmentation": {"size": [10, 20], "counts": [0, 3, 197]},
    },
    {
        "image_id": 7,
        "category_id": 2,
        "bbox": [5, 6, 10, 12],
        "score": 0.5,
        "segmentation": {"size": [30, 40], "counts": ":n0XT1"},
    },
]


def check_results(seed: int, value: Any, count: int) -> None:
    """Change values, and at times bytes, of a valid file of results; evaluate it by boxes and masks, and draw it."""
    rng = random.Random(seed)
    tree: Any = FOUND
    for _ in range(count):
        tree = changed(tree, rng, value)
    text = json.dumps(tree).encode("utf-8", "surrogatepass")
    for _ in range(rng.choice([0, 0, 1, 3])):
        text = damaged(text, rng)
    score_results(text)


def score_results(text: bytes) -> bool:
    """As `fusedet val RESULTS.json` does; whether they could be scored."""
    truth = coco_dict()
    for row in truth["annotations"]:
        row.setdefault("segmentation", [[1, 1, 6, 1, 6, 6]])
    with tempfile.TemporaryDirectory() as folder, suppress(InputError):
        root = write_coco(Path(folder), truth)
        dataset = read_coco(root / "annotations" / "instances_train2017.json", root / "train2017")
        (root / "found.json").write_bytes(text)
        results = load_results(root / "found.json")
        evaluate_results(dataset, results, configs.Test(), voc=True)
        draw_worst_images(dataset, results)
        return True
    return False


RLES = st.fixed_dictionaries(
    {
        "size": st.lists(st.integers(-1, 12), min_size=2, max_size=2),
        "counts": st.lists(st.integers(-3, 40), max_size=6)
        | st.text("0123456789:;<=>?@ABCDEabcdeklmno~ \x7fé", max_size=8),
    }
)


def check_rle(rle: dict[str, Any], size: tuple[int, int]) -> None:
    """A run-length code that is taken can be drawn, and covers its image."""
    segmentation = pack_coco_segmentation(rle)
    if not fits_image(segmentation, size):
        return
    assert count_rle_pixels(rle["counts"]) == size[0] * size[1]
    record: Any = SimpleNamespace(segmentations=[rle], width=size[1], height=size[0], path="x.jpg")
    assert decode_mask(record, 0).shape == size


KEYS = st.sampled_from(
    [f"{section}.{key}" for section, part in configs.parse({}).tree().items() if isinstance(part, dict) for key in part]
    + [
        "",
        *"model data train model.head.convs model.neck.0 model.neck.0.type model.pyramid.channels device out x .".split(),
    ]
)
VALUES = st.sampled_from(
    "null true 1 -1 0 1e400 nan .inf [] {} [1,2] {a:b} x ' [ ${a} ${oc.env:HOME} !!int".split()
    + ["{a: b}", "!!float x", "&a [*a]"]
)


def check_overrides(pairs: list[tuple[str, str]], texts: list[str]) -> None:
    """A command line with any options."""
    with suppress(InputError):
        configs.load("retinanet_tiny", [*(f"{key}={value}" for key, value in pairs), *texts])


def check_config(seed: int, count: int) -> None:
    """A config file with some bytes changed."""
    rng = random.Random(seed)
    text = b"base: retinanet_tiny\nmodel:\n  neck: [fpn]\n  pyramid: {channels: 64}\ntrain:\n  epochs: 7\n  milestones: [1, 2]\n"
    for _ in range(count):
        text = damaged(text, rng)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mine.yaml"
        file.write_bytes(text)
        with suppress(InputError):
            configs.load(file)
