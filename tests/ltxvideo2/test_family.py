"""The family on the tiny checkpoint: inspecting, loading one or both streams, targets, a whole step, names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ltxvideo2.ltx2_flavour import FlavourWritten
from ltxvideo2.ltx2_models import batch_and_noise, normal, transformer
from ltxvideo2.ltx2_published import modules
from tuner.builtins.losses import FlowMatchingLoss
from tuner.component import Component
from tuner.config.settings import AdapterSettings, ModelSettings
from tuner.errors import ConfigError
from tuner.interfaces.blocks import BlockState
from tuner.interfaces.encoders import Record
from tuner.interfaces.family import Batch, BuildContext, ClipShape, Noise, Sample, StreamNoise
from tuner.interfaces.services import WeightSource
from tuner.model.adapters import add_adapters, resolve_targets
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.train.execute import PlainExecution
from tuner.train.masters import MasterWeights
from tuner.train.step import Item, TrainingModel
from tuner_ltxvideo2 import family as families
from tuner_ltxvideo2 import sides
from tuner_ltxvideo2.loading import CombinedFile
from tuner_ltxvideo2.options import LTX2Options

torch.set_num_threads(1)
CPU = torch.device("cpu")
BOTH = ("video", "audio")


def make_family(text_encoder: Path | None = None, dtype: torch.dtype = torch.float32, **options: object) -> families.LTX2Family:
    return families.LTX2Family(LTX2Options(**options), BuildContext(CPU, dtype, 3, 0, Path()), text_encoder)


def test_component_factory_is_this_class() -> None:
    component = Component("ltxvideo2", "", LTX2Options, "tuner_ltxvideo2.family:LTX2Family")
    assert component.load() is families.LTX2Family


@pytest.mark.parametrize("streams", [BOTH, ("video",), ("audio",)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inspect_tells_what_load_brings(source20: WeightSource, streams: tuple[str, ...], dtype: torch.dtype) -> None:
    family = make_family(dtype=dtype)
    facts = family.inspect(source20, streams)
    model = family.load(source20, streams, dtype, CPU)
    blocks = family.block_set(model)
    assert facts.variant.name == "2.0"
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert facts.blocks == len(blocks)
    assert facts.block_bytes == max(blocks.frozen_bytes(i) for i in range(len(blocks)))
    assert facts.adapter_targets == len(family.adapter_targets(model, streams))
    assert blocks.names[0] == "transformer_blocks.0"
    state = family.enter(model, *family.dummy_batch(model, ClipShape(64, 64, 9, 25.0, 0.36), 1, streams, CPU))
    assert blocks.widths == {name: stream.hidden.shape[-1] for name, stream in state.streams.items()} and set(blocks.widths) == set(streams)
    assert not [name for name, p in model.named_parameters() if p.is_meta], "nothing is left without weights"
    assert not [name for name, p in model.named_parameters() if p.dtype != dtype]


def test_locate_finds_the_tiny_model_and_its_text_encoder(flavour_written: FlavourWritten) -> None:
    family = make_family()
    located = family.locate(ModelSettings(model_flavour="tiny"), flavour_written.cache)
    assert located.weights == flavour_written.paths.checkpoint
    assert located.weights.is_file()
    assert str(flavour_written.cache) not in located.description
    opened = CombinedFile().open(located.weights, located.description)
    assert [encoder.name for encoder in family.encoders(opened, BOTH)] == ["text", "video", "audio"]
    assert [encoder.name for encoder in family.encoders(opened, ("video",))] == ["text", "video"]
    companions = frozenset({"reference", "mask"})
    assert [(e.name, e.of) for e in family.encoders(opened, ("video",), companions)[2:]] == [("reference", "reference"), ("mask", "mask")]
    assert [encoder.name for encoder in family.encoders(opened, ("audio",), companions)] == ["text", "audio"]
    given = make_family(given_stream="video").encoders(opened, BOTH, companions)
    assert [encoder.name for encoder in given] == ["text", "video", "audio"], "a picture that is given needs no reference"


def test_options_choose_streams_and_weights() -> None:
    assert make_family().select_streams(frozenset(BOTH)) == BOTH
    assert make_family(train_audio=False).select_streams(frozenset(BOTH)) == ("video",)
    assert make_family().select_streams(frozenset({"video"})) == ("video",)
    assert make_family().select_streams(frozenset({"audio"})) == ("audio",)
    assert make_family(audio_loss_weight=0.5).stream_weights() == {"audio": 0.5}
    assert make_family(prefix_conditioning_probability=0.5, prefix_conditioning_frames=20).notices() != []
    assert families.LTX2Family.token_shift.mu(4096) == pytest.approx(2.05)


def test_a_given_stream_is_loaded_and_has_no_loss() -> None:
    for given, learned in (("audio", "video"), ("video", "audio")):
        family = make_family(given_stream=given)
        assert family.select_streams(frozenset(BOTH)) == BOTH
        assert family.learned_streams(BOTH) == (learned,)
    assert make_family().learned_streams(BOTH) == BOTH


@pytest.mark.parametrize(
    ("options", "available", "match"),
    [
        ({"given_stream": "audio", "train_audio": False}, BOTH, "given_stream: there is nothing to give: train_audio is off"),
        ({"given_stream": "audio"}, ("video",), "given_stream: there is nothing to give: no item of the dataset has audio"),
        ({"given_stream": "audio"}, ("audio",), "given_stream: the dataset has audio alone"),
        ({"train_audio": False}, ("audio",), "train_audio: the dataset has audio alone"),
    ],
)
def test_streams_that_leave_nothing_to_learn_or_to_give(options: dict[str, object], available: tuple[str, ...], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make_family(**options).select_streams(frozenset(available))


# --- targets -----------------------------------------------------------------------------------------------------
def test_default_targets_at_real_size() -> None:
    family, model = make_family(), modules("2.0")["transformer"]
    targets = family.adapter_targets(model, BOTH)
    attention = [name for name in targets if name.endswith(families.ATTENTION_TARGETS)]
    assert len(attention) == 1152  # 48 blocks · 6 attentions · 4
    assert len(targets) == 1252  # + 48 · 2 of audio_ff, 2 audio projections, 2 of the audio caption
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in targets)
    assert len(set(targets)) == len(targets)
    newer = transformer("2.3", layers=2)
    assert len(family.adapter_targets(newer, BOTH)) == 2 * 26 + 2  # no caption projection, so 1,250 with 48 blocks


def test_one_stream_targets_no_module_of_the_other_nor_between() -> None:
    family, model = make_family(), transformer("2.0", layers=2)
    video, audio = (family.adapter_targets(model, (name,)) for name in BOTH)
    assert len(video) == 2 * 2 * 4
    assert not [name for name in video if "audio" in name]
    assert len(audio) == 2 * (2 * 4 + 2) + 4
    assert not [name for name in audio if ".audio_attn" not in name and ".audio_ff" not in name and not name.startswith("audio_")]


@pytest.mark.parametrize(("given", "into", "count"), [("audio", "audio_to_video_attn", 3 * 4), ("video", "video_to_audio_attn", 3 * 4 + 2)])
def test_a_given_stream_keeps_its_own_path(given: str, into: str, count: int) -> None:
    """Only the learned stream's modules and the attention that reads the given stream into it are adapted."""
    family, model = make_family(given_stream=given), transformer("2.0", layers=2)
    targets = family.adapter_targets(model, BOTH)
    alone = make_family().adapter_targets(model, family.learned_streams(BOTH))
    assert len([name for name in targets if name.startswith("transformer_blocks.")]) == 2 * count
    assert set(targets) - set(alone) == {f"transformer_blocks.{i}.{into}.{p}" for i in (0, 1) for p in ("to_q", "to_k", "to_v", "to_out.0")}
    assert set(alone) < set(targets)


