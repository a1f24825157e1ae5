"""AdamW in three memory classes. `adamw` steps float32 master weights; the others step bfloat16 weights themselves.

Bytes per trained parameter, weight and states: `adamw` 2 + 4 + 8 (the masters' 4 are held by `tuner.train.masters`), `adamw_bf16` 2 + 4,
`adamw8bit` 2 + 2. A bfloat16 has 8 significant bits, so an update below 1/256 of a weight is lost when rounded to nearest;
rounded stochastically it arrives on average.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tuner.builtins.options import AdamOptions
from tuner.data.randomness import generator
from tuner.errors import EnvironmentProblem

CHUNK_ELEMENTS = 1 << 24
"""Parameters updated at once: few kernels for thousands of small adapter matrices, 64 MiB for each float32 temporary."""


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), for float32 weights."""

    wants_low_precision: ClassVar[bool] = False

    def __init__(self, parameters: Sequence[nn.Parameter], learning_rate: float, options: AdamOptions) -> None:
        super().__init__(
            parameters, lr=learning_rate, betas=(options.adam_beta1, options.adam_beta2), eps=options.adam_epsilon,
            weight_decay=options.adam_weight_decay, fused=True,
        )


class AdamWBF16(torch.optim.Optimizer):
    """AdamW whose weights and both running means are kept in the weights' own dtype, rounded stochastically if that is bfloat16.

    The update itself is float32. The rounding noise is a function of (seed, step, position of the parameter), so a resumed run
    rounds as an uninterrupted one does. Float32 weights get float32 states and plain AdamW.
    """

    wants_low_precision: ClassVar[bool] = True

    def __init__(self, parameters: Sequence[nn.Parameter], learning_rate: float, options: AdamOptions, *, seed: int = 0) -> None:
        super().__init__(parameters, {
            "lr": learning_rate, "betas": (options.adam_beta1, options.adam_beta2), "eps": options.adam_epsilon,
            "weight_decay": options.adam_weight_decay,
        })
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            for part, chunk in enumerate(self._chunks(group["params"])):
                self._update(chunk, group, (number, part))
        return loss

    def _chunks(self, parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """Parameters with a gradient, by device, dtype and number of updates so far, at most `CHUNK_ELEMENTS` together."""
        alike: dict[tuple[torch.device, torch.dtype, float], list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            if parameter.grad is not None:
                step = self._state_of(parameter)["step"].item()
                alike[parameter.device, parameter.dtype, step].append(parameter)
        for members in alike.values():
            yield from split_by_size(members, CHUNK_ELEMENTS)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # on the CPU: reading it waits for nothing
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        return state

    def _update(self, chunk: list[nn.Parameter], group: dict[str, Any], place: tuple[int, int]) -> None:
        """The formula of the paper, algorithm 2, over the flattened members of `chunk`."""
        states = [self.state[parameter] for parameter in chunk]
        beta1, beta2 = group["betas"]
        for state in states:
            state["step"] += 1
        step = int(states[0]["step"].item())
        weight, grad = flat([p.detach() for p in chunk]), flat([p.grad for p in chunk if p.grad is not None])
        mean = flat([state["exp_avg"] for state in states]).lerp_(grad, 1 - beta1)
        square = flat([state["exp_avg_sq"] for state in states]).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (square.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**step))
        draws = torch.Generator(weight.device).manual_seed(generator(self._seed, "rounding", step, *place).initial_seed())
        store(weight, [p.detach() for p in chunk], draws)
        store(mean, [state["exp_avg"] for state in states], draws)
        store(square, [state["exp_avg_sq"] for state in states], draws)


class AdamW8bit:
    """torchao's AdamW with 8-bit states (Dettmers et al. 2022, arXiv:2110.02861) and stochastic rounding of bfloat16 weights.

    Constructing it gives a `torch.optim.Optimizer`. Tensors below 4096 elements, or not a multiple of 256, keep their states in their
    own dtype. `param_groups[i]["lr"]` is a tensor, as torchao demands. Raises `EnvironmentProblem` without torchao.
    """

    wants_low_precision: ClassVar[bool] = True

    def __new__(  # type: ignore[misc] # torchao is an extra, so its class cannot be a base here
        cls, parameters: Sequence[nn.Parameter], learning_rate: float, options: AdamOptions, *, seed: int = 0
    ) -> torch.optim.Optimizer:
        try:
            from tuner.builtins.eight_bit import SeededAdamW8bit
        except ImportError as error:
            raise EnvironmentProblem(
                f"needs torchao, which cannot be imported: {error}", where="optimizer", value="adamw8bit",
                remedy="pip install 'tuner-framework[torchao]'",
            ) from error
        return SeededAdamW8bit(parameters, learning_rate, options, seed)


def split_by_size(parameters: Sequence[nn.Parameter], limit: int) -> Iterator[list[nn.Parameter]]:
    """Consecutive runs of at most `limit` elements; a larger parameter is a run of its own."""
    run: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if run and size + parameter.numel() > limit:
            yield run
            run, size = [], 0
        run.append(parameter)
        size += parameter.numel()
    if run:
        yield run


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """A new float32 tensor (N,) of all elements."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).float()


def store(values: Tensor, targets: Sequence[Tensor], draws: torch.Generator) -> None:
    """Writes `values` (N,) float32 into `targets` one after the other, rounding stochastically where they are bfloat16."""
    rounded = round_stochastically(values, draws) if targets[0].dtype == torch.bfloat16 else values
    parts = torch.split(rounded, [target.numel() for target in targets])
    torch._foreach_copy_(list(targets), [part.view(target.shape) for part, target in zip(parts, targets, strict=True)])


def round_stochastically(values: Tensor, draws: torch.Generator) -> Tensor:
    """bfloat16 of float32 `values`: one of the two neighbours, with the probability that makes the mean exact.

    A bfloat16 is the upper half of a float32. Adding a uniform 16-bit number to the lower half carries into the upper one with
    probability lower / 65536; the sign stands apart, so this holds in magnitude for both signs. `draws` lives on the device of `values`.
    """
    noise = torch.randint(0, 1 << 16, values.shape, generator=draws, device=values.device, dtype=torch.int32)
    upper = (values.contiguous().view(torch.int32) + noise) & -(1 << 16)
    # A carry would turn a NaN with all bits set, as CUDA makes them, into -0.
    return torch.where(values.isfinite(), upper.view(torch.float32), values).to(torch.bfloat16)
