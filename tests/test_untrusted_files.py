"""Untrusted files: no code in them runs, they cannot fill the memory, and nothing is downloaded unless asked for."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fusedet import cli, config, load
from fusedet.api import load_model
from fusedet.engine import checkpoint
from fusedet.errors import InputError
from fusedet.interop.mmdetection import load_checkpoint
from fusedet.models.backbones.pretrained import create_timm_model
from fusedet.safe_load import HEADER

pytestmark = pytest.mark.usefixtures("unrendered")

SOURCES = sorted(Path(load_model.__file__).parents[1].rglob("*.py"))
MIB = 2**20


# -- what the sources call


def test_weights_are_loaded_without_code() -> None:
    """All else that runs the content of a file (pickle, eval, yaml.load, a shell) is refused by ruff's S rules."""
    texts = {str(path): path.read_text() for path in SOURCES}
    calls = {name: text.count("torch.load") for name, text in texts.items() if "torch.load" in text}
    assert calls == {name: len(re.findall(r"torch\.load\([^()]*weights_only=True\)", texts[name])) for name in calls}
    assert not [
        name for name, text in texts.items() if re.search(r"allow_pickle=True|torch\.(hub\.|jit\.load|package)", text)
    ]


def test_modules_that_import_by_name() -> None:
    """A name becomes a module in the builder, for the chosen evaluator, for HEIF, and lazily for own names."""
    users = {p.name if p.name != "__init__.py" else p.parent.name for p in SOURCES if "import_module" in p.read_text()}
    assert users <= {"build.py", "third_party.py", "launcher.py", "image_opening.py", "fusedet"}


# -- archives


def rewritten(
    source: Path, target: Path, change: Callable[[str, bytes], bytes] = lambda _, data: data, packing: int = 0
) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", packing) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return target


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def readers(path: Path) -> dict[str, Callable[[], Any]]:
    """All functions that read a file of weights."""
    return {
        "checkpoint": lambda: checkpoint.load_weights(path),
        "convert": lambda: load_checkpoint.read_checkpoint(path),
        "backbone": lambda: create_timm_model("lcnet_050", False, str(path), {}),
    }


def peak() -> int:
    """Peak memory of this process in KiB since the last reset."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@contextmanager
def at_most(mib: int) -> Iterator[None]:
    """Assert that the block never holds that much more memory than before."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed inside the heap goes back, for a bomb would fit into it unseen
    Path("/proc/self/clear_refs").write_text("5")  # the most ever becomes what is held now
    before = peak()
    yield
    assert peak() - before < mib * 1024


def test_peak_memory_is_measured() -> None:
    small = [bytearray(100_000) for _ in range(2_000)]
    small = small[-1:]  # 190 MiB are free in the heap, below one piece that stays
    with at_most(64):
        bytearray(32 * MIB)
    for bomb in (lambda: bytearray(96 * MIB), lambda: torch.zeros(96 * MIB, dtype=torch.uint8)):
        with pytest.raises(AssertionError), at_most(64):
            bomb()
    assert len(small) == 1


def refused(path: Path, *texts: str) -> None:
    """Assert that every reader refuses the file, names it, and allocates less than 64 MiB."""
    for name, read in readers(path).items():
        with at_most(64), pytest.raises(InputError) as caught:
            read()
        said = str(caught.value)
        assert path.name in said, name
        assert "\n" not in said
        assert name == "backbone" or any(text in said for text in texts), (name, said)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "good.ckpt", {"model": {"w": torch.ones(3, 2)}, "meta": {}})
    return tmp_path / "good.ckpt"


def test_a_zip_bomb(tmp_path: Path, good: Path) -> None:
    large = tmp_path / "large.ckpt"
    torch.save({"model": {"w": torch.zeros(96 * MIB, dtype=torch.uint8)}}, large)
    bomb = rewritten(large, tmp_path / "bomb.ckpt", packing=zipfile.ZIP_DEFLATED)
    large.unlink()
    assert bomb.stat().st_size < MIB
    refused(bomb, "compressed data")
    refused(rewritten(good, tmp_path / "packed.ckpt", packing=zipfile.ZIP_DEFLATED), "compressed data")
    assert checkpoint.load(rewritten(good, tmp_path / "plain.ckpt"))["model"]["w"].sum() == 6


