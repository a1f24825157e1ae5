"""Single layers: outputs and gradients of streamed ones are those of autograd, bit for bit; and networks that nobody announces."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from offload.simulated import SimulatedLink
from tuner_offload.leaf import SLOTS, LeafSession
from tuner_offload.route import LoopRoute, PassRoute

CPU = torch.device("cpu")


def streamed(layer: nn.Module, link: SimulatedLink | None = None) -> LeafSession:
    """Streams what is in `layer`, as a block of its own."""
    session = LeafSession(link or SimulatedLink(), "key", stream=True, smallest=0)
    session.receive(0, layer, CPU)
    session._start(PassRoute())
    return session


INPUTS: dict[str, Callable[[], Tensor]] = {
    "(S, K)": lambda: torch.randn(5, 32),
    "(B, S, K)": lambda: torch.randn(2, 7, 32),
    "(B, H, S, K)": lambda: torch.randn(2, 3, 4, 32),
    "(K)": lambda: torch.randn(32),
    "one token": lambda: torch.randn(1, 1, 32),
    "transposed": lambda: torch.randn(7, 2, 32).transpose(0, 1),
    "expanded": lambda: torch.randn(1, 7, 32).expand(3, -1, -1),
}


@pytest.mark.parametrize("given", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_is_that_of_autograd_bit_for_bit(given: Callable[[], Tensor], dtype: torch.dtype) -> None:
    for bias in (True, False):
        layer = nn.Linear(32, 24, bias=bias).to(dtype).requires_grad_(False)
        check_equal_gradients(nn.Sequential(layer), given().to(dtype))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (2, 6, 9)),
    "2d, strided, dilated, in groups": (lambda: nn.Conv2d(6, 8, 3, stride=2, dilation=2, groups=2), (2, 6, 9, 11)),
    "3d": (lambda: nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1), bias=False), (1, 4, 3, 6, 5)),
    "1d, transposed": (lambda: nn.ConvTranspose1d(6, 4, 4, stride=2, padding=1), (2, 6, 9)),
    "2d, transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1, groups=2), (1, 6, 5, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_convolution_is_that_of_autograd_bit_for_bit(kind: str) -> None:
    make, shape = LAYERS[kind]
    check_equal_gradients(nn.Sequential(make().requires_grad_(False)), torch.randn(shape))


def check_equal_gradients(block: nn.Sequential, given: Tensor) -> None:
    results = []
    plain = type(block[0])
    for session in (None, streamed):
        running = session(block) if session else None
        given = given.detach().requires_grad_()
        output = block(given)
        output.square().sum().backward()
        assert given.grad is not None
        results.append((output.detach(), given.grad))
        # An input without gradient gives an output without one, and nothing is kept.
        assert block(given.detach()).requires_grad is False
        if running is not None:
            assert type(block[0]) is not plain and isinstance(block[0], plain)
            running.detach()
    assert type(block[0]) is plain
    (output, gradient), (other_output, other_gradient) = results
    assert torch.equal(output, other_output) and torch.equal(gradient, other_gradient)
    assert gradient.stride() == other_gradient.stride()


def test_layers_with_padding_of_their_own_stay_where_they_are_in_training() -> None:
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Embedding(9, 4))
    link = SimulatedLink()
    session = streamed(block, link)
    assert link.slots == [] and [type(layer) for layer in block] == [nn.Conv2d, nn.Conv2d, nn.Embedding]
    session.detach()


# --- networks held without gradients -----------------------------------------------------------------------------
class Coder(nn.Module):
    """As a VAE: two ways in, convolutions of all kinds, something that is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv3d(4, 4, 3, padding=1, padding_mode="reflect") for _ in range(5))
        self.up = nn.ModuleList(nn.ConvTranspose3d(4, 4, 2, stride=2) for _ in range(2))
        self.mix = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4))

    def encode(self, x: Tensor) -> Tensor:
        for layer in self.down:
            x = layer(x).tanh()
        return self.mix(x.movedim(1, -1)) * self.scale - self.mean

    def decode(self, x: Tensor) -> Tensor:
        x = x.movedim(-1, 1)
        for layer in self.up:
            x = layer(x, output_size=[2 * side for side in x.shape[2:]])
        return x


@torch.no_grad()
@pytest.mark.parametrize("stream", [True, False])
def test_a_network_without_blocks_computes_the_same(stream: bool) -> None:
    coder, link = Coder().eval().requires_grad_(False), SimulatedLink()
    before = {name: value.clone() for name, value in coder.state_dict().items()}
    given = torch.randn(1, 4, 3, 4, 4)
    latents = coder.encode(given)
    pictures = coder.decode(latents)
    session = LeafSession(link, "ramtorch_vae", stream=stream, smallest=0)
    session.hold(coder, CPU)
    for _ in range(4):
        assert torch.equal(coder.encode(given), latents)
        assert torch.equal(coder.decode(latents), pictures)
    assert len(link.slots) == (SLOTS if stream else 1)
    if stream:  # one round is learned, and where it begins again
        assert session.stats()["misses"] <= 10
    assert link.loads <= 4 * 8 + SLOTS
    session.detach()
    after = coder.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before) and torch.equal(coder.encode(given), latents)


# --- orders ------------------------------------------------------------------------------------------------------
def walk(route: PassRoute, layers: list[int], kind: int = 0) -> list[int]:
    """How many of `layers` came unforeseen, by their places."""
    route.begin(kind)
    late = []
    for place, layer in enumerate(layers):
        if list(route.ahead(1)) != [layer]:
            late.append(place)
        route.follow(layer)
    route.end()
    return late


def test_an_order_is_known_after_one_pass() -> None:
    route, order = PassRoute(), [0, 1, 2, 0, 1, 2, 1, 0]
    assert walk(route, order) == list(range(8))
    assert walk(route, order) == []
    assert walk(route, [0, 1, 2], kind=3) == [0]  # another kind; then one that began alike is tried
    assert walk(route, order) == [] and walk(route, [0, 1, 2], kind=3) == []


def test_a_known_order_with_the_same_beginning_is_taken_up() -> None:
    route, long, short = PassRoute(), [0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 3, 0, 1, 3]
    walk(route, long)
    walk(route, short)
    assert walk(route, long) == [2] and walk(route, short) == [2] and walk(route, short) == []


def test_a_pass_that_leaves_something_out_is_followed_from_there() -> None:
    route = PassRoute()
    walk(route, [0, 1, 2, 3, 4, 5])
    assert walk(route, [0, 1, 4, 5]) == [2]
    walk(route, [0, 1, 2, 3, 4, 5])
    assert walk(route, [0, 1, 9, 2, 3]) == [2]  # something new is put in


def test_a_pass_that_was_broken_off_teaches_nothing() -> None:
    route = PassRoute()
    walk(route, [0, 1, 2])
    route.begin(0)
    route.follow(0)
    route.forget()
    assert list(route.ahead(3)) == [] and walk(route, [0, 1, 2]) == []


def test_a_loop_is_known_after_one_round() -> None:
    route = LoopRoute()
    for layer in [0, 1, 2, 0]:
        route.follow(layer)
    assert list(route.ahead(2)) == [1, 2] and list(route.ahead(9)) == [1, 2, 0]
    route.forget()
    assert list(route.ahead(2)) == []
