"""Optimisers and learning rate schedules: plain functions of the step, so that nothing has to be saved to go on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fusedet.errors import InputError, unknown
from fusedet.models.ops.deformable import offset_convolutions

OPTIMIZERS = ("adamw", "sgd")
POLICIES = ("cosine", "multistep")
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Optim:
    """How the weights are moved. The defaults are the field's 1x schedule for detectors at a total batch of 16.

    lr: learning rate after the warm-up, already scaled to the total batch (see `scaled_lr`).
    momentum: of SGD; AdamW keeps betas of (0.9, 0.999).
    decay_norm_and_bias: False takes norms, biases and all other vectors out of the weight decay; decay_bias: False the biases alone,
    norms' and those that predict offsets not among them. bias_lr: what the learning rate of these biases is multiplied with.
    policy: "multistep" multiplies by gamma at each of `milestones` (epochs, fractions allowed); "cosine" falls to zero.
    """

    name: str = "sgd"
    lr: float = 0.01
    weight_decay: float = 1e-4
    momentum: float = 0.9
    decay_norm_and_bias: bool = True
    decay_bias: bool = True
    bias_lr: float = 1.0
    policy: str = "multistep"
    milestones: tuple[float, ...] = (8, 11)
    gamma: float = 0.1
    warmup_steps: int = 500
    warmup_ratio: float = 0.001

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise unknown("optimizer", self.name, OPTIMIZERS)
        if self.policy not in POLICIES:
            raise unknown("schedule", self.policy, POLICIES)
        if not self.lr > 0:
            raise InputError(f"the learning rate must be above 0, got {self.lr}")
        if not self.bias_lr > 0:
            raise InputError(f"bias_lr must be above 0, got {self.bias_lr}")
        if not self.weight_decay >= 0:
            raise InputError(f"the weight decay must be 0 or more, got {self.weight_decay}")
        if not 0 < self.warmup_ratio <= 1 or self.warmup_steps < 0:
            raise InputError(
                f"the warm-up needs a ratio in (0, 1] and 0 steps or more, got {self.warmup_ratio} and {self.warmup_steps}"
            )


def optimizer(model: nn.Module, options: Optim) -> torch.optim.Optimizer:
    """SGD or AdamW over every trainable parameter of the model, each in exactly one group; frozen ones in none.

    A group's "factor" is what its learning rate is multiplied with in every step. Raises InputError for a model with nothing to train.
    """
    # as in MMEngine, the convolutions that predict offsets follow the rules of weights
    exempt = {*offset_convolutions(model), *(m for m in model.modules() if isinstance(m, NORMS))}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                # the end of the name, because stacked layers have several: SMSL's W_bias, V_bias, and norm_bias, which is a norm's
                bias = module not in exempt and name.endswith("bias") and not name.endswith("norm_bias")
                decayed = (options.decay_norm_and_bias or parameter.ndim > 1) and (options.decay_bias or not bias)
                kind = (options.weight_decay if decayed else 0.0, options.bias_lr if bias else 1.0)
                groups.setdefault(kind, []).append(parameter)
    if not groups:
        raise InputError("the model has no trainable parameter: freeze less")
    listed = [
        {"params": members, "weight_decay": decay, "factor": factor} for (decay, factor), members in groups.items()
    ]
    if options.name == "sgd":
        return torch.optim.SGD(listed, lr=options.lr, momentum=options.momentum)
    return torch.optim.AdamW(listed, lr=options.lr)


def scaled_lr(lr: float, batch: int, base_batch: int = 16) -> float:
    """The learning rate for a total batch (over all processes and accumulated steps), linear in it (Goyal et al. 2017).

    >>> scaled_lr(0.01, 4)
    0.0025
    """
    return lr * batch / base_batch


def schedule(
    step: int,
    *,
    total_steps: int,
    steps_per_epoch: int,
    warmup_steps: int = 500,
    warmup_ratio: float = 0.001,
    policy: str = "multistep",
    milestones: Sequence[float] = (8, 11),
    gamma: float = 0.1,
) -> float:
    """What the learning rate is multiplied with at a step (0 is the first): the warm-up times the decay.

    The warm-up is MMEngine's LinearLR counted in steps: warmup_ratio + (1 - warmup_ratio) * step / (warmup_steps - 1), 1
    from then on. "multistep" takes a milestone (in epochs) from the first step that lies at or behind it; "cosine" falls
    from 1 at the end of the warm-up towards 0 at total_steps.
    """
    warm = min(1.0, warmup_ratio + (1 - warmup_ratio) * step / (warmup_steps - 1)) if warmup_steps > 1 else 1.0
    if policy == "multistep":
        # the rounding takes the float noise out of a fraction of an epoch
        passed = sum(step >= round(milestone * steps_per_epoch, 6) for milestone in milestones)
        return warm * gamma**passed
    if policy == "cosine":
        done = max(0, step - warmup_steps) / max(1, total_steps - warmup_steps)
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    raise unknown("schedule", policy, POLICIES)
