"""Several processes, one run: what all ranks must know before any of them goes on.

Answers travel over a group of their own on the host. Thus nothing waits for a device's queue, and a wait may last as long as caching or
a large save does, where the devices' own group would give up after minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch

from tuner.errors import EnvironmentProblem, TunerError

T = TypeVar("T")
PATIENCE = timedelta(days=2)
"""How long a rank waits for another that is at work; one that has ended is noticed at once."""


class OtherRankFailed(TunerError):
    """Another rank of this run failed and has said why; its exit code is taken over."""

    def __init__(self, rank: int, exit_code: int) -> None:
        super().__init__(f"stopped because rank {rank} failed; its message says why")
        self.exit_code = exit_code


class Ranks:
    """This process among `world` processes. With one, nothing is sent and every answer is its own."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank = rank
        self.world = world
        self._group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE) if world > 1 else None

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def most(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over all ranks. Every rank must call it, in the same order as its other calls here.

        Raises `EnvironmentProblem` where a rank is gone.
        """
        if self._group is None:
            return list(values)
        shared = torch.tensor(list(values), dtype=torch.int64)
        try:
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX, group=self._group)
        except RuntimeError as error:  # what gloo raises where a connection breaks
            raise EnvironmentProblem(
                "another process of this run has ended", where=f"rank {self.rank}",
                remedy="see what it said, then go on from the last checkpoint",
            ) from error  # fmt: skip
        agreed: list[int] = shared.tolist()
        return agreed

    def together(self, work: Callable[[], T]) -> T:
        """Does `work` on every rank at once; returns when all are done.

        Where it raises a `TunerError` on any rank all stop: that rank with its error, the others with `OtherRankFailed`. Ranks that
        failed with the first one keep silent, since they would say the same.
        """
        result, error = None, None
        try:
            result = work()
        except TunerError as caught:
            error = caught
        codes = self.most([error.exit_code if error and rank == self.rank else 0 for rank in range(self.world)])
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if error is not None and failed == self.rank:
            raise error
        if failed is not None:
            raise OtherRankFailed(failed, codes[failed]) from error
        return result  # type: ignore[return-value]

    def main_first(self, work: Callable[[], T]) -> T:
        """Does `work` on the first rank, then on the others, which find what it left. Errors as in `together`."""
        found = self.together(work if self.main else _nothing)
        later = self.together(_nothing if self.main else work)
        return found if self.main else later  # type: ignore[return-value]


def _nothing() -> None:
    return None