def test_names_go_both_ways() -> None:
    family = make_family()
    for name in ("transformer_blocks.3.audio_to_video_attn.to_out.0", "audio_proj_in", "time_embed.linear", "scale_shift_table"):
        assert family.module_name(family.original_name(name)) == name
    assert family.original_name("audio_proj_in") == "audio_patchify_proj"


# --- a whole step ------------------------------------------------------------------------------------------------
def noised(batch: Batch, sigma: float = 0.6) -> Noise:
    streams = {}
    for index, (name, stream) in enumerate(batch.streams.items()):
        eps = normal(*stream.latents.shape, seed=index)
        level = torch.full((len(batch.samples),), sigma)
        streams[name] = StreamNoise(level, (1 - sigma) * stream.latents + sigma * eps, eps - stream.latents, eps)
    return Noise(streams)


@pytest.mark.parametrize("streams", [BOTH, ("video",), ("audio",)])
def test_cached_records_become_a_prediction(source20: WeightSource, streams: tuple[str, ...]) -> None:
    family = make_family(i2v_conditioning_probability=1.0)
    width = family.inspect(source20, BOTH).variant.config["transformer"]["caption_channels"]
    assert isinstance(width, int)
    records = {
        "video": Record({"latents": normal(128, 2, 2, 3, seed=1)}),
        "audio": Record({"latents": normal(9, 128, seed=2), "mask": torch.ones(9)}),
        "text": Record({name: normal(64, width, seed=3) for name in BOTH}),
    }
    sample = Sample(key="c", dataset="d", draw=0, epoch=0, frame_rate=25.0, frames=9, height=64, width=96, records=records)
    batch = family.collate([sample, dataclasses.replace(sample, draw=1, frame_rate=24.0)], streams)
    model = family.load(source20, streams, torch.float32, CPU)
    with torch.no_grad():
        state = family.enter(model, batch, noised(batch))
        if "video" in streams:
            protected = state.streams["video"].protected
            assert protected is not None and protected[:, :6].all() and not protected[:, 6:].any()
        for block in family.block_set(model).blocks:
            state = family.call_block(block, state)
        prediction = family.exit(model, state).streams
    assert tuple(prediction) == streams
    for name, values in prediction.items():
        assert values.shape == batch.streams[name].latents.shape
        assert values.isfinite().all()


