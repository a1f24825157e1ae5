"""TREAD: in training a share of the video tokens skips a range of blocks (arXiv 2501.04765).

Before a route's first block a share of the tokens leaves, drawn uniformly for each sample; after its last block they come back with the
values that they had, and the others go on from theirs. The loss counts all tokens. There is nothing to learn and nothing to do at
inference. Tokens that are given clean never leave: what is learned is what goes with them.

Dimensions: B samples, S video tokens (those of a reference included), K tokens that stay.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from tuner.errors import TunerError
from tuner.interfaces.blocks import BlockSet, BlockState
from tuner.interfaces.family import Batch, BuildContext, Noise
from tuner.interfaces.losses import Regularizer, TrainingFacts, Transform
from tuner.model.selection import restore, select, with_counts
from tuner_regularizers.routes import Route, facts_problems, resolve_routes
from tuner_regularizers.tread_options import TreadConfig, TreadOptions

STREAM = "video"
"""Sound is not routed: it is a few percent of the tokens, and the paper's tokens are those of pictures."""


class Tread(Regularizer):
    """Draws before each batch which tokens stay, and takes the others out of the state between two blocks."""

    name = "tread"
    capturable: ClassVar[bool] = True

    def __init__(self, options: TreadOptions, context: BuildContext) -> None:
        assert options.tread_config is not None  # else it is not enabled
        self.config: TreadConfig = options.tread_config
        self.routes: tuple[Route, ...] = ()
        self.device = context.device
        self._places: dict[tuple[int, int], Tensor] = {}
        """(B, S) -> (routes, B · S) int64 where the ids of such batches are written: a captured step goes on reading there."""
        self._staying: tuple[int, ...] = ()
        """K of each route for the batch under way; empty: nothing leaves."""
        self._ids: tuple[Tensor, ...] = ()
        """(B, K) of each route, ascending."""

    def check(self, facts: TrainingFacts) -> Sequence[TunerError]:
        _, problems = resolve_routes(self.config, facts.blocks)
        return [*problems, *facts_problems(facts.streams, facts.learned_streams, facts.datasets)]

    def describe(self, facts: TrainingFacts) -> str:
        routes, _ = resolve_routes(self.config, facts.blocks)
        return "; ".join(f"{route.ratio:.0%} of the video tokens skip {route.blocks}" for route in routes) + f", of {facts.blocks} blocks"

    def attach(self, blocks: BlockSet, context: BuildContext) -> None:
        routes, problems = resolve_routes(self.config, len(blocks))
        if problems:
            raise problems[0]
        self.routes = tuple(route for route in routes if route.ratio > 0)

    def transforms(self) -> Sequence[Transform]:
        leave = [Transform(route.first, "before", partial(self._leave, index)) for index, route in enumerate(self.routes)]
        return [*leave, *(Transform(route.last, "after", self._return) for route in self.routes)]

    def begin_step(self, step: int, batch: Batch, noise: Noise, generator: torch.Generator) -> None:
        self._staying = self._ids = ()
        given = batch.streams.get(STREAM)
        if given is None or given.clean or not self.routes:
            return
        count, tokens = given.latents.shape[:2]
        counted = batch if STREAM in batch.most_given else with_counts(batch)
        free = tokens - counted.most_given[STREAM]
        staying = tuple(tokens - route.leaving(free) for route in self.routes)
        if all(kept == tokens for kept in staying):
            return
        places = self._places_for(count, tokens)
        self._staying = staying
        self._ids = tuple(place[: count * kept].view(count, kept) for place, kept in zip(places, staying, strict=True))
        for ids in self._ids:
            ids.copy_(drawn(count, tokens, ids.shape[1], given.conditioned, generator, self.device))

    def graph_key(self) -> Hashable:
        return self._staying

    def _places_for(self, count: int, tokens: int) -> Tensor:
        if (count, tokens) not in self._places:
            self._places[count, tokens] = torch.zeros(len(self.routes), count * tokens, dtype=torch.int64, device=self.device)
        return self._places[count, tokens]

    def _leave(self, route: int, state: BlockState) -> BlockState:
        return select(state, STREAM, self._ids[route]) if self._ids else state

    def _return(self, state: BlockState) -> BlockState:
        return restore(state, STREAM) if self._ids else state


def drawn(count: int, tokens: int, kept: int, protected: Tensor | None, generator: torch.Generator, device: torch.device) -> Tensor:
    """(B, K) int64 on `device`, ascending: `kept` of `tokens` positions for each of `count` samples, uniformly but for `protected`.

    `protected`: (B, S) bool on `device`, at most K in a row; these positions are always among the drawn. Waits for nothing.
    """
    # Pinned, so that the copy neither waits for the device nor is overwritten before it is made.
    scores = torch.rand(count, tokens, generator=generator, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    if protected is not None:
        scores = scores.masked_fill(protected, -1.0)
    return scores.argsort(dim=1, stable=True)[:, :kept].sort(dim=1).values
