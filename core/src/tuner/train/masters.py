"""Master weights: what the optimizer steps, where that is not what the model computes with.

The model computes in its own dtype. Trained bfloat16 parameters have float32 copies here, which take the updates and are
rounded back into the model after each step; gradients of several batches are added up in float32. A float32 parameter is its own
master, and so is every parameter if the optimizer asks for low precision (`wants_low_precision`).

The copies lie in flat buckets. An adapter has thousands of small matrices, and a kernel for each of them in every operation of
a step would cost more time than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tuner.errors import CheckpointError

BUCKET_ELEMENTS = 1 << 26
"""256 MiB of float32; what `collect` and `publish` need beside the masters is a bucket in the model's dtype."""


@dataclass(frozen=True)
class Bucket:
    """Some of the model's parameters, and their masters one after the other."""

    names: tuple[str, ...]
    members: tuple[nn.Parameter, ...]
    master: nn.Parameter
    """(N,) float32."""

    @property
    def sizes(self) -> list[int]:
        """Elements of each member."""
        return [member.numel() for member in self.members]

    def parts(self) -> dict[str, Tensor]:
        """Name -> master in the member's shape: views."""
        return self.shaped(self.master.detach())

    def shaped(self, flat: Tensor) -> dict[str, Tensor]:
        """Name -> what `flat` (N,) has for it, in the member's shape: views."""
        pieces = torch.split(flat, self.sizes)
        return {name: piece.view(m.shape) for name, m, piece in zip(self.names, self.members, pieces, strict=True)}

    def collect(self, received: dict[int, Tensor]) -> None:
        """Moves the members' gradients into the master's, added up in float32."""
        if (found := self.gather(received)) is not None:
            if self.master.grad is None:
                self.master.grad = found
            else:
                self.master.grad.add_(found)

    def gather(self, received: dict[int, Tensor]) -> Tensor | None:
        """(N,) float32: the members' gradients, which they lose; None where there are none. `received`: id of a member -> its own."""
        given = [received.pop(id(member), member.grad) for member in self.members]
        if all(gradient is None for gradient in given):
            return None
        pairs = zip(self.members, given, strict=True)
        found = torch.cat([(torch.zeros_like(m) if gradient is None else gradient).reshape(-1) for m, gradient in pairs])
        for member in self.members:
            member.grad = None
        return found.float()

    def publish(self) -> None:
        """Rounds the master into the members, in place."""
        rounded = torch.split(self.master.detach().to(self.members[0].dtype), self.sizes)
        torch._foreach_copy_([m.detach().view(-1) for m in self.members], list(rounded))


