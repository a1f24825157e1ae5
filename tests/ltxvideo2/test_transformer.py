"""The three parts of the forward pass against diffusers' own forward, and against formulas where diffusers differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel
from torch import Tensor

from ltxvideo2.ltx2_models import GRID, LENGTH, RATES, SMALLER, R, batch_and_noise, transformer, with_reference
from ltxvideo2.ltx2_published import modules
from tuner.interfaces.blocks import BlockState, TokenStream
from tuner.interfaces.family import Batch, Noise, StreamBatch
from tuner.model.selection import select
from tuner_ltxvideo2 import sides
from tuner_ltxvideo2 import transformer as forward
from tuner_ltxvideo2.block import call_block

torch.set_num_threads(1)
S = GRID[0] * GRID[1] * GRID[2]
SHARED = {"video": (0.8, 0.35), "audio": (0.8, 0.35)}
APART = {"video": (0.8, 0.35), "audio": (0.15, 0.6)}
CONDITIONED = torch.stack([torch.arange(S) < GRID[1] * GRID[2], torch.zeros(S, dtype=torch.bool)])


def predict(model: LTX2VideoTransformer3DModel, batch: Batch, noise: Noise) -> dict[str, Tensor]:
    state = forward.enter(model, batch, noise, forward.RotaryTables())
    for block in sides.transformer_blocks(model):
        state = call_block(block, state)
    return dict(forward.exit(model, state).streams)


def reference(
    model: LTX2VideoTransformer3DModel, batch: Batch, noise: Noise, *, isolate: bool = False, cross_timestep: bool = True
) -> dict[str, Tensor]:
    """diffusers' own forward; one sample at a time, since it takes one frame rate."""
    parts: dict[str, list[Tensor]] = {"video": [], "audio": []}
    for i, rate in enumerate(batch.frame_rate):
        one = slice(i, i + 1)
        sigma = {name: noise.streams[name].sigma[one] * 1000 for name in ("video", "audio")}
        video, audio = model(
            hidden_states=noise.streams["video"].noisy[one], audio_hidden_states=noise.streams["audio"].noisy[one],
            encoder_hidden_states=batch.text["video"][one], audio_encoder_hidden_states=batch.text["audio"][one],
            timestep=sigma["video"], audio_timestep=sigma["audio"], sigma=sigma["video"], audio_sigma=sigma["audio"],
            num_frames=GRID[0], height=GRID[1], width=GRID[2], fps=rate, audio_num_frames=LENGTH,
            isolate_modalities=isolate, use_cross_timestep=cross_timestep, return_dict=False,
            video_keyframes_mask=(torch.arange(S) < GRID[1] * GRID[2])[None, :, None],  # what 2.5 marks: the first latent frame
        )
        parts["video"].append(video)
        parts["audio"].append(audio)
    return {name: torch.cat(part) for name, part in parts.items()}


def spread(state: BlockState, name: str) -> Tensor:
    """(B, 1 or S, N·D): the modulation of each token."""
    values = state.shared[name]
    clean = state.streams[name.split(".")[0]].aligned.get("clean")
    return values if clean is None else torch.where(clean.tensor, values[:, 1:], values[:, :1])


@pytest.mark.parametrize(("generation", "rope_type"), [("2.0", "split"), ("2.0", "interleaved"), ("2.3", "split"), ("2.5", "split")])
def test_forward_equals_diffusers_where_both_streams_share_one_sigma(generation: str, rope_type: str) -> None:
    model = transformer(generation, rope_type, cross_attn_timestep_scale_multiplier=1000)
    mask = (torch.arange(LENGTH) < 4).float().expand(2, LENGTH)
    with torch.no_grad():
        plain, masked = (predict(model, *batch_and_noise(model, SHARED, loss_mask=given)) for given in (None, mask))
        for cross_timestep in (True, False):
            expected = reference(model, *batch_and_noise(model, SHARED), cross_timestep=cross_timestep)
            for name in ("video", "audio"):
                torch.testing.assert_close(plain[name], expected[name], atol=1e-5, rtol=1e-5)
                assert torch.equal(plain[name], masked[name]), "a loss mask must not reach the prediction"


