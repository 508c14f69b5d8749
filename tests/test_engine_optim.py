import math

import pytest
import torch
from torch import nn

from fusedet.engine.optim import Optim, optimizer, scaled_lr, schedule
from fusedet.errors import InputError
from fusedet.models.necks import SMSL
from fusedet.models.ops.deformable import DeformPack
from fusedet.types import Levels


def model() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    net[0].weight.requires_grad_(False)
    return net


def grouped(opt: torch.optim.Optimizer) -> dict[int, float]:
    members = [(id(p), group["weight_decay"]) for group in opt.param_groups for p in group["params"]]
    assert len(dict(members)) == len(members)
    return dict(members)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("decay", [True, False])
def test_every_trainable_parameter_is_in_one_group_and_frozen_ones_in_none(name, decay):
    net = model()
    found = grouped(optimizer(net, Optim(name=name, lr=0.1, weight_decay=0.5, decay_norm_and_bias=decay)))
    assert set(found) == {id(p) for p in net.parameters() if p.requires_grad}
    assert found[id(net[2].weight)] == 0.5
    for vector in (net[0].bias, net[1].weight, net[1].bias, net[2].bias):
        assert found[id(vector)] == (0.5 if decay else 0.0)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_biases_outside_norms_may_learn_faster_and_without_decay(name):
    """MMDetection's bias_lr_mult=2, bias_decay_mult=0 of FCOS and VFNet."""
    net = model()
    opt = optimizer(net, Optim(name=name, lr=0.1, weight_decay=0.5, decay_bias=False, bias_lr=2.0))
    found = {id(p): (group["weight_decay"], group["factor"]) for group in opt.param_groups for p in group["params"]}
    assert found[id(net[0].bias)] == found[id(net[2].bias)] == (0.0, 2.0)
    assert found[id(net[1].weight)] == found[id(net[1].bias)] == found[id(net[2].weight)] == (0.5, 1.0)


def test_biases_of_stacked_layers_are_biases_and_those_that_predict_offsets_are_not():
    """SMSL stacks its units' layers and norms; MMEngine leaves the offsets of deformable convolutions out of its rule."""
    smsl = SMSL(Levels((16, 16), (8, 16)))
    net = nn.ModuleList([smsl, DeformPack(4, 4, bias=True)])
    opt = optimizer(net, Optim(lr=0.1, weight_decay=0.5, decay_bias=False, bias_lr=2.0))
    kinds = {id(p): (group["weight_decay"], group["factor"]) for group in opt.param_groups for p in group["params"]}
    found = {name for name, p in net.named_parameters() if kinds[id(p)] == (0.0, 2.0)}
    layers = {f"0.{name}.bias" for name, m in smsl.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert len(layers) == 6
    assert found == layers | {"0.select.W_bias", "0.select.V_bias", "1.bias"}
    assert {kinds[id(p)] for name, p in net.named_parameters() if name not in found} == {(0.5, 1.0)}
    off = grouped(optimizer(smsl, Optim(lr=0.1, weight_decay=0.5, decay_norm_and_bias=False)))
    vectors = {"select.W_bias", "select.V_bias", "select.norm_weight", "select.norm_bias"}
    assert all(off[id(p)] == 0 for name, p in smsl.named_parameters() if name in vectors or name.endswith(".bias"))


def test_a_shared_parameter_is_taken_once():
    one = nn.Linear(2, 2)
    assert len(grouped(optimizer(nn.ModuleList([one, one]), Optim(lr=0.1, weight_decay=0)))) == 2


def test_wrong_options_are_said():
    with pytest.raises(InputError, match="did you mean 'adamw'"):
        Optim(name="adam")
    with pytest.raises(InputError, match="did you mean 'cosine'"):
        Optim(policy="cosin")
    with pytest.raises(InputError, match="no trainable parameter"):
        optimizer(model().requires_grad_(False), Optim())
    with pytest.raises(InputError, match="learning rate"):
        Optim(lr=-1)


def test_rate_is_linear_in_the_batch():
    assert scaled_lr(0.01, 16) == 0.01
    assert scaled_lr(0.01, 4) == pytest.approx(0.0025)
    assert scaled_lr(0.02, 64, base_batch=32) == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("step", "factor"),
    # 100 steps an epoch, 500 of warm-up: 0.001 at first, 1 at the 500th step; a tenth after epoch 8, a hundredth after 11
    [(0, 0.001), (1, 0.001 + 0.999 / 499), (250, 0.001 + 0.999 * 250 / 499), (499, 1), (500, 1)]
    + [(799, 1), (800, 0.1), (1099, 0.1), (1100, 0.01), (1199, 0.01)],
)
def test_the_1x_schedule(step, factor):
    assert schedule(step, total_steps=1200, steps_per_epoch=100) == pytest.approx(factor, rel=1e-12)


def test_warm_up_follows_the_recursion_of_mmengine():
    # LinearParamScheduler: each step multiplies the last value, with total_iters = end - begin - 1
    start, total, value = 0.001, 499, 0.001
    for step in range(1, 500):
        value *= 1 + (1 - start) / (total * start + (step - 1) * (1 - start))
        assert schedule(step, total_steps=10**6, steps_per_epoch=10**5) == pytest.approx(value, rel=1e-9)


def test_fractions_of_an_epoch_and_no_warm_up():
    def at(step):
        return schedule(step, total_steps=1200, steps_per_epoch=50, warmup_steps=0, milestones=(0.7 * 24, 0.9 * 24))

    assert [at(s) for s in (0, 839, 840, 1079, 1080)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_cosine():
    at = lambda step: schedule(step, total_steps=110, steps_per_epoch=10, warmup_steps=10, policy="cosine")  # noqa: E731
    assert [at(s) for s in (0, 9, 10, 60, 110)] == pytest.approx([0.001, 1, 1, 0.5, 0], abs=1e-12)
    assert at(35) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
