"""The sampling options of a run: greedy, or the checkpoint's own, with single changes."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import ef_jax
from ef_jax.cli.options import number, whole_number
from ef_jax.errors import InputError

_NAMES = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "ignore_eos")
_FROM_CHECKPOINT = ("temperature", "top_k", "top_p", "repetition_penalty")
_NOT_IMPLEMENTED = {
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": None,
    "min_length": 0,
    "min_new_tokens": None,
    "min_p": None,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "top_h": None,
    "typical_p": 1.0,
}
"""Other fields of generation_config.json that change what is generated, and the value that switches each off."""


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen and when a text ends."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-new-tokens", type=whole_number(1), metavar="N", help="tokens to generate at most (default: 128)"
    )
    group.add_argument("--temperature", type=number, metavar="X", help="0 is greedy (default: 0)")
    group.add_argument("--top-k", type=whole_number(0), metavar="N", help="keep the N likeliest tokens; 0 keeps all")
    group.add_argument("--top-p", type=number, metavar="X", help="keep the likeliest tokens of this total probability")
    group.add_argument(
        "--repetition-penalty", type=number, metavar="X", help="above 1 makes tokens that were there less likely"
    )
    group.add_argument("--seed", type=whole_number(0), metavar="N", help="of the random draws (default: 0)")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on after an end-of-text token")
    group.add_argument(
        "--checkpoint-sampling",
        action="store_true",
        help="temperature, top-k, top-p and penalty of the checkpoint's generation_config.json instead of greedy; "
        "the options above still take precedence",
    )


def sampling_options(options: argparse.Namespace, generation_config: Mapping[str, Any]) -> "ef_jax.SamplingOptions":
    """The sampling options that the command line asks for, with the checkpoint's where it asks for them.

    Raises:
      InputError: a value is out of range, or the checkpoint asks for sampling that is not implemented.
    """
    sampling = ef_jax.SamplingOptions()
    if options.checkpoint_sampling:
        sampling = dataclasses.replace(sampling, **from_generation_config(generation_config))
    given = {name: getattr(options, name) for name in _NAMES if getattr(options, name) is not None}
    return dataclasses.replace(sampling, **given, stop=tuple(options.stop))


def from_generation_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `SamplingOptions` fields that a generation_config.json sets; greedy where it does not sample.

    Raises:
      InputError: it sets a field that changes the text and is not implemented.
    """
    for name, off in _NOT_IMPLEMENTED.items():
        if fields.get(name) not in (None, off):
            raise InputError(
                f"generation_config.json sets {name}={fields[name]!r:.60}, which is not implemented: leave "
                "--checkpoint-sampling out and give the options that you want"
            )
    chosen = {name: fields[name] for name in _FROM_CHECKPOINT if fields.get(name) is not None}
    if fields.get("do_sample"):
        return {"temperature": 1.0, **chosen}
    return {name: value for name, value in chosen.items() if name == "repetition_penalty"}
