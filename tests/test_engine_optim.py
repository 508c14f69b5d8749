"""The optimizer's groups of parameters, the scaling of the learning rate with the batch, and its schedules."""

import math

import pytest
import torch
from torch import nn

from fusedet.config import Train
from fusedet.engine.optim import build_optimizer, lr_factor, scaled_lr
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
    decays = grouped(build_optimizer(net, Train(optimizer=name, weight_decay=0.5, decay_norm_and_bias=decay), 0.1))
    assert set(decays) == {id(p) for p in net.parameters() if p.requires_grad}
    assert decays[id(net[2].weight)] == 0.5
    for vector in (net[0].bias, net[1].weight, net[1].bias, net[2].bias):
        assert decays[id(vector)] == (0.5 if decay else 0.0)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_biases_outside_norms_may_learn_faster_and_without_decay(name):
    """MMDetection's bias_lr_mult=2, bias_decay_mult=0 of FCOS and VFNet."""
    net = model()
    opt = build_optimizer(net, Train(optimizer=name, weight_decay=0.5, decay_bias=False, bias_lr=2.0), 0.1)
    kinds = {id(p): (group["weight_decay"], group["factor"]) for group in opt.param_groups for p in group["params"]}
    assert kinds[id(net[0].bias)] == kinds[id(net[2].bias)] == (0.0, 2.0)
    assert kinds[id(net[1].weight)] == kinds[id(net[1].bias)] == kinds[id(net[2].weight)] == (0.5, 1.0)


def test_biases_of_stacked_layers_are_biases_and_those_that_predict_offsets_are_not():
    """SMSL stacks its units' layers and norms; MMEngine excepts deformable convolutions' offsets from its rule."""
    smsl = SMSL(Levels((16, 16), (8, 16)))
    net = nn.ModuleList([smsl, DeformPack(4, 4, bias=True)])
    opt = build_optimizer(net, Train(weight_decay=0.5, decay_bias=False, bias_lr=2.0), 0.1)
    kinds = {id(p): (group["weight_decay"], group["factor"]) for group in opt.param_groups for p in group["params"]}
    biases = {name for name, p in net.named_parameters() if kinds[id(p)] == (0.0, 2.0)}
    layers = {f"0.{name}.bias" for name, m in smsl.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert len(layers) == 6
    assert biases == layers | {"0.select.W_bias", "0.select.V_bias", "1.bias"}
    assert {kinds[id(p)] for name, p in net.named_parameters() if name not in biases} == {(0.5, 1.0)}
    off = grouped(build_optimizer(smsl, Train(weight_decay=0.5, decay_norm_and_bias=False), 0.1))
    vectors = {"select.W_bias", "select.V_bias", "select.norm_weight", "select.norm_bias"}
    assert all(off[id(p)] == 0 for name, p in smsl.named_parameters() if name in vectors or name.endswith(".bias"))


def test_a_shared_parameter_is_taken_once():
    layer = nn.Linear(2, 2)
    assert len(grouped(build_optimizer(nn.ModuleList([layer, layer]), Train(weight_decay=0), 0.1))) == 2


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(InputError, match="no trainable parameter"):
        build_optimizer(model().requires_grad_(False), Train(), 0.1)


def test_rate_is_linear_in_the_batch():
    assert scaled_lr(Train(lr=0.01, batch=16)) == 0.01
    assert scaled_lr(Train(lr=0.01, batch=4)) == pytest.approx(0.0025)
    assert scaled_lr(Train(lr=0.02, batch=64, base_batch=32)) == pytest.approx(0.04)
    assert scaled_lr(Train(lr=0.02, batch=64, base_batch=None)) == 0.02


@pytest.mark.parametrize(
    ("step", "factor"),
    # 100 steps an epoch, 500 of warm-up: 0.001 at first, 1 at the 500th step; 1/10 after epoch 8, 1/100 after 11
    [(0, 0.001), (1, 0.001 + 0.999 / 499), (250, 0.001 + 0.999 * 250 / 499), (499, 1), (500, 1)]
    + [(799, 1), (800, 0.1), (1099, 0.1), (1100, 0.01), (1199, 0.01)],
)
def test_the_1x_schedule(step, factor):
    assert lr_factor(step, Train(), total_steps=1200, steps_per_epoch=100) == pytest.approx(factor, rel=1e-12)


def test_warm_up_follows_the_recursion_of_mmengine():
    # LinearParamScheduler: each step multiplies the last value, with total_iters = end - begin - 1
    start, total, value = 0.001, 499, 0.001
    for step in range(1, 500):
        value *= 1 + (1 - start) / (total * start + (step - 1) * (1 - start))
        assert lr_factor(step, Train(), total_steps=10**6, steps_per_epoch=10**5) == pytest.approx(value, rel=1e-9)


def test_a_constant_warm_up_follows_the_recursion_of_mmengine():
    # ConstantParamScheduler: times the factor at step 0, divided by it at total_iters = end - begin - 1
    settings = Train(warmup="constant", warmup_ratio=0.25)
    factors = [lr_factor(step, settings, total_steps=1200, steps_per_epoch=100) for step in (0, 1, 498, 499, 500, 800)]
    assert factors == pytest.approx([0.25, 0.25, 0.25, 1, 1, 0.1])


def test_fractions_of_an_epoch_and_no_warm_up():
    settings = Train(warmup_steps=0, milestones=(0.7 * 24, 0.9 * 24))
    factors = [lr_factor(step, settings, total_steps=1200, steps_per_epoch=50) for step in (0, 839, 840, 1079, 1080)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_cosine():
    settings = Train(warmup_steps=10, policy="cosine")
    factors = [lr_factor(step, settings, total_steps=110, steps_per_epoch=10) for step in (0, 9, 10, 60, 110, 35)]
    assert factors == pytest.approx([0.001, 1, 1, 0.5, 0, 0.5 + 0.5 * math.cos(math.pi / 4)], abs=1e-12)
