"""Keys of other tools' dataset files that have no effect here: a notice where they cannot change what is trained, else an error.

Each line gives the reason. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping

LATER = "not supported in this version"

_FOUND_ANEW = "files are found anew at each start and measured once, so there is nothing to configure"
_NAMED = "records are named by content and settings, so none is stale and none needs clearing"
_KEPT = "no file of a dataset is ever changed or deleted"
_SCALED = "pictures of every size are scaled to their bucket before they are cut"
_BATCHES = "captions are encoded and written one batch at a time"

WITHOUT_EFFECT: Mapping[str, str] = {
    "metadata_backend": _FOUND_ANEW, "metadata_update_interval": _FOUND_ANEW, "skip_file_discovery": _FOUND_ANEW,
    "cache_file_suffix": _NAMED, "hash_filenames": _NAMED, "preserve_data_backend_cache": _NAMED, "vae_cache_clear_each_epoch": _NAMED,
    "compress_cache": "records are kept as safetensors",
    "delete_unwanted_images": _KEPT, "delete_problematic_images": _KEPT, "delete_nsfw_images": _KEPT,
    "maximum_image_size": _SCALED, "target_downsample_size": _SCALED,
    "write_batch_size": _BATCHES, "text_encoder_batch_size": _BATCHES,
    "text_cache_ondemand": "captions are encoded before training", "vae_cache_ondemand": "files are encoded before training",
    "vae_batch_size": "the run's vae_batch_size counts for all entries",
    "description": "it is a remark", "notes": "it is a remark",
}  # fmt: skip
"""Key -> why it changes nothing."""

BY_KIND: Mapping[str, Mapping[str, str]] = {
    "audio": dict.fromkeys(
        ("resolution", "resolution_type", "minimum_image_size", "crop", "crop_style", "crop_aspect"), "sound has no picture"
    ),
    "conditioning": {
        **dict.fromkeys(
            ("caption_strategy", "instance_prompt", "prepend_instance_prompt"), "a file that belongs to another has that one's caption"
        ),
        **dict.fromkeys(("repeats", "probability"), "it comes as often as the files that it belongs to"),
        **dict.fromkeys(
            ("resolution", "resolution_type", "crop", "crop_style", "crop_aspect", "minimum_image_size", "video"),
            "it is brought to the size and length of the file that it belongs to",
        ),
    },
    "eval": dict.fromkeys(("repeats", "probability"), "held-out files are not trained"),
}
"""dataset_type -> key -> why it changes nothing there."""

UNSUPPORTED: Mapping[str, tuple[str, tuple[object, ...]]] = {
    "only_instance_prompt": ("write caption_strategy `instanceprompt` instead", (False,)),
    "disable_multiline_split": ("a caption file is always one caption", (True,)),
    "caption_filter_list": ("take the words out of the captions", ()),
    "caption_shuffle": ("captions are used as they are written", ()),
    "parquet": ("write captions as text files", ()),
    "crop_aspect_buckets": ("use crop_aspect `preserve` or `square`", ()),
    "max_upscale_threshold": ("use minimum_image_size", ()),
    "conditioning": ("make the reference or mask files, and name them with an entry of dataset_type `conditioning`", ()),
    "conditioning_image_embeds": ("use an entry of dataset_type `conditioning`", ()),
    "max_num_samples": ("use `probability`, or a smaller folder", ()),
    "start_epoch": ("train twice, the second run from the first one's result", (1,)),
    "start_step": ("train twice, the second run from the first one's result", (0, 1)),
    "end_epoch": ("train twice, the second run from the first one's result", ()),
    "end_step": ("train twice, the second run from the first one's result", ()),
    "is_regularisation_data": ("leave the entry out", (False,)),
    "is_regularization_data": ("leave the entry out", (False,)),
    "slider_strength": ("leave it out", (0,)),
    "timestep_sampling_offset": ("choose sigma_sampler for the whole run", (0,)),
    "vae_cache_disable": ("records are always kept; choose cache_dir", (False,)),
    "text_cache_disable": ("records are always kept; choose cache_dir", (False,)),
}
"""Key -> (what to do instead, values that ask for nothing)."""


def sort_out(raw: Mapping[str, object], kind: str) -> tuple[dict[str, object], list[str], list[str]]:
    """The keys that count, notices, problems."""
    kept, notes, problems = dict(raw), [], []
    without_effect = {**WITHOUT_EFFECT, **BY_KIND.get(kind, {})}
    for key in raw:
        if key in without_effect:
            notes.append(f"{key} has no effect: {without_effect[key]}")
            del kept[key]
        elif key in UNSUPPORTED:
            remedy, harmless = UNSUPPORTED[key]
            if not _is_one_of(raw[key], harmless):
                problems.append(f"{key}: is {LATER}; {remedy}")
            del kept[key]
    return kept, notes, problems


def _is_one_of(value: object, harmless: tuple[object, ...]) -> bool:
    """Numbers and booleans may be written as strings."""
    return str(value).lower() in {str(one).lower() for one in harmless} | ({"0.0"} if 0 in harmless else set())