def test_overlapping_zip_entries(tmp_path: Path, good: Path) -> None:
    path = rewritten(good, tmp_path / "twice.ckpt")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(next(name for name in archive.namelist() if name.endswith("data/0")), b"x" * 24)
    refused(path, "holds a name twice")
    data = bytearray(good.read_bytes())
    at = data.rindex(b"PK\1\2")  # in the last entry of the directory, both sizes become 2 GiB
    data[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    (tmp_path / "claims.ckpt").write_bytes(data)
    refused(tmp_path / "claims.ckpt", "claims more data than it has bytes", "cut short or damaged")


@pytest.mark.parametrize(
    "call",
    [
        Call(bytearray, 2**40),
        Call(torch.Tensor, 2**38),
        Call(torch.FloatTensor, 2**38),
        Call(torch.UntypedStorage, 2**40),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_allocates_memory(tmp_path: Path, call: Call, zipped: bool) -> None:
    torch.save({"model": {"w": call}}, tmp_path / "made.ckpt", _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "made.ckpt", "no checkpoint of weights needs", "is not a fusedet checkpoint")


def test_tensors_larger_than_the_file(tmp_path: Path) -> None:
    one = torch.ones(1)
    for value in (one.expand(10**6, 10**6), torch.sparse_coo_tensor(size=(10**6, 10**6))):
        torch.save({"model": {"w": value}}, tmp_path / "wide.ckpt")
        refused(tmp_path / "wide.ckpt", "MiB of tensors in a file of", "not a plain one", "cannot be read")
    torch.save({"model": {"w": one}, "optimizer": {"state": [{"m": one.expand(10**9)}]}}, tmp_path / "deep.ckpt")
    with pytest.raises(InputError, match=r"3815 MiB of tensors in a file of"):
        checkpoint.load(tmp_path / "deep.ckpt")
    shared = torch.ones(100_000)
    torch.save({"model": {"a": shared, "b": shared}}, tmp_path / "shared.ckpt")
    assert checkpoint.load(tmp_path / "shared.ckpt")["model"].keys() == {"a", "b"}


def test_storage_larger_than_its_entry(tmp_path: Path, good: Path) -> None:
    def claim(name: str, data: bytes) -> bytes:
        return (
            data.replace(b"cpuq\x08K\x06t", b"cpuq\x08J" + struct.pack("<i", 2**30) + b"t")
            if name.endswith("data.pkl")
            else data
        )

    path = rewritten(good, tmp_path / "storage.ckpt", claim)
    assert path.read_bytes() != rewritten(good, tmp_path / "same.ckpt").read_bytes()
    refused(path, "damaged")


def test_code_is_reported_and_not_run(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save(
            {"model": {"w": Call(os.system, f"touch {tmp_path}/ran")}},
            tmp_path / "code.ckpt",
            _use_new_zipfile_serialization=zipped,
        )
        refused(tmp_path / "code.ckpt", "system", "is not a fusedet checkpoint")
    (tmp_path / "pickled.ckpt").write_bytes(pickle.dumps(Call(os.system, f"touch {tmp_path}/ran")))
    refused(tmp_path / "pickled.ckpt", "is not a fusedet checkpoint", "cut short, or not a checkpoint", "system")
    assert not (tmp_path / "ran").exists()


def test_truncated_files_are_refused(tmp_path: Path, good: Path) -> None:
    checkpoint.save_weights(tmp_path / "good.safetensors", {"w": torch.ones(3, 2)}, {"config": "x"})
    for whole in (good, tmp_path / "good.safetensors"):
        data, begun = whole.read_bytes(), tmp_path / f"begun{whole.suffix}"
        for length in range(0, len(data), max(1, len(data) // 150)):
            begun.write_bytes(data[:length])
            said = "is cut short" if length > 1 or begun.suffix != ".ckpt" else "is not a fusedet checkpoint"
            with pytest.raises(InputError, match=said):
                checkpoint.load_weights(begun)


def test_changed_bytes_are_read_or_refused(tmp_path: Path, good: Path) -> None:
    """No other error than an InputError, whichever byte of the pickle or of the archive's directory is changed."""
    data, changed = good.read_bytes(), tmp_path / "changed.ckpt"
    places = [
        *range(data.index(b"\x80\x02"), data.index(b"\x80\x02") + 220),
        *range(data.index(b"PK\1\2"), len(data), 3),
    ]
    outcomes = set()
    for at in places:
        changed.write_bytes(data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1 :])
        try:
            outcomes.add(type(checkpoint.load_weights(changed)))
        except InputError:
            outcomes.add(InputError)
    assert outcomes == {tuple, InputError}


def header(entries: Any, length: int | None = None, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (header({}, 2**40), "claims a header of 1048576 MiB"),
        (header({}, 2**63), "claims a header of"),
        (header({}, HEADER - 1), "cut short"),
        (header({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}), "cut short"),
        (header({"w": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, data=b"1234"), "cut short"),
        (header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}, data=b"12345678"), "cut short"),
        (header({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, data=b"1234"), "cut short"),
        (header({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "vw"}, data=b"1234"), "cut short"),
        (header(b"[" * 100_000), "cut short"),
        (header({"__metadata__": {"config": 3}}), "cut short"),
        (b"", "cut short"),
    ],
    ids=["terabyte", "huge", "longer than the file", "beyond", "overflow", "backwards", "negative", "shared", "deep", "no text", "empty"],
)  # fmt: skip
def test_headers_of_safetensors(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(tmp_path / "x.safetensors", text)


def test_a_large_header(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(safetensors.torch.save({"w": torch.ones(1)}, {"names": "x" * HEADER}))
    refused(tmp_path / "x.safetensors", "claims a header of 16 MiB")


# -- what a checkpoint says of itself


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)
MERGED = "a: &a {k: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi")
)


def with_meta(run: Path, target: Path, **changes: Any) -> Path:
    """Write the run's best weights with other metadata; the config is a text or a function of its tree."""
    state, meta = checkpoint.load_weights(run / "best.safetensors")
    if callable(changes.get("config")):
        tree = config.parse_yaml(meta["config"], "x")
        changes["config"](tree["model"])
        changes["config"] = json.dumps(tree)
    target.unlink(missing_ok=True)
    if target.suffix == ".safetensors":
        checkpoint.save_weights(target, state, meta | changes)
    else:
        checkpoint.save(target, {"model": state, "meta": meta | changes})
    return target


WRONG_METADATA: list[tuple[dict[str, Any], str]] = [
    ({"config": LAUGHS}, "larger than any config"),
    ({"config": MERGED}, "larger than any config"),
    ({"config": "a: &a [*a]"}, "larger than any config"),
    ({"config": "#" * 2_000_000}, "larger than any config"),
    ({"config": "[" * 100_000}, "nested too deeply|nesting depth"),
    ({"config": "{a: " * 5000}, "nested too deeply|nesting depth"),
    ({"config": "!!python/object/apply:os.system ['touch ran']"}, "is not YAML"),
    ({"config": "model: !!python/name:os.system ''"}, "is not YAML"),
    ({"config": f"test: {{max_det: {'9' * 5000}}}"}, "is not YAML"),
    ({"config": "a"}, "unknown config key"),
    ({"config": "- a"}, "must be a mapping"),
    ({"names": "[" * 100_000}, "names of classes are not JSON"),
    ({"names": "{}"}, "must be a list of str"),
    ({"names": "[1]"}, "must be a list of str"),
    ({"names": json.dumps(["x"] * 500_000)}, "category ids"),
    ({"names": json.dumps(["x"] * 500_000), "category_ids": json.dumps([1] * 500_000)}, "does not fit this model"),
    ({"category_ids": "[1, null]"}, "must be a list of int"),
]
LEAST = (0, 6, 16)
"""Some of them, of the kinds: too large, code, and ids. Both formats hand the same texts to the same reader."""


@pytest.mark.parametrize(
    ("changes", "text", "suffix"),
    [
        pytest.param(*row, suffix, marks=() if suffix == ".safetensors" or i in LEAST else pytest.mark.slow)
        for suffix in (".safetensors", ".ckpt")
        for i, row in enumerate(WRONG_METADATA)
    ],
)
def test_wrong_metadata(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], text: str, suffix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = with_meta(trained, tmp_path / f"x{suffix}", **changes)
    with at_most(64), pytest.raises(InputError, match=text) as caught:
        load_model.rebuild_detector(file)
    assert len(str(caught.value)) < 2000
    assert not (tmp_path / "ran").exists()


def change(model: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        model = model[part]
    model[last] = value


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("head.convs", 10**9, "that has more than|does not fit"),
        ("pyramid.channels", 2**20, "does not fit this model"),
        ("pyramid.channels", 2**40, "more numbers than can be counted"),
        ("pyramid.channels", 2**70, "pyramid.channels must lie between .* got an integer of 71 bits"),
        ("backbone.name", "hf-hub:timm/resnet18.a1_in1k", "unknown timm model"),
        ("backbone.name", "local-dir:/etc", "unknown timm model"),
        ("backbone.name", "resnet50", "does not fit this model|that has more"),
    ],
)
def test_models_that_do_not_fit_the_weights(trained: Path, tmp_path: Path, key: str, value: Any, text: str) -> None:
    file = with_meta(trained, tmp_path / "x.safetensors", config=lambda model: change(model, key, value))
    with at_most(64), pytest.raises(InputError, match=text):
        load_model.rebuild_detector(file, trust="hub" in str(value) or "local" in str(value))


def test_info_of_an_untrusted_run_allocates_no_memory(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    tree = config.read_yaml(run / "config.yaml")

    def info(key: str, value: Any) -> tuple[int, Any]:
        changed = json.loads(json.dumps(tree))
        change(changed["model"], key, value)
        (run / "config.yaml").write_text(json.dumps(changed))
        capsys.readouterr()
        with at_most(64):
            code = cli.run(["info", str(run), "--json"])
        said = capsys.readouterr()
        return code, said.err or json.loads(said.out)["parameters"]

    code, parameters = info("pyramid.channels", 2048)
    assert code == 0
    assert parameters > 2 * 10**8
    code, said = info("head.convs", 5000)
    assert code == 2
    assert "best.safetensors does not fit the model of its own config: that has more than" in said
    assert said.count("\n") == 1
    wide = ["model.backbone.name=test_resnet", f"model.pyramid.channels={2**40}"]
    assert cli.run(["info", "retinanet_tiny", *wide]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: retinanet_tiny: its model has more numbers than can be counted")
    assert said.count("\n") == 1


# -- classes of other packages


class Spy(torch.nn.Module):
    """A neck that is FPN."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        raise AssertionError("made")


@pytest.fixture
def outside_class(monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that can be imported and records its import."""
    from fusedet.models.necks import FPN

    module = types.ModuleType("strange_parts")
    module.Spy, module.Neck = Spy, FPN  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "strange_parts", module)
    return "strange_parts:Spy"


PLACES: list[tuple[str, Callable[[str], Any]]] = [
    ("backbone.type", lambda name: name),
    ("neck", lambda name: name),
    ("neck", lambda name: {"type": name}),
    ("neck", lambda name: ["fpn", name]),
    ("neck", lambda name: [{"type": "fpn"}, {"type": name}]),
    ("plugin", lambda name: {"type": name}),
    ("interact", lambda name: name),
    ("head", lambda name: {"type": name}),
    ("roi", lambda name: {"stages": [name]}),
    ("roi", lambda name: {"stages": [{"type": "box", "pooling": name}]}),
    ("roi", lambda name: {"stages": [{"type": "box", "pooling": {"type": name}}]}),
    ("roi", lambda name: {"stages": ["box"], "branches": [{"type": name}]}),
]


@pytest.mark.parametrize(("key", "value"), PLACES)
def test_a_class_of_another_package_is_refused_everywhere(
    trained: Path,
    tmp_path: Path,
    outside_class: str,
    key: str,
    value: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = with_meta(trained, tmp_path / "x.safetensors", config=lambda model: change(model, key, value(outside_class)))
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"{name} was imported"))
    with pytest.raises(InputError, match=rf"x.safetensors: model\.{key}.* names 'strange_parts:Spy'.* --trust"):
        load_model.rebuild_detector(file)


@pytest.mark.parametrize("trust", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_trust(
    trained: Path, tmp_path: Path, scenes: Path, outside_class: str, capsys: pytest.CaptureFixture[str], trust: bool
) -> None:
    """Every command that builds a model from an untrusted config needs --trust for outside classes."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    tree = config.read_yaml(run / "config.yaml")
    tree["model"]["neck"] = "strange_parts:Neck"
    (run / "config.yaml").write_text(json.dumps(tree))
    for name in ("best.safetensors", "last.ckpt"):
        state = checkpoint.load(run / name) if name == "last.ckpt" else {}
        if state:
            checkpoint.save(run / name, state | {"meta": state["meta"] | {"config": json.dumps(tree)}})
        else:
            with_meta(trained, run / name, config=json.dumps(tree))
    image = next((scenes / "val").rglob("*.jpg"), None) or next(scenes.rglob("*.jpg"))
    commands: list[list[Any]] = [
        ["val", run],
        ["predict", run, image, "--no-draw"],
        ["info", run],
        ["cam", run, image, "--score", "0"],
        ["train", run, f"out={tmp_path / 'again'}", "train.epochs=1"],
        ["train", run, "--resume", "train.epochs=2"],
    ]
    if trust:
        for arguments in commands:
            assert cli.run([*(str(argument) for argument in arguments), "--trust"]) == 0, (
                arguments,
                capsys.readouterr().err,
            )
        return
    for arguments in commands:
        capsys.readouterr()
        assert cli.run([str(argument) for argument in arguments]) == 2, arguments
        said = capsys.readouterr().err
        assert "model.neck" in said
        assert "strange_parts:Neck" in said
        assert "--trust" in said
    assert not (tmp_path / "again").exists()
    with pytest.raises(InputError, match="--trust"):
        load(run)
    load(run, trust=True)
    assert cli.run(["config", str(run)]) == 0  # printing makes nothing


def test_a_resumed_run_uses_its_config_only(run_copy: Path, outside_class: str) -> None:
    """The config stored in its best weights, which are evaluated at the end, is ignored."""
    with_meta(run_copy, run_copy / "best.safetensors", config=lambda model: change(model, "neck", outside_class))
    with pytest.raises(InputError, match=r"strange_parts:Spy.*--trust"):
        load_model.rebuild_detector(run_copy / "best.safetensors")
    assert cli.run(["train", str(run_copy), "--resume", "--json"]) == 0


def test_a_named_config_file_is_trusted(tmp_path: Path, outside_class: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: retinanet_tiny\nmodel: {neck: {type: 'strange_parts:Neck'}}\n")
    assert cli.run(["info", str(file)]) == 0
    with pytest.raises(InputError, match=r"mine.yaml: model.neck.type"):
        config.load(file, trust=False)
    config.load("retinanet_tiny", ["model.neck.type=strange_parts:Neck"], trust=False)  # an override is the caller's
    config.load("retinanet_tiny", ["model.backbone.weights=C:/w.pth"], trust=False)


def test_bombs_in_a_yaml_file(tmp_path: Path) -> None:
    for text in (LAUGHS, MERGED, "[" * 100_000, f"a: {'9' * 5000}"):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(InputError, match=r"x\.yaml"):
            config.load(tmp_path / "x.yaml")


# -- the network


def test_commands_open_no_connection(
    trained: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[Any] = []
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, lambda _, *received: attempts.append(received))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *received, **_: attempts.append(received) or [])
    for arguments in (
        ["train", trained, f"out={tmp_path / 'run'}"],
        ["val", trained, f"out={tmp_path / 'val'}"],
        ["predict", trained, scenes / "val", f"out={tmp_path / 'predict'}"],
        ["doctor", f"data={scenes}"],
    ):
        assert cli.run([str(argument) for argument in arguments]) == 0
    assert attempts == []
    with socket.socket() as own:
        own.connect(("127.0.0.1", 9))
    assert attempts == [(("127.0.0.1", 9),)]


OFFLINE = """
import json, socket, sys

met = []

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto") and arguments[0].family == socket.AF_UNIX:
        return  # how a loader's workers hand over their tensors
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        met.append(event)
        raise OSError(f"no network here: {event}")

sys.addaudithook(watch)
from fusedet import cli

codes = [cli.run(arguments) for arguments in json.loads(sys.argv[1])]
before = list(met)
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError:
    pass
print(json.dumps([codes, before, met]))
"""


@pytest.mark.slow
def test_no_network_access(scenes: Path, tmp_path: Path) -> None:
    """Train, evaluate and predict while every connection is refused and recorded; the last one is the test's own."""
    from shared_fixtures import SMALL

    run = tmp_path / "run"
    arguments = [
        ["info", "retinanet_tiny", "--json"],
        ["train", "retinanet_tiny", f"data={scenes}", f"out={run}", *SMALL, "data.workers=1", "--json"],
        ["val", str(run), "--json"],
        ["predict", str(run), str(scenes / "val"), "--json"],
        ["doctor", f"data={scenes}", "--json"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, json.dumps([[str(w) for w in one] for one in arguments])],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    codes, before, met = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0] * len(arguments), done.stderr
    assert before == []
    assert met != []