class MasterWeights:
    """The trained parameters by name, and the tensors that stand for them in the optimizer.

    Masters start from the model's values: a float32 value that the model's dtype cannot hold is not known here; `load_state` restores it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], low_precision: bool) -> None:
        halves = (torch.bfloat16, torch.float16)
        copied = {n: p for n, p in parameters.items() if p.dtype in halves and not low_precision}
        self._own = {n: p for n, p in parameters.items() if n not in copied}
        self._buckets = _buckets(copied)
        self._names = tuple(parameters)
        self._members = frozenset(id(parameter) for parameter in copied.values())
        self._received: dict[int, Tensor] = {}

    def takes(self, parameter: nn.Parameter) -> bool:
        """Whether it has a float32 copy here."""
        return id(parameter) in self._members

    def receive(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Takes a float32 gradient in place of the parameter's own `grad`, until `collect` or `gather`."""
        self._received[id(parameter)] = gradient

    def optimized(self) -> list[nn.Parameter]:
        """What the optimizer steps: the buckets' masters, then parameters that are their own master."""
        return [*(bucket.master for bucket in self._buckets), *self._own.values()]

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the model's gradients to the masters' and frees them. Call after each backward pass."""
        for bucket in self._buckets:
            bucket.collect(self._received)

    @torch.no_grad()
    def gather(self) -> list[Tensor | None]:
        """Takes the model's gradients out, one tensor for each of `optimized`, and leaves none; for `add`."""
        found: list[Tensor | None] = [bucket.gather(self._received) for bucket in self._buckets]
        for parameter in self._own.values():
            found.append(parameter.grad)
            parameter.grad = None
        return found

    @torch.no_grad()
    def add(self, gradients: Sequence[Tensor | None], *, copy: bool) -> None:
        """Adds what `gather` took out to the masters' gradients. Without `copy` a first gradient becomes the master's own tensor."""
        for master, gradient in zip(self.optimized(), gradients, strict=True):
            if gradient is None:
                continue
            if master.grad is None:
                master.grad = gradient.clone() if copy else gradient
            else:
                master.grad.add_(gradient)

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the masters into the model's parameters, in place. Call after each optimizer step."""
        for bucket in self._buckets:
            bucket.publish()

    @torch.no_grad()
    def clip_(self, max_norm: float) -> Tensor:
        """Scales all gradients so that their common 2-norm is at most `max_norm`; 0 only measures.

        Returns the norm before, float32 of shape () on the gradients' device, 0 without gradients. Waits for no device.
        """
        gradients = [master.grad for master in self.optimized() if master.grad is not None]
        if not gradients:
            return torch.zeros((), device=self.optimized()[0].device)
        # Measured in float32 also where gradients are bfloat16, whose own norm would be good to three digits only.
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.optimized(), max_norm, total)
        return total

    @torch.no_grad()
    def are_finite(self) -> bool:
        """Whether every trained value is a number; waits for the device."""
        return all(bool(torch.isfinite(master).all()) for master in self.optimized())

    def state(self) -> dict[str, Tensor]:
        """The masters by name, in the order given: the live tensors, not copies."""
        found = {name: parameter.detach() for name, parameter in self._own.items()}
        for bucket in self._buckets:
            found |= bucket.parts()
        return {name: found[name] for name in self._names}

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of those that have one, by name, in the parameter's shape: views of the live tensors."""
        found = {name: p.grad for name, p in self._own.items() if p.grad is not None}
        for bucket in self._buckets:
            if bucket.master.grad is not None:
                found |= bucket.shaped(bucket.master.grad)
        return {name: found[name] for name in self._names if name in found}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`; the model follows. Raises `CheckpointError` unless names, shapes and dtypes are the same."""
        own = self.state()
        _check(own, state)
        for name, master in own.items():
            master.copy_(state[name])
        self.publish()


def _buckets(parameters: Mapping[str, nn.Parameter]) -> list[Bucket]:
    """Parameters of one device and dtype together, in order, at most `BUCKET_ELEMENTS` (or one parameter) each."""
    groups: list[list[tuple[str, nn.Parameter]]] = []
    size = 0
    for name, parameter in parameters.items():
        last = groups[-1][0][1] if groups else None
        alike = last is not None and (last.device, last.dtype) == (parameter.device, parameter.dtype)
        if not alike or size + parameter.numel() > BUCKET_ELEMENTS:
            groups.append([])
            size = 0
        groups[-1].append((name, parameter))
        size += parameter.numel()
    return [_bucket(group) for group in groups]


def _bucket(group: list[tuple[str, nn.Parameter]]) -> Bucket:
    members = tuple(parameter for _, parameter in group)
    flat = torch.cat([member.detach().reshape(-1).float() for member in members])
    return Bucket(tuple(name for name, _ in group), members, nn.Parameter(flat))


def _check(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    odd = sorted(set(own) ^ set(state))
    if odd:
        side = "is missing from" if odd[0] in own else "is trained only in"
        problem = f"{len(odd)} trained tensors differ; the first {side} the checkpoint"
        raise CheckpointError(problem, where=odd[0], remedy="resume with the settings of that run")
    for name, master in own.items():
        found = state[name]
        if found.shape != master.shape or found.dtype != master.dtype:
            raise CheckpointError(
                f"stored as {found.dtype} {tuple(found.shape)}, trained here as {master.dtype} {tuple(master.shape)}", where=name,
                remedy="resume with the rank, targets and optimizer of that run",
            )  # fmt: skip