def test_static_prompt_table_without_prompt_adaln() -> None:
    model = transformer("2.3", use_prompt_adaln_single=False)
    with torch.no_grad():
        given = batch_and_noise(model, SHARED)
        expected = reference(model, *given)
        got = predict(model, *given)
    for name, values in got.items():
        torch.testing.assert_close(values, expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("generation", ["2.0", "2.3"])
def test_call_block_equals_diffusers_block(generation: str) -> None:
    model = transformer(generation)
    with torch.no_grad():
        state = forward.enter(model, *batch_and_noise(model, APART, conditioned=CONDITIONED), forward.RotaryTables())
        block = sides.transformer_blocks(model)[0]
        video, audio = (state.streams[name] for name in ("video", "audio"))

        def rotary(stream: TokenStream, name: str) -> tuple[Tensor, Tensor]:
            return stream.aligned[f"{name}_cos"].tensor, stream.aligned[f"{name}_sin"].tensor

        expected = block(
            video.hidden, audio.hidden, state.shared["video.text"], state.shared["audio.text"],
            spread(state, "video.modulation"), spread(state, "audio.modulation"),
            spread(state, "video.cross_modulation"), spread(state, "audio.cross_modulation"),
            state.shared["video.cross_gate"], state.shared["audio.cross_gate"],
            temb_prompt=state.shared.get("video.prompt"), temb_prompt_audio=state.shared.get("audio.prompt"),
            video_rotary_emb=rotary(video, "rope"), audio_rotary_emb=rotary(audio, "rope"),
            ca_video_rotary_emb=rotary(video, "cross_rope"), ca_audio_rotary_emb=rotary(audio, "cross_rope"),
        )
        got = call_block(block, state)
    # Norms, modulation and gates are rounded once instead of after each step.
    torch.testing.assert_close(got.streams["video"].hidden, expected[0], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(got.streams["audio"].hidden, expected[1], rtol=1e-5, atol=2e-6)
    assert got.shared is state.shared
    assert got.streams["video"].aligned is video.aligned


def test_timesteps_per_token_agree_with_timesteps_per_sample() -> None:
    model = transformer("2.3")
    none_conditioned = torch.zeros(2, S, dtype=torch.bool)
    with torch.no_grad():
        per_sample = predict(model, *batch_and_noise(model, APART))
        per_token = predict(model, *batch_and_noise(model, APART, conditioned=none_conditioned))
        state = forward.enter(model, *batch_and_noise(model, APART), forward.RotaryTables())
        given = forward.enter(model, *batch_and_noise(model, APART, conditioned=CONDITIONED), forward.RotaryTables())
    for name, values in per_sample.items():
        assert torch.equal(per_token[name], values)
    assert state.shared["video.modulation"].shape == (2, 1, 9 * 64)
    assert given.shared["video.modulation"].shape == (2, 2, 9 * 64), "its own timestep and 0: never a (B, S, N·D) tensor"


@pytest.mark.parametrize("generation", ["2.0", "2.3"])
def test_modulation_follows_own_timestep_and_gate_follows_the_other_sigma(generation: str) -> None:
    """The embeddings written out with diffusers' submodules, different sigmas in the streams, some video tokens given clean."""
    model = transformer(generation)
    with torch.no_grad():
        state = forward.enter(model, *batch_and_noise(model, APART, conditioned=CONDITIONED), forward.RotaryTables())
        sigma = {name: torch.tensor(values) for name, values in APART.items()}
        own = torch.where(CONDITIONED, 0.0, sigma["video"][:, None].expand(2, S)) * 1000

        def embed(module: torch.nn.Module, timestep: Tensor) -> Tensor:
            return module(timestep.flatten(), batch_size=2, hidden_dtype=torch.float32)[0].view(2, -1, module.linear.out_features)

        expected = {
            "video.modulation": embed(model.time_embed, own),
            "audio.modulation": embed(model.audio_time_embed, sigma["audio"] * 1000),
            "video.cross_modulation": embed(model.av_cross_attn_video_scale_shift, own),
            "audio.cross_modulation": embed(model.av_cross_attn_audio_scale_shift, sigma["audio"] * 1000),
        }
        for name, wanted in expected.items():
            torch.testing.assert_close(spread(state, name), wanted, atol=1e-5, rtol=1e-5, msg=name)
        # 700: this small model's cross_attn_timestep_scale_multiplier
        torch.testing.assert_close(state.shared["video.cross_gate"], embed(model.av_cross_attn_video_a2v_gate, sigma["audio"] * 700))
        torch.testing.assert_close(state.shared["audio.cross_gate"], embed(model.av_cross_attn_audio_v2a_gate, sigma["video"] * 700))
        if generation == "2.3":
            torch.testing.assert_close(state.shared["video.prompt"], embed(model.prompt_adaln, sigma["video"] * 1000))
            torch.testing.assert_close(state.shared["audio.prompt"], embed(model.audio_prompt_adaln, sigma["audio"] * 1000))


@pytest.mark.parametrize("name", ["video", "audio"])
@pytest.mark.parametrize("generation", ["2.0", "2.3"])
def test_a_given_stream_is_clean_at_timestep_zero(generation: str, name: str) -> None:
    """By hand: diffusers' blocks and embeddings over the clean latents, everything of that stream at 0, the other's gate too."""
    model = transformer(generation)
    batch, noise = batch_and_noise(model, APART)
    given = dataclasses.replace(batch, streams={**batch.streams, name: dataclasses.replace(batch.streams[name], clean=True)})
    other = "audio" if name == "video" else "video"
    by_hand = batch_and_noise(model, {n: (0.0, 0.0) if n == name else APART[n] for n in APART})
    assert torch.equal(by_hand[1].streams[name].noisy, batch.streams[name].latents)
    with torch.no_grad():
        state = forward.enter(model, given, noise, forward.RotaryTables())
        assert torch.equal(predict(model, given, noise)[other], predict(model, *by_hand)[other])
        gate = {"video": model.av_cross_attn_video_a2v_gate, "audio": model.av_cross_attn_audio_v2a_gate}[other]
        expected, _ = gate(torch.zeros(2), batch_size=2, hidden_dtype=torch.float32)
        own, _ = model.time_embed(torch.zeros(2), batch_size=2, hidden_dtype=torch.float32)
    assert torch.equal(state.shared[f"{other}.cross_gate"][:, 0], expected)
    assert name == "audio" or torch.equal(state.shared["video.modulation"][:, 0], own)
    protected = {key: stream.protected for key, stream in state.streams.items()}
    assert protected[other] is None and protected[name] is not None and bool(protected[name].all())


# --- a reference clip --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("generation", ["2.0", "2.3"])
def test_reference_tokens_equal_diffusers_forward_with_appended_coordinates(generation: str) -> None:
    """The picture's own path, which diffusers computes as the model's makers do; what crosses to sound is compared block by block."""
    model = transformer(generation)
    batch, noise = with_reference(*batch_and_noise(model, APART, conditioned=CONDITIONED))
    stream, drawn = batch.streams["video"], noise.streams["video"]
    assert stream.conditioned is not None and stream.extra_tokens == R
    alone = dataclasses.replace(batch, streams={"video": stream}), Noise({"video": drawn})
    with torch.no_grad():
        state = forward.enter(model, *alone, forward.RotaryTables())
        got = predict(model, *alone)["video"]
        for i, rate in enumerate(RATES):
            one = slice(i, i + 1)
            coordinates = model.rope.prepare_video_coords(1, *GRID, "cpu", fps=rate)
            appended = model.rope.prepare_video_coords(1, *SMALLER, "cpu", fps=rate)
            appended[:, 1:] *= 2
            sigma = drawn.sigma[one] * 1000
            expected, _ = model(
                hidden_states=drawn.noisy[one], audio_hidden_states=noise.streams["audio"].noisy[one],
                encoder_hidden_states=batch.text["video"][one], audio_encoder_hidden_states=batch.text["audio"][one],
                timestep=torch.where(stream.conditioned[one], 0.0, sigma[:, None]), audio_timestep=sigma, sigma=sigma, audio_sigma=sigma,
                num_frames=GRID[0], height=GRID[1], width=GRID[2], fps=rate, audio_num_frames=LENGTH,
                video_coords=torch.cat([coordinates, appended], dim=2), isolate_modalities=True, return_dict=False,
            )  # fmt: skip
            torch.testing.assert_close(got[one], expected, atol=1e-5, rtol=1e-5)
    video = state.streams["video"]
    assert (video.grid, video.extra_tokens, video.hidden.shape[1]) == (GRID, R, S + R)
    assert video.protected is not None and bool(video.protected[:, S:].all())


def test_reference_tokens_lie_where_the_picture_does_and_meet_the_sound_at_its_time() -> None:
    model = transformer()
    bounds = forward.token_coordinates(model.rope, sides.VIDEO, GRID, SMALLER, 25.0, "cpu")[0]
    own, extra = bounds[:, :S], bounds[:, S:]
    for axis in range(3):
        assert (own[axis].min(), own[axis].max()) == (extra[axis].min(), extra[axis].max())
    assert (extra[1, :, 1] - extra[1, :, 0]).unique().tolist() == [64.0]
    with torch.no_grad():
        tables = forward.RotaryTables()
        given = with_reference(*batch_and_noise(model, APART))[0].streams["video"]
        cosine = tables.for_batch(model, sides.VIDEO, given, (25.0,), torch.device("cpu"), cross=True)[0]
        expected = model.cross_attn_rope(bounds[None, :1], device="cpu")[0]
    assert torch.equal(cosine, expected)


CONDITIONED_ROWS = torch.stack([torch.arange(S) % 3 == 0, torch.arange(S) % 5 == 1])
"""As a mask of its own for each sample gives them."""
MODES: dict[str, Callable[[LTX2VideoTransformer3DModel], tuple[Batch, Noise]]] = {
    "plain": lambda model: batch_and_noise(model, APART),
    "first frame": lambda model: batch_and_noise(model, APART, conditioned=CONDITIONED),
    "masks": lambda model: batch_and_noise(model, APART, conditioned=CONDITIONED_ROWS),
    "reference": lambda model: with_reference(*batch_and_noise(model, APART)),
    "reference and first frame": lambda model: with_reference(*batch_and_noise(model, APART, conditioned=CONDITIONED)),
    "a clip without sound": lambda model: batch_and_noise(model, APART, present=torch.tensor([True, False])),
    "sound is given": lambda model: given_whole(*batch_and_noise(model, APART), "audio"),
    "picture is given": lambda model: given_whole(*batch_and_noise(model, APART), "video"),
    "one frame rate": lambda model: batch_and_noise(model, APART, rates=(25.0, 25.0)),
    "video alone": lambda model: batch_and_noise(model, {"video": APART["video"]}, conditioned=CONDITIONED),
}


def given_whole(batch: Batch, noise: Noise, name: str) -> tuple[Batch, Noise]:
    """The stream `name` clean."""
    return dataclasses.replace(batch, streams={**batch.streams, name: dataclasses.replace(batch.streams[name], clean=True)}), noise


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("generation", "rope_type"), [("2.0", "interleaved"), ("2.0", "split"), ("2.3", "split"), ("2.5", "split")])
def test_permuted_tokens_give_permuted_predictions(generation: str, rope_type: str, mode: str) -> None:
    """Each sample's tokens in an order of their own: whatever belongs to a token is named as aligned with it."""
    model = transformer(generation, rope_type)
    with torch.no_grad():
        first = forward.enter(model, *MODES[mode](model), forward.RotaryTables())
        for name, stream in first.streams.items():
            generator = torch.Generator().manual_seed(3)
            orders = torch.stack([torch.randperm(stream.hidden.shape[1], generator=generator) for _ in range(2)])
            state, shuffled = first, select(first, name, orders)
            for block in sides.transformer_blocks(model):
                state, shuffled = call_block(block, state), call_block(block, shuffled)
            plain, other = (forward.exit(model, s).streams for s in (state, shuffled))
            for seen, values in plain.items():
                expected = values.gather(1, orders[..., None].expand_as(values)) if seen == name else values
                torch.testing.assert_close(other[seen], expected, atol=2e-5, rtol=1e-5, msg=f"{name} permuted, {seen} differs")


# --- one stream alone --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "drop"), [("video", sides.drop_audio), ("audio", sides.drop_video)])
@pytest.mark.parametrize("generation", ["2.0", "2.3"])
def test_one_stream_alone_equals_the_full_model_without_cross_attention(
    generation: str, name: str, drop: Callable[[torch.nn.Module], None]
) -> None:
    model = transformer(generation)
    with torch.no_grad():
        expected = reference(model, *batch_and_noise(model, APART), isolate=True)[name]
        both = batch_and_noise(model, APART)
        alone = dataclasses.replace(both[0], streams={name: both[0].streams[name]}), Noise({name: both[1].streams[name]})
        unused_still_there = predict(model, *alone)[name]
        every = {key for key, _ in model.named_parameters()}
        drop(model)
        torch.testing.assert_close(predict(model, *alone)[name], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(unused_still_there, predict(model, *alone)[name])
    left = {key for key, _ in model.named_parameters()}
    assert left == {key for key in every if sides.streams_of(key) == {name}}
    skip = sides.skip_for((name,))
    assert left == {key for key in every if not skip(key)}


def test_video_alone_holds_no_parameter_with_an_audio_name() -> None:
    model = transformer("2.3")
    sides.drop_audio(model)
    names = [name for name, _ in [*model.named_parameters(), *model.named_modules()]]
    assert not [name for name in names if "audio" in name or "av_cross" in name or "a2v" in name or "v2a" in name]


def test_sample_without_sound_is_not_touched_by_its_stand_in() -> None:
    model = transformer("2.0")
    with torch.no_grad():
        batch, noise = batch_and_noise(model, APART, present=torch.tensor([True, False]))
        mixed = predict(model, batch, noise)["video"]
        full = predict(model, *batch_and_noise(model, APART))["video"]
        sides.drop_audio(model)
        alone = predict(model, dataclasses.replace(batch, streams={"video": batch.streams["video"]}), noise)["video"]
    torch.testing.assert_close(mixed[0], full[0])
    torch.testing.assert_close(mixed[1], alone[1], atol=1e-6, rtol=1e-5)


# --- real dimensions ---------------------------------------------------------------------------------------------
def test_real_size_has_the_published_number_of_parameters() -> None:
    model = modules("2.0")["transformer"]
    count = {name: sum(p.numel() for key, p in model.named_parameters() if sides.streams_of(key) == streams)
             for name, streams in {"video": {"video"}, "audio": {"audio"}, "cross": {"video", "audio"}}.items()}
    assert round(sum(count.values()) / 1e9, 3) == 18.876
    assert round((count["audio"] + count["cross"]) * 2 / 1e9, 1) == 11.7, "GB of bf16 that video-only training never loads"


# --- dtype, tables, compilation ----------------------------------------------------------------------------------
def test_timestep_stays_fp32_up_to_its_embedding() -> None:
    """In bf16 873.2 would be 872: the bf16 model's modulation must be that of 873.2."""
    model = transformer("2.0").to(torch.bfloat16)
    with torch.no_grad():
        state = forward.enter(model, *batch_and_noise(model, {"video": (0.8732, 0.8732)}), forward.RotaryTables())
        right, rounded = (
            model.time_embed(torch.tensor([t, t]), batch_size=2, hidden_dtype=torch.bfloat16)[0][:, None] for t in (873.2, 872.0)
        )
    got = state.shared["video.modulation"]
    assert torch.equal(got, right)
    assert not torch.equal(got, rounded)
    assert state.streams["video"].hidden.dtype == torch.bfloat16
    assert state.streams["video"].aligned["rope_cos"].tensor.dtype == torch.float32


def test_rotary_tables_are_built_once_and_bounded() -> None:
    model = transformer()
    tables = forward.RotaryTables(capacity=2, spare=0)
    device = torch.device("cpu")

    def table(rates: tuple[float, ...], grid: tuple[int, int, int] = GRID) -> Tensor:
        given = StreamBatch(torch.empty(0), grid)
        return tables.for_batch(model, sides.VIDEO, given, rates, device, cross=False)[0]

    assert table((25.0, 25.0)).data_ptr() == table((25.0, 25.0)).data_ptr()
    mixed = table(RATES)
    assert torch.equal(mixed[0], table((25.0,))[0])
    assert torch.equal(mixed[1], table((24.0,))[0])
    assert not torch.equal(mixed[0], mixed[1])
    for frames in range(1, 6):
        table((25.0,), (frames, 2, 2))
    assert [len(kept) for kept in tables._tables.values()] == [2]
    tables.spare = 14 * 2 * table((25.0,), (1, 2, 2)).nbytes
    for frames in range(1, 6):
        table((25.0,), (frames, 2, 2))
    assert [len(kept) for kept in tables._tables.values()] == [4], "those of 5, 4, 3 and 2 frames are as much as 14"


def test_gradients_reach_the_weights_through_all_parts() -> None:
    model = transformer("2.0", layers=1).requires_grad_(True)
    prediction = predict(model, *batch_and_noise(model, APART))
    sum(values.square().mean() for values in prediction.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_call_block_is_one_graph() -> None:
    """No data-dependent branch: the block exports as a single graph. (The eager back end compiles nothing.)"""
    model = transformer("2.3", layers=1)
    compiled = torch.compile(call_block, fullgraph=True, backend="eager")
    with torch.no_grad():
        state = forward.enter(model, *batch_and_noise(model, APART, conditioned=CONDITIONED), forward.RotaryTables())
        block = sides.transformer_blocks(model)[0]
        got, expected = compiled(block, state), call_block(block, state)
    torch.testing.assert_close(got.streams["audio"].hidden, expected.streams["audio"].hidden)
