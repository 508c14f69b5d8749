"""Adapter of TridentNet's stage."""

from __future__ import annotations

from cases import Case, Errors, largest
from timm.models.resnet import Bottleneck
from torch import nn

from fusedet.models.backbones.stages import stride_in_conv1
from fusedet.models.backbones.trident import make_trident

NUMBER = 3  # of the stage


def trident_stage(case: Case) -> tuple[Errors, dict[str, int]]:
    """Compare a trident stage: all branches in train mode, one in eval mode, and the gradients."""
    c = case.config["layer"]
    width = 4 * c["planes"]
    project = nn.Sequential(nn.Conv2d(c["inplanes"], width, 1, c["stride"], bias=False), nn.BatchNorm2d(width))
    first = Bottleneck(c["inplanes"], c["planes"], c["stride"], project)
    model = nn.Sequential(nn.Sequential(first, *(Bottleneck(width, c["planes"]) for _ in range(c["num_blocks"] - 1))))
    if c["style"] == "caffe":
        stride_in_conv1(model, "the stage")
    make_trident(model, {NUMBER: [model[0]]}, "the stage", c["trident_dilations"], c["test_branch_idx"])
    stage = model[0]
    stage.load_state_dict(case.state([]))
    for module in stage.modules():
        if isinstance(module, nn.BatchNorm2d):  # frozen
            module.eval().requires_grad_(False)
    [features] = case.levels("in.features")
    maps = stage(features.requires_grad_())
    (maps * case.tensors["in.weight"]).mean().backward()
    norms = case.spec["grad_norms"]
    own = {name: float(p.grad.norm()) for name, p in stage.named_parameters() if p.grad is not None}
    assert own.keys() == norms.keys(), own.keys() ^ norms.keys()
    errors = {
        "raw": largest([maps], case.levels("out.train")),
        "gradients": largest([features.grad], case.levels("out.grad.features")),
        "norms": max(abs(value - norms[name]) / norms[name] for name, value in own.items()),
        "features": largest([stage.eval()(features)], case.levels("out.features")),
    }
    return errors, {"branches": len(c["trident_dilations"])}
