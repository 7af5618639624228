"""Who made a cache, by its fingerprint: for the command that makes another one like it."""

from collections.abc import Mapping
from typing import Any

from feats.encoders.registry import ENCODERS


def encoder_and_options(fingerprint: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The encoder of a cache, and those of its own options that aren't the defaults, named as the settings that
    its command line takes; None for a foreign one."""
    name = fingerprint.get("encoder", "")
    if name not in ENCODERS:
        return None
    options = {}
    for key, option in ENCODERS[name].options.items():
        if fingerprint.get(key, option.default) != option.default:
            options[(option.flag or key).replace("-", "_")] = fingerprint[key]
    return name, options
