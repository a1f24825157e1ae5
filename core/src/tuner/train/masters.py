"""Master weights: what the optimizer steps, where that is not what the model computes with.

The model computes in its own dtype. A bfloat16 parameter that is trained gets a float32 copy here, which takes the updates and is
rounded back into the model after each step; gradients of several batches are added up in float32. A float32 parameter is its own
master, and so is every parameter if the optimizer asks for low precision (`wants_low_precision`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tuner.errors import CheckpointError


class MasterWeights:
    """The trained parameters by name, and the tensors that stand for them in the optimizer.

    Masters start from the model's values: a float32 value that the model's dtype cannot hold is not known here; `load_state` restores it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], low_precision: bool) -> None:
        self._masters: dict[str, nn.Parameter] = {}
        self._copies: list[tuple[nn.Parameter, nn.Parameter]] = []
        """(the model's parameter, its float32 master), where the two differ."""
        for name, parameter in parameters.items():
            if low_precision or parameter.dtype not in (torch.bfloat16, torch.float16):
                self._masters[name] = parameter
            else:
                self._masters[name] = nn.Parameter(parameter.detach().float())
                self._copies.append((parameter, self._masters[name]))

    def optimized(self) -> list[nn.Parameter]:
        """What the optimizer steps, in the order of the names given."""
        return list(self._masters.values())

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the model's gradients to the masters' and frees them. Call after each backward pass."""
        received = [(parameter, master) for parameter, master in self._copies if parameter.grad is not None]
        for _, master in received:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        if received:
            torch._foreach_add_([m.grad for _, m in received if m.grad is not None], [p.grad for p, _ in received if p.grad is not None])
        for parameter, _ in received:
            parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the masters into the model's parameters, in place. Call after each optimizer step."""
        if self._copies:
            torch._foreach_copy_([parameter for parameter, _ in self._copies], [master for _, master in self._copies])

    @torch.no_grad()
    def clip_(self, max_norm: float) -> Tensor:
        """Scales all gradients so that their common 2-norm is at most `max_norm`; 0 only measures.

        Returns the norm before, float32 of shape () on the gradients' device, 0 without gradients. Waits for no device.
        """
        gradients = [master.grad for master in self.optimized() if master.grad is not None]
        if not gradients:
            return torch.zeros((), device=next((master.device for master in self.optimized()), None))
        # Measured in float32 also where gradients are bfloat16, whose own norm would be good to three digits only.
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.optimized(), max_norm, total)
        return total

    def state(self) -> dict[str, Tensor]:
        """The masters by name: the live tensors, not copies."""
        return {name: master.detach() for name, master in self._masters.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`; the model follows. Raises `CheckpointError` unless names, shapes and dtypes are the same."""
        self._check(state)
        for name, master in self._masters.items():
            master.copy_(state[name])
        self.publish()

    def _check(self, state: Mapping[str, Tensor]) -> None:
        odd = sorted(set(self._masters) ^ set(state))
        if odd:
            side = "is missing from" if odd[0] in self._masters else "is trained only in"
            problem = f"{len(odd)} trained tensors differ; the first {side} the checkpoint"
            raise CheckpointError(problem, where=odd[0], remedy="resume with the settings of that run")
        for name, master in self._masters.items():
            found = state[name]
            if found.shape != master.shape or found.dtype != master.dtype:
                raise CheckpointError(
                    f"stored as {found.dtype} {tuple(found.shape)}, trained here as {master.dtype} {tuple(master.shape)}", where=name,
                    remedy="resume with the rank, targets and optimizer of that run",
                )