@pytest.mark.parametrize(("targets", "taught"), [("", "video"), ("audio_ff.net.2", "")])
def test_a_silent_batch_teaches_the_pictures_modules_alone(source20: WeightSource, targets: str, taught: str) -> None:
    """Of a model that is trained on both; where nothing but the sound's modules is trained it teaches nothing, and nothing fails."""
    family = make_family()
    model = family.load(source20, BOTH, torch.float32, CPU)
    add_adapters(model, resolve_targets(model, targets, family.adapter_targets(model, BOTH)), AdapterSettings(lora_rank=2), seed=0)
    batch, noise = batch_and_noise(model, {"video": (0.7, 0.4)})
    training = TrainingModel(
        family, model, BlockRunner(family.block_set(model), family.call_block), [FlowMatchingLoss(name) for name in BOTH]
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masters = MasterWeights(trained, low_precision=False)
    video, audio = PlainExecution(training, masters)([Item(batch, noise)], 0, 1.0)[0].terms
    assert video.reduced().item() > 0 == audio.reduced().item()
    assert audio.counted is not None and audio.counted.tolist() == [False, False]
    reached = {sides.streams_of(name) for name, parameter in trained.items() if parameter.grad is not None}
    assert reached == ({frozenset({taught})} if taught else set())
    assert (float(masters.clip_(1.0)) > 0) == bool(taught)


@pytest.mark.parametrize("streams", [BOTH, ("video",)])
def test_recomputing_runner_gives_the_gradients_of_the_plain_loop(source20: WeightSource, streams: tuple[str, ...]) -> None:
    """LoRA on every default target, a missing sound and a conditioned frame, all blocks recomputed in backward."""
    family = make_family()
    model = family.load(source20, streams, torch.float32, CPU)
    add_adapters(model, family.adapter_targets(model, streams), AdapterSettings(lora_rank=2), seed=0)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            parameter.data = normal(*parameter.shape, seed=index) * 0.1  # zero at the start, which would hide A's gradient
    conditioned = torch.arange(24).expand(2, 24) < 8
    given = batch_and_noise(
        model, {name: (0.7, 0.4) for name in streams}, conditioned=conditioned, present=torch.tensor([True, False])
    )

    def gradients(run: Callable[[BlockState], BlockState]) -> list[torch.Tensor]:
        model.zero_grad()
        prediction = family.exit(model, run(family.enter(model, *given))).streams
        torch.stack([values.square().mean() for values in prediction.values()]).sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]

    def plain(state: BlockState) -> BlockState:
        for block in blocks.blocks:
            state = family.call_block(block, state)
        return state

    blocks = family.block_set(model)
    runner = BlockRunner(blocks, family.call_block, checkpointing=Checkpointing.every(len(blocks)))
    expected, captured = gradients(plain), gradients(runner.run)
    assert len(captured) == len(expected) > 0
    for got, wanted in zip(captured, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-7, rtol=1e-5)


def test_tables_are_reused_from_step_to_step() -> None:
    family, model = make_family(), transformer()
    given = batch_and_noise(model, {"video": (0.5, 0.5)}, rates=(25.0, 25.0))

    def cosine(state: BlockState) -> int:
        return state.streams["video"].aligned["rope_cos"].tensor.data_ptr()

    assert cosine(family.enter(model, *given)) == cosine(family.enter(model, *given))
