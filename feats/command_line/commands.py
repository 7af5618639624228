"""Commands as one types them: what helps where weights can't be had."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from feats.command_line.wording import as_texts, as_typed
from feats.errors import NoWeightsError
from feats.escapes import one_line

# Options that another encoder takes over.
OF_THE_DATA = ("data", "layout", "columns", "splits", "limit", "stream", "out")


def no_weights_lines(
    error: NoWeightsError, script: str, given: Mapping[str, Any], others: Sequence[tuple[str, str]] = ()
) -> list[str]:
    """A line for each place tried, then commands that help: `others`, each with what it is, and the remedies, as what
    was typed, `script` with the options `given`, and what they change of it."""
    commands = list(others)
    for remedy_ in error.remedies:
        if not remedy_.settings and not remedy_.environment:
            continue
        changed = dict(given)
        for setting, value in remedy_.settings.items():
            key = setting.replace("_", "-")
            changed[key] = [*given[key], value] if isinstance(given.get(key), list) else value
        words = [f"{key}={value}" for key, value in remedy_.environment.items()]
        commands.append((as_typed(remedy_.what), " ".join([*words, typed_command(script, changed)])))
    return [
        f"error: no weights for {one_line(error.what)}; tried:",
        *(f"  {one_line(place)}" for place in error.tried),
        "any of these commands helps:",
        *(line for what, command in commands for line in (f"  # {what}", f"  {command}")),
    ]


def typed_command(script: str, options: Mapping[str, Any]) -> str:
    """What one types to run a script, `options` by their names as in `ScriptParser`'s `given`."""
    words = []
    for key, value in options.items():
        if value is not False:
            words += [f"--{key}", *([] if value is True else as_texts(value))]
    return shlex.join(["python", script, *words])


def offline_commands(name: str, given: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What encodes the sides of encoder `name` without a hub, the nearest first, and the commands, with the options
    `given` to that one."""
    from feats.encoders.registry import ENCODERS, OFFLINE

    same = {key: value for key, value in given.items() if key in OF_THE_DATA}
    return [
        (f"offline, {side}: {other}", extraction_command(other, same))
        for side in ENCODERS[name].sides
        for other in OFFLINE[side]
    ]


def extraction_command(name: str, options: Mapping[str, Any]) -> str:
    """What one types to extract with encoder `name`; see `typed_command`."""
    return typed_command(extraction_script(name), options)


def extraction_script(name: str) -> str:
    """The script of an encoder."""
    return f"feats/{name}_extract_feats.py"
