"""Detection: the arguments that a real file leads to are those of the released model, at full size."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import pytest

from ltxvideo2.ltx2_published import RELEASES, headers, metadata, modules
from tuner.errors import CheckpointError
from tuner.interfaces.family import Variant
from tuner.interfaces.services import TensorHeader
from tuner_ltxvideo2 import tiny as tiny_module
from tuner_ltxvideo2.loading import part_class
from tuner_ltxvideo2.variants import FLAVOURS, detect, sampling_defaults


def settings(part: str, arguments: Mapping[str, object]) -> dict[str, object]:
    """What a module is built with: `arguments` over its class's defaults, tuples as lists."""
    signature = inspect.signature(part_class(part, arguments).__init__)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items() if name != "self"}
    assert set(arguments) <= set(defaults)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in {**defaults, **arguments}.items()}


@pytest.mark.parametrize("release", ["2.0", "2.3", "2.5"])
def test_real_files_lead_to_the_released_arguments(release: str) -> None:
    variant = detect(metadata(release), headers(release))
    assert variant.name == release
    for part, arguments in RELEASES[release].items():
        assert settings(part, variant.config[part]) == settings(part, arguments), part


def test_the_released_transformer_has_its_known_size() -> None:
    assert sum(p.numel() for p in modules("2.0")["transformer"].parameters()) == pytest.approx(18.876e9, abs=0.5e6)


@pytest.mark.parametrize("release", ["2.0", "2.3", "2.5"])
def test_a_file_without_metadata_is_known_by_its_shapes(release: str) -> None:
    variant = detect({}, headers(release))
    assert variant.name == release
    for part, arguments in RELEASES[release].items():
        assert settings(part, variant.config[part]) == settings(part, arguments), part


def test_an_absent_cross_modal_multiplier_means_one() -> None:
    said = metadata("2.0")
    table = dict(said["transformer"])  # type: ignore[call-overload]
    del table["av_ca_timestep_scale_multiplier"]
    variant = detect(said | {"transformer": table}, headers("2.0"))
    assert variant.config["transformer"]["cross_attn_timestep_scale_multiplier"] == 1


def test_interleaved_rotation_is_taken_from_the_file() -> None:
    said = metadata("2.0")
    table = dict(said["transformer"]) | {"rope_type": "interleaved", "frequencies_precision": "float32"}  # type: ignore[call-overload]
    arguments = detect(said | {"transformer": table}, headers("2.0")).config["transformer"]
    assert (arguments["rope_type"], arguments["rope_double_precision"]) == ("interleaved", False)


def test_the_published_file_of_2_5_has_its_known_size() -> None:
    """Its header counts 4,349 tensors and 21,004,025,600 parameters: transformer and connectors without their projections."""
    parts = modules("2.5")
    connectors = {name: tensor for name, tensor in parts["connectors"].state_dict().items() if "text_proj_in" not in name}
    tensors = [*parts["transformer"].state_dict().values(), *connectors.values()]
    assert (len(tensors), sum(tensor.numel() for tensor in tensors)) == (4349, 21_004_025_600)
    assert len(parts["vae"].state_dict()) == 170  # of ltx-2.5-video-vae-conv-bf16


@pytest.mark.parametrize(
    "change", [{"model_version": "2.5.0"}, {"transformer": {"ff_bias": False}}, {"transformer": {"use_keyframes_abs_pos_embedding": True}}]
)
def test_2_5_is_known_by_its_own_word(change: Mapping[str, object]) -> None:
    said = metadata("2.3")
    table = dict(said["transformer"]) | dict(change.get("transformer", {}))  # type: ignore[call-overload]
    assert detect(said | change | {"transformer": table}, headers("2.5")).name == "2.5"


def test_a_word_that_the_keys_belie_changes_no_argument() -> None:
    arguments = detect(metadata("2.5"), headers("2.3")).config["transformer"]
    assert (arguments["ff_bias"], arguments["use_keyframes_abs_pos_embedding"]) == (True, False)


def test_unknown_sizes_without_metadata_are_an_error() -> None:
    found = headers("2.0")
    found["transformer"] |= {"proj_in.weight": TensorHeader((64, 128), "BF16")}
    with pytest.raises(CheckpointError, match="heads are unknown"):
        detect({}, found)


def test_no_transformer_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="no transformer"):
        detect({}, {"vae": headers("2.0")["vae"]})


def test_shortcuts_of_the_video_decoder_come_from_its_block_list() -> None:
    listed: list[object] = [["res_x", {"num_layers": 5}]]
    for residual in (True, False, True):
        listed += [["compress_all", {"residual": residual, "multiplier": 2}], ["res_x", {"num_layers": 5}]]
    said = metadata("2.0")
    vae = dict(said["vae"]) | {"decoder_blocks": listed}  # type: ignore[call-overload]
    assert detect(said | {"vae": vae}, headers("2.0")).config["vae"]["upsample_residual"] == (True, False, True)


def test_the_tiny_file_leads_to_what_it_was_built_of(tiny_variant: Variant) -> None:
    made = Variant("ltxvideo2", tiny_variant.name, tiny_module._arguments(tiny_variant.name))
    for part in made.config:
        expected = settings(part, made.config[part])
        unused = {"video_hidden_dim", "audio_hidden_dim"} if tiny_variant.name == "2.0" else set()
        found = settings(part, tiny_variant.config[part])
        assert {k: v for k, v in found.items() if k not in unused} == {k: v for k, v in expected.items() if k not in unused}, part


def test_every_flavour_of_the_quickstart_is_there() -> None:
    assert {"dev", "dev-fp8", "dev-fp4", "2.3-dev", "2.3-distilled", "2.5-dev", "2.5-distilled"} <= set(FLAVOURS)
    assert {name for name, flavour in FLAVOURS.items() if flavour.distilled} == {
        "distilled", "distilled-fp8", "2.3-distilled", "2.5-distilled"
    }  # fmt: skip


def test_distilled_models_sample_in_few_steps_without_guidance() -> None:
    assert sampling_defaults(True) == {"validation_num_inference_steps": 8, "validation_guidance": 1.0}
    assert sampling_defaults(False) == {}
