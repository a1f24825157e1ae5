"""Routes resolved against a model: which blocks they span, how many tokens leave, and what is wrong with them. Costs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from tuner.errors import ConfigError
from tuner_regularizers.tread_options import KEY, TreadConfig, TreadRoute


@dataclass(frozen=True)
class Route:
    """From before block `first` to after block `last` the share `ratio` of the tokens that may leave is left out."""

    ratio: float
    first: int
    last: int

    @property
    def blocks(self) -> str:
        """In words."""
        return f"block {self.first}" if self.first == self.last else f"blocks {self.first} to {self.last}"

    def leaving(self, free: int) -> int:
        """How many of `free` tokens leave, rounded down; at least one stays."""
        return max(0, min(int(self.ratio * free + 1e-6), free - 1))  # 0.29 · 100 is a little less than 29


def resolve_routes(config: TreadConfig, blocks: int) -> tuple[list[Route], list[ConfigError]]:
    """The routes over a model of so many blocks, in order of their blocks; or what is wrong, each with the route it is about."""
    resolved: dict[str, Route] = {}
    problems: list[ConfigError] = []
    for index, given in enumerate(config.routes):
        where = f"{KEY}.routes[{index}]"
        found = _outside(where, given, blocks)
        if not found:
            resolved[where] = route = Route(given.selection_ratio, given.start_layer_idx % blocks, given.end_layer_idx % blocks)
            found = _backwards(where, given, route)
        problems += found
    problems += [problem for pair in combinations(resolved.items(), 2) if not problems and (problem := _overlap(*pair))]
    return sorted(resolved.values(), key=lambda route: route.first), problems


def _outside(where: str, given: TreadRoute, blocks: int) -> list[ConfigError]:
    indices = {"start_layer_idx": given.start_layer_idx, "end_layer_idx": given.end_layer_idx}
    remedy = f"the model has {blocks} blocks: give 0 to {blocks - 1}, or -{blocks} to -1 counted from the end"
    return [
        ConfigError("is no block of this model", where=f"{where}.{name}", value=index, remedy=remedy)
        for name, index in indices.items()
        if not -blocks <= index < blocks
    ]


def _backwards(where: str, given: TreadRoute, route: Route) -> list[ConfigError]:
    if route.first <= route.last:
        return []
    problem = f"holds no block: it begins before block {route.first} and ends after block {route.last}"
    value = {"start_layer_idx": given.start_layer_idx, "end_layer_idx": given.end_layer_idx}
    return [ConfigError(problem, where=where, value=value, remedy="end_layer_idx is the last block of the route")]


def _overlap(one: tuple[str, Route], other: tuple[str, Route]) -> ConfigError | None:
    first, last = max(one[1].first, other[1].first), min(one[1].last, other[1].last)
    if first > last:
        return None
    remedy = "a block lies in one route at most: shorten one"
    return ConfigError(f"both hold {Route(0, first, last).blocks}", where=f"{one[0]}, {other[0]}", remedy=remedy)


def facts_problems(streams: Sequence[str], learned: Sequence[str], datasets: Sequence[str]) -> list[ConfigError]:
    """What speaks against routing the video tokens of a run that computes `streams` and learns those of `learned`."""
    if "video" not in streams:
        where, names = f"{KEY}, data_backend_config", ", ".join(datasets)
        problem = "routes tokens of the picture, and what is trained on has none"
        return [ConfigError(problem, where=where, value=names or None, remedy=f"leave {KEY} out, or add clips or pictures")]
    if "video" not in learned:
        problem = "routes tokens of the picture, and the whole picture is given clean: none of them may leave"
        seen = f"learned: {', '.join(learned)}"
        return [ConfigError(problem, where=KEY, value=seen, remedy=f"leave {KEY} out, or train the picture too")]
    return []
