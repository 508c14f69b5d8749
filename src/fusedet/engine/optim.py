"""Optimizers and learning-rate schedules.

The schedule is a plain function of the step, so that a checkpoint needs no state of it.
"""

import math

import torch
from torch import nn

from fusedet.config import Train
from fusedet.errors import InputError
from fusedet.models.ops.deformable import offset_convolutions

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def build_optimizer(model: nn.Module, settings: Train, lr: float, *, fused: bool = False) -> torch.optim.Optimizer:
    """Build SGD or AdamW over every trainable parameter of the model, each in exactly one group.

    Args:
        model: Its frozen parameters are in no group.
        settings: `optimizer`, `momentum` (of SGD; AdamW keeps betas of (0.9, 0.999)), `weight_decay`,
            `decay_norm_and_bias`, `decay_bias` and `bias_lr` are read.
        lr: The learning rate after the warm-up, already scaled to the total batch (see `scaled_lr`).
        fused: Update all parameters of a group in one kernel, on a GPU.

    Returns:
        The optimizer. A group's "factor" multiplies its learning rate in every step.

    Raises:
        InputError: Nothing in the model is trainable.
    """
    # As in MMEngine, the convolutions that predict offsets follow the rules of weights.
    exempt = {*offset_convolutions(model), *(m for m in model.modules() if isinstance(m, NORMS))}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                # The end of the name, because stacked layers have several: SMSL's W_bias, V_bias and norm_bias.
                is_bias = module not in exempt and name.endswith("bias") and not name.endswith("norm_bias")
                decayed = (settings.decay_norm_and_bias or parameter.ndim > 1) and (settings.decay_bias or not is_bias)
                kind = (settings.weight_decay if decayed else 0.0, settings.bias_lr if is_bias else 1.0)
                groups.setdefault(kind, []).append(parameter)
    if not groups:
        raise InputError("the model has no trainable parameter: freeze less")
    listed = [
        {"params": members, "weight_decay": decay, "factor": factor} for (decay, factor), members in groups.items()
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(listed, lr=lr, momentum=settings.momentum, fused=fused or None)
    return torch.optim.AdamW(listed, lr=lr, fused=fused or None)


def scaled_lr(settings: Train) -> float:
    """Scale `lr` linearly from `base_batch` to the total batch `batch` (Goyal et al. 2017); null keeps it.

    >>> scaled_lr(Train(lr=0.01, base_batch=16, batch=4))
    0.0025
    """
    return settings.lr * settings.total_batch / settings.base_batch if settings.base_batch else settings.lr


def lr_factor(step: int, settings: Train, *, total_steps: int, steps_per_epoch: int) -> float:
    """Return the factor of the learning rate at a step: the warm-up times the decay.

    The warm-up is MMEngine's LinearLR, counted in steps: warmup_ratio + (1 - warmup_ratio) * step / (warmup_steps - 1),
    and 1 from then on; or its ConstantLR: warmup_ratio before the step warmup_steps - 1. The decay is one of two
    policies:

    - "multistep" multiplies by `gamma` from the first step at or after each of `milestones` (in epochs;
      fractions allowed).
    - "cosine" falls from 1 at the end of the warm-up to 0 at `total_steps`.

    Args:
        step: The step's number, from 0.
        settings: `policy`, `milestones`, `gamma`, `warmup`, `warmup_steps` and `warmup_ratio` are read.
        total_steps: Steps of the whole training.
        steps_per_epoch: Steps of one epoch.
    """
    warmup, ratio, warm = settings.warmup_steps, settings.warmup_ratio, 1.0
    if step < warmup - 1:
        warm = ratio if settings.warmup == "constant" else ratio + (1 - ratio) * step / (warmup - 1)
    if settings.policy == "multistep":
        # Rounding removes the floating-point noise of a fraction of an epoch.
        passed = sum(step >= round(milestone * steps_per_epoch, 6) for milestone in settings.milestones)
        return warm * settings.gamma**passed
    done = max(0, step - warmup) / max(1, total_steps - warmup)
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
