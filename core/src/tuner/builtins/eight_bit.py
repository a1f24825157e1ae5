"""torchao's 8-bit AdamW made repeatable. The only module that imports torchao's optimizers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torchao.optim
from torch import nn

from tuner.builtins.options import AdamOptions
from tuner.data.randomness import generator


class SeededAdamW8bit(torchao.optim.AdamW8bit):
    """Rounding noise is a function of (seed, step); torchao alone takes it from the process's global generator."""

    def __init__(self, parameters: Sequence[nn.Parameter], learning_rate: float, options: AdamOptions, seed: int) -> None:
        super().__init__(
            parameters, lr=learning_rate, betas=(options.adam_beta1, options.adam_beta2), eps=options.adam_epsilon,
            weight_decay=options.adam_weight_decay, bf16_stochastic_round=True,
        )
        self._seed = seed

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update; returns what `closure` does."""
        devices = {p.device for group in self.param_groups for p in group["params"]}
        done = int(max((float(state["step"]) for state in self.state.values()), default=0.0))
        with self._seeded(devices, done), self._compiled_where_worth_it(devices):
            return super().step(closure)

    @contextlib.contextmanager
    def _seeded(self, devices: set[torch.device], step: int) -> Iterator[None]:
        """Global generators seeded for this step, and as they were afterwards."""
        with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
            torch.manual_seed(generator(self._seed, "rounding", step).initial_seed())
            yield

    def _compiled_where_worth_it(self, devices: set[torch.device]) -> contextlib.AbstractContextManager[Any]:
        """torchao compiles its update for every shape: seconds each, which on a CPU no run wins back."""
        if all(device.type == "cpu" for device in devices):
            eager: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
            return eager
        return contextlib.nullcontext()
