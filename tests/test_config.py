"""Configs: bases, overrides, schedules, backbones by name, declared settings, and messages about mistakes."""

import json
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pydantic
import pytest

from fusedet import config
from fusedet.errors import InputError
from fusedet.models.detectors import build_detector, build_meta_detector, create_model

pytestmark = pytest.mark.usefixtures("unrendered")


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def test_overrides_are_typed_and_nested() -> None:
    c = config.load(
        "retinanet_r50",
        ["train.epochs=3", "train.lr=1e-3", "data=/x/y", "data.size=[320,400]", "train.ema=0.999", "out=runs/a"],
    )
    assert (c.train.epochs, c.train.lr, c.train.ema, c.out) == (3, 0.001, 0.999, "runs/a")
    assert c.data.path == "/x/y"
    assert c.data.size == (320, 400)
    assert config.load("retinanet_r50", ["data=007"]).data.path == "007"  # a path is never a number
    assert config.load("retinanet_r50", ["train.ema=null"]).train.ema is None


def test_backbone_by_name_keeps_its_options() -> None:
    c = config.load("retinanet_r50", ["model.backbone=resnet18"])
    assert c.model.backbone == {"name": "resnet18", "pretrained": True, "frozen_stages": 1, "norm_eval": True}
    c = config.load(
        "retinanet_r50", ["model.backbone={name: resnet18, pretrained: false}", "data={path: /x, workers: 3}"]
    )
    assert c.model.backbone == {"name": "resnet18", "pretrained": False, "frozen_stages": 1, "norm_eval": True}
    assert (c.data.path, c.data.workers) == ("/x", 3)


def test_a_slot_whose_type_changes_drops_its_options() -> None:
    c = config.load("retinanet_r50", ["model.head.convs=2"])
    assert c.model.head == {"type": "retina", "convs": 2}
    c = config.load("retinanet_r50", ["model.head=pkg.mod:Other"], {"model": {"head": {"convs": 2}}})
    assert c.model.head == {"type": "pkg.mod:Other"}
    c = config.load("retinanet_r50", ["model.head={type: retina, channels: 8}"])
    assert c.model.head == {"type": "retina", "convs": 4, "channels": 8}


def test_list_items_are_addressed() -> None:
    c = config.load(
        "retinanet_r50", ["model.neck=[fpn,pkg.mod:Extra]", "model.neck.1.width=3", "model.neck[0].type=fpn"]
    )
    assert c.model.neck == [{"type": "fpn"}, {"type": "pkg.mod:Extra", "width": 3}]
    with pytest.raises(InputError, match="list of 2, address its items by 0 to 1"):
        config.load("retinanet_r50", ["model.neck=[fpn,fpn]", "model.neck.2.width=3"])


@pytest.mark.parametrize(
    ("name", "epochs", "milestones", "scales"),
    [("1x", 12, (8, 11), None), ("2x", 24, (16, 22), None), ("2x_ms", 24, (16, 22), (640, 800))],
)
def test_schedules(name: str, epochs: int, milestones: tuple, scales: tuple | None) -> None:
    c = config.load("retinanet_r50", [f"train.schedule={name}"])
    assert (c.train.epochs, c.train.milestones, c.data.multi_scale) == (epochs, milestones, scales)
    t = c.train
    assert (t.optimizer, t.lr, t.batch, t.base_batch, t.momentum, t.weight_decay) == ("sgd", 0.01, 16, 16, 0.9, 1e-4)
    assert (t.warmup_steps, t.warmup_ratio, t.gamma) == (500, 0.001, 0.1)


def test_a_schedule_lies_below_the_overrides_beside_it() -> None:
    c = config.load("retinanet_tiny", ["train.epochs=5", "train.schedule=2x"])
    assert c.train.epochs == 5
    assert c.train.milestones == (16, 22)  # from the schedule


