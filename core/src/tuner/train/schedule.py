"""The course of the learning rate, through transformers' schedules."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from tuner.config.settings import OptimizerSettings


def make_schedule(optimizer: Optimizer, settings: OptimizerSettings, total_steps: int) -> LRScheduler:
    """Steps once per optimizer step; the rate falls to 0 at `total_steps` where the schedule falls at all.

    `constant` with warm-up steps is `constant_with_warmup`, so that the warm-up asked for takes place. With warm-up the first
    step has rate 0.
    """
    name = settings.lr_scheduler
    if name == "constant" and settings.lr_warmup_steps:
        name = "constant_with_warmup"
    specific: dict[str, float] = {}
    if name == "cosine_with_restarts":
        specific = {"num_cycles": settings.lr_num_cycles}
    elif name == "polynomial":
        # transformers would end at 1e-7, and refuse a smaller learning rate.
        specific = {"power": settings.lr_power, "lr_end": 0.0}
    schedule: LRScheduler = get_scheduler(
        name, optimizer, num_warmup_steps=settings.lr_warmup_steps, num_training_steps=total_steps, scheduler_specific_kwargs=specific
    )
    return schedule