def leaves(tree: dict[str, Any], section: str = "") -> dict[str, Any]:
    """The values of nested mappings by their dotted keys."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= leaves(value, f"{section}{key}.") if isinstance(value, dict) else {f"{section}{key}": value}
    return values


# a backbone is one value of the config, so one backbone of each detector stands for all
ONE_BACKBONE = [n for n in config.names() if not any(other in n for other in config.BACKBONES.keys() - {"r50"})]


@cache
def load_leaves(name: str) -> dict[str, Any]:
    return leaves(config.load(name).tree())


@pytest.mark.parametrize("schedule", [name for name in config.names("schedules") if name != "finetune"])
def test_a_schedule_sets_epochs_milestones_and_scales_only(schedule: str) -> None:
    allowed = {"train.schedule", "train.epochs", "train.milestones", "data.size", "data.multi_scale"}
    for name in ONE_BACKBONE:
        default = load_leaves(name)
        scheduled = leaves(config.load(name, [f"train.schedule={schedule}"]).tree())
        changed = {key for key in default | scheduled if default.get(key) != scheduled.get(key)}
        assert changed <= allowed, name


def test_fine_tuning_has_a_rate_and_a_warm_up_for_every_detector() -> None:
    recipes = [config.load(name, ["train.schedule=finetune"]).train for name in ONE_BACKBONE]
    assert {(t.optimizer, t.lr, t.base_batch, t.warmup, t.warmup_steps, t.warmup_ratio) for t in recipes} == {
        ("sgd", 0.005, 16, "linear", 50, 0.1)
    }
    frozen = config.load("retinanet_r50", ["train.schedule=finetune"]).model.backbone
    assert (frozen["frozen_stages"], frozen["norm_eval"]) == (1, True)


def test_a_schedule_keeps_the_warm_up_of_mmdetection() -> None:
    for schedule in ("1x", "2x", "2x_ms"):
        fcos, vfnet, grid = (
            config.load(f"{name}_r50", [f"train.schedule={schedule}"]).train for name in ("fcos", "vfnet", "grid_rcnn")
        )
        assert (fcos.warmup_ratio, vfnet.warmup_ratio) == (pytest.approx(1 / 3, abs=1e-4), 0.1)
        assert (fcos.warmup, vfnet.warmup, grid.warmup) == ("constant", "linear", "linear")
        assert (grid.warmup_steps, grid.warmup_ratio) == (3665, 1 / 80)
        assert config.load("fcos_r50_dcn", [f"train.schedule={schedule}"]).train.warmup == "linear"


# -- the declarations of the settings


DECLARATIONS = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "declarations.py"))
PYDANTIC = tuple(map(int, pydantic.VERSION.split(".")[:2]))


def test_generated_files_are_those_of_the_declarations() -> None:
    for file, text in DECLARATIONS["generate"]().items():
        if file.suffix == ".md" or PYDANTIC >= (2, 11):  # older versions write the same schema otherwise
            assert file.read_text(encoding="utf-8") == text, "write it again: make schema"


@pytest.mark.parametrize(
    ("folder", "name"), [("models", "schema"), ("schedules", "schema"), ("ablations", "ablation_schema")]
)
def test_shipped_files_name_their_schema(folder: str, name: str) -> None:
    schemas = DECLARATIONS["SCHEMAS"]
    for file in (schemas / folder).iterdir():
        first = file.read_text(encoding="utf-8").splitlines()[0]
        assert first == f"# yaml-language-server: $schema=../{name}.json"
        assert (schemas / f"{name}.json").is_file()


def test_schemas_know_the_names_and_options_of_parts() -> None:
    """Every shipped file fits its schema; wrong names and options do not."""
    schemas = DECLARATIONS["SCHEMAS"]
    configs, tables = (
        jsonschema.Draft202012Validator(json.loads((schemas / f"{name}.json").read_text()))
        for name in ("schema", "ablation_schema")
    )
    for schema, folder in ((configs, "models"), (configs, "schedules"), (tables, "ablations")):
        for file in (schemas / folder).iterdir():
            schema.validate(config.read_yaml(file))
    for text, is_right in (
        ("neck: [fpn, {type: smsl, reduction: 8}]", True),
        ("neck: fpm", False),
        ("neck: {type: mse_fpn, sim: splt}", False),
        ("neck: {type: mse_fpn, channels: 64}", False),  # of model.pyramid
        ("neck: {sim: split}", True),  # of the base's neck
        ("neck: [fpn, {type: my_package.necks:MyNeck, depth: 3}]", True),
        ("head: msil", False),
        ("backbone: {nam: resnet18}", False),
        ("roi: {stages: [{type: box, pooling: soft}], branches: [mask]}", True),
        ("roi: {stages: [{type: box, pooling: hard}]}", False),
    ):
        assert configs.is_valid(config.parse_yaml(f"model: {{{text}}}", text)) == is_right, text


def test_settings_have_help_types_and_defaults() -> None:
    settings = {setting.key: setting for setting in config.settings()}
    values = leaves(config.parse({}).tree())
    assert set(settings) == {key for key in values if not key.startswith("model.backbone.")} | {"model.backbone"}
    assert all(setting.help.endswith((".", "...")) and "\n" not in setting.help for setting in settings.values())
    lr, optimizer, scales = (settings[key] for key in ("train.lr", "train.optimizer", "data.multi_scale"))
    assert (lr.group, lr.type, lr.default, lr.range) == ("train", "float", "0.01", "above 0")
    assert optimizer.type == "sgd | adamw"
    assert (scales.type, scales.default) == ("[int, int] or null", "null")
    assert settings["train.clip_norm"].range == "above 0"


def test_sections_are_frozen_and_validated() -> None:
    train = config.Train(epochs=3, milestones=[1, 2])
    assert (train.epochs, train.milestones, train.replace(lr=1).lr) == (3, (1.0, 2.0), 1.0)
    assert train.replace(epochs=4) == config.Train(epochs=4, milestones=(1, 2))
    with pytest.raises(ValueError, match="frozen"):
        train.epochs = 4  # type: ignore[misc]
    for make in (lambda: config.Train(epochs=0), lambda: train.replace(epochs=0)):
        with pytest.raises(InputError, match=r"^train\.epochs=0 must be 1 or more$"):
            make()
    with pytest.raises(InputError, match=r"^unknown config key 'train\.epoch': did you mean 'train\.epochs'"):
        config.Train(epoch=3)
    with pytest.raises(InputError, match=r"^unknown config key 'train\.3': "):
        config.parse({"train": {3: 4}})


# -- backbones by name


DETECTORS = [
    *("retinanet", "fcos", "vfnet", "reppoints", "faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"),
    *("dynamic_rcnn", "grid_rcnn", "libra_rcnn"),
]


def test_names_are_detectors_with_a_backbone() -> None:
    names = config.names()
    assert set(names) >= {f"{detector}_{backbone}" for detector in DETECTORS for backbone in config.BACKBONES}
    assert set(names) >= {f"fcos_{backbone}_{kind}" for backbone in config.BACKBONES for kind in ("tricks", "dcn")}
    assert set(names) >= {"retinanet_tiny", "retinanet_r18_small", "vfnet_r18_dcn", "faster_rcnn_r50_dcn"}
    assert not [name for name in names if name.startswith("_") or "BACKBONE" in name]


def test_a_name_chooses_the_backbone_only() -> None:
    r50, x101 = (config.load(f"fcos_{backbone}_dcn") for backbone in ("r50", "x101_32x4d"))
    assert x101.model.backbone["name"] == "resnext101_32x4d.gluon_in1k"
    assert config.load("fcos_r50_dcn", ["model.backbone.name=resnext101_32x4d.gluon_in1k"]) == x101
    assert r50.model.backbone | {"name": ""} == x101.model.backbone | {"name": ""}


def test_a_local_file_wins_over_a_shipped_name(tmp_path: Path) -> None:
    write(tmp_path, "retinanet_r101", "base: fcos_r18\n")
    child = write(tmp_path, "child", "base: retinanet_r101\n")
    assert config.load(child).model.head["type"] == "fcos"


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_the_resolved_yaml_is_enough(tmp_path: Path, step: int) -> None:
    for name in ONE_BACKBONE[::step]:
        c = config.load(name, ["train.schedule=2x_ms", "train.epochs=7", "data=/x", "model.neck=[fpn]"])
        assert config.load(write(tmp_path, "again", c.to_yaml())) == c


def test_bases(tmp_path: Path) -> None:
    write(tmp_path, "parent", "base: retinanet_r18\ntrain: {epochs: 5}\n")
    child = write(tmp_path, "child", "base: parent\ntrain: {lr: 0.5}\n")
    c = config.load(child)
    assert (c.train.epochs, c.train.lr, c.model.backbone["name"]) == (5, 0.5, "resnet18.tv_in1k")


def test_several_bases(tmp_path: Path) -> None:
    """Later bases lie over earlier ones, and all of them below the file."""
    write(tmp_path, "recipe", "train: {schedule: 2x, lr: 0.5, batch: 8}\ndata: {size: [64, 64]}\n")
    c = config.load(write(tmp_path, "child", "base: [fcos_r18, recipe]\ntrain: {batch: 2}\n"))
    assert (c.model.head["type"], c.train.epochs, c.train.lr, c.train.batch) == ("fcos", 24, 0.5, 2)
    assert (c.data.size, c.train.bias_lr) == ((64, 64), 2.0)


def test_mappings_and_overrides_are_equivalent() -> None:
    sections = {"model": {"neck": ["fpn"], "pyramid": {"channels": 32}, "backbone": {"pretrained": False}}}
    overrides = ["model.neck=[fpn]", "model.pyramid.channels=32", "model.backbone.pretrained=false"]
    assert config.load("retinanet_r18", sections=sections) == config.load("retinanet_r18", overrides)
    by_overrides, by_sections = create_model("retinanet_r18", *overrides), create_model("retinanet_r18", **sections)
    assert {k: v.shape for k, v in by_overrides.state_dict().items()} == {
        k: v.shape for k, v in by_sections.state_dict().items()
    }


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.epoch=3", "did you mean 'train.epochs'"),
        ("modle.neck=fpn", "unknown config key 'modle': did you mean 'model'?"),
        (
            "epochs=3",
            "unknown config key 'epochs': did you mean 'train.epochs'? Known: data, device, model, out, test, train",
        ),
        ("epoch=3", "did you mean 'train.epochs'"),
        ("batch=3", "did you mean 'train.batch' or 'test.batch'"),
        ("train.bach=3", "did you mean 'train.batch'? "),
        ("channels=3", "did you mean 'data.channels' or 'model.pyramid.channels'"),
        ("overlap=0.3", "did you mean 'data.tiles.overlap' or 'test.tiles.overlap'"),
        ("zzz=3", "unknown config key 'zzz'. Known: data"),
        ("train.epochs=abc", "train.epochs must be int, got 'abc'"),
        ("train.batch=aut", "train.batch must be int or 'auto', got 'aut': did you mean 'auto'?"),
        ("train.epochs=0", "train.epochs=0 must be 1 or more"),
        ("train.epochs=true", "train.epochs must be int, got True"),
        ("train.lr=inf", "train.lr must be float, got 'inf'"),
        ("train.lr=.inf", "train.lr=inf must be above 0 and finite"),
        ("train.momentum=1", "train.momentum=1 must be 0 or more and below 1"),
        ("train.warmup_ratio=0", "train.warmup_ratio=0 must be above 0 and at most 1"),
        ("train.batch=5 ", None),
        ("train.accumulate=3", "train.batch=16 must be a multiple of train.accumulate=3"),
        ("train.accumulate=0", "train.accumulate=0 must be 1 or more"),
        ("train.lr=-1", "train.lr=-1 must be above 0"),
        ("train.bias_lr=0", "train.bias_lr=0 must be above 0"),
        ("train.ema=1", "train.ema=1 must be above 0 and below 1"),
        ("train.clip_norm=0", "train.clip_norm=0 must be above 0"),
        ("train.patience=0", "train.patience=0 must be 1 or more"),
        ("train.milestones=[8,a]", "train.milestones.1 must be float, got 'a'"),
        ("data.multi_scale=640", "data.multi_scale must be a list, such as [640, 640], got 640"),
        ("test.scales=[600,x]", "test.scales.1 must be int, got 'x'"),
        ("train.checkpoint_every=soon", "train.checkpoint_every=soon must be a time or a number of steps"),
        pytest.param(f"train.checkpoint_every={'9' * 5000}steps", "9steps must be a time or a number", id="steps"),
        ("train.epochs", "write key=value"),
        ("train.epochs=[", "not YAML"),
        ("train=3", "train must be a mapping"),
        ("train.schedule=3x", "unknown schedule"),
        ("train.optimizer=adam", "did you mean 'adamw'"),
        ("train.policy=cosin", "did you mean 'cosine'"),
        ("data.size=[800,600]", "data.size"),
        ("data.size=800", "data.size must be a list, such as [800, 800], got 800"),
        ("test.nms=2", "test.nms=2"),
        ("train.batch=5", None),
        ("model.pyramid.top=on_inputs", "did you mean 'on_input'"),
    ],
)
def test_mistakes_in_keys_and_values(override: str, said: str | None) -> None:
    if said is None:
        config.load("retinanet_r50", [override])
        return
    with pytest.raises(InputError) as error:
        config.load("retinanet_r50", [override])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.neck=fpm", "unknown model.neck 'fpm': did you mean 'fpn'"),
        ("model.neck=no.such:Neck", "cannot be imported"),
        ("model.neck.channels=4", "set model.pyramid.channels"),
        ("model.neck.levels=4", "passes levels by itself"),
        ("model.head.num_classes=4", "passes num_classes by itself"),
        ("model.head.conv=4", "did you mean 'convs'"),
        ("model.head.convs=many", "model.head.convs must be int"),
        ("model.backbone.name=resnet51", "unknown timm model 'resnet51'"),
        ("model.backbone.frozen_stages=9", "frozen_stages=9"),
        ("model.plugin=msfn", "did you mean 'msfm'"),
        ("model.neck=msil", "msil belongs in another slot, write model.interact=msil"),
        ("model.neck=[fpn,msfm]", "write model.plugin=msfm"),
        ("model.interact={type: smsl}", "write model.neck=smsl"),
        ("model.neck=pack.necks:Mine", "its folder in PYTHONPATH"),
        ("model.plugin={type: msfm, positions: after_conv2}", "positions must be a list, such as [after_conv2]"),
        (
            "model.plugin={type: msfm, positions: [after_conv3]}",
            "have no after_conv3, they have after_conv1, after_conv2",
        ),
        ("model.plugin={type: msfm, positions: [after_conv9]}", "unknown position"),
        ("model.plugin={type: msfm, ratios: [16]}", "ratios=[16] must hold one ratio for each of stages=[2, 3, 4]"),
        ("model.plugin.scale=[1]", "model.plugin must be a name or have a key 'type'"),
        ("model.interact=msli", "did you mean 'msil'"),
        ("model.interact={type: msil, channels: 64}", "passes channels by itself"),
        ("model.interact={type: msil, encoder_kernel: 2}", "encoder_kernel=2 must be odd"),
        ("model.neck=smsl", "must be of one width: put it after a neck"),
        (
            "model.neck={type: mse_fpn, context: [1]}",
            "context=(1,) must name some of the backbone's levels [2, 3, 4, 5]",
        ),
        ("model.neck={type: mse_fpn, gate: gcd}", "did you mean 'gcg'"),
        ("model.neck={type: fpn, channels: 64}", "set model.pyramid.channels"),
        ("model.pyramid.finest=9", "finest=9"),
        ("model.neck=3", "model.neck must be a name"),
    ],
)
@pytest.mark.usefixtures("copied_parts")
def test_mistakes_in_parts(override: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        build_detector(config.load("retinanet_r18", ["model.backbone.pretrained=false", override]), 3)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "said"), [("model.neck=fpm", "did you mean 'fpn'"), ("model.head.conv=4", "did you mean 'convs'")]
)
def test_mistakes_in_parts_are_reported_without_data_and_weights(override: str, said: str) -> None:
    asked = ["model.backbone.weights=/no/where"]
    assert all(p.is_meta for p in build_meta_detector(config.load("retinanet_r18", asked)).parameters())
    with pytest.raises(InputError, match=said):
        build_meta_detector(config.load("retinanet_r18", [*asked, override]))


@pytest.mark.parametrize("flip", [False, True])
def test_an_option_may_stand_before_its_slot(flip: bool) -> None:
    overrides = ["model.neck=mse_fpn", "model.neck.gate=none", "model.neck.gate=cag"]
    neck = config.load("retinanet_r18", [overrides[1], overrides[2], overrides[0]] if flip else overrides).model.neck
    assert neck == {"type": "mse_fpn", "gate": "cag"}


def test_mistakes_in_files(tmp_path: Path) -> None:
    for name, said in (
        (tmp_path / "retinanet_r5.yaml", "there is no config file"),
        ("retinanet_r5", "did you mean 'retinanet_r50'"),
    ):
        with pytest.raises(InputError, match=said) as error:
            config.load(name)
        assert str(error.value).endswith("(fusedet info lists them)")
        assert str(error.value).count("_") < 20, "the nearest, not all of them"
    with pytest.raises(InputError, match="is not YAML"):
        config.load(write(tmp_path, "broken", "model: [1, 2\n"))
    with pytest.raises(InputError, match="must be a mapping"):
        config.load(write(tmp_path, "list", "- 1\n- 2\n"))
    write(tmp_path, "other", "base: loop\n")
    with pytest.raises(InputError, match="own base"):
        config.load(write(tmp_path, "loop", "base: other\n"))
    with pytest.raises(InputError, match="unknown base"):
        config.load(write(tmp_path, "orphan", "base: nothing\n"))
    for text, kind in (("base: 1.5", "float"), ("base: [[fpn]]", "list"), ("train: {schedule: 2}", "int")):
        with pytest.raises(InputError, match=f"must be a name or a YAML file, got {kind}$"):
            config.load(write(tmp_path, "number", f"{text}\n"))


def test_a_neck_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_necks.py").write_text(
        "from torch import nn\n"
        "class Plain(nn.Module):\n"
        "    def __init__(self, levels, gain: float = 1.0):\n"
        "        super().__init__()\n"
        "        self.levels, self.gain = levels, gain\n"
        "    def forward(self, features):\n"
        "        return [self.gain * f for f in features]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = create_model(
        "retinanet_tiny",
        "model.neck=[fpn,their_necks:Plain]",
        "model.neck.1.gain=2",
        "model.backbone.name=test_resnet",
        num_classes=1,
    )
    assert model.neck.necks[1].gain == 2.0
    assert model.neck.levels == model.neck.necks[0].levels


@pytest.mark.parametrize("text", ["5", "1.5", "true", "2026-01-01", "9" * 400, "[1, 2]"])
def test_a_file_that_is_one_value(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match="must be a mapping with model, data"):
        config.load(str(tmp_path / "mine.yaml"))
