"""The parser of every script."""

import re
import sys
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from feats.command_line.exit_status import EXIT_UNUSABLE
from feats.command_line.wording import as_texts, error_line
from feats.config_file import as_plain, made_by, read_options, toml_lines
from feats.errors import UsageError
from feats.escapes import printable
from feats.terminal import Asked, ask, version_line, written_out

ABOUT_THE_FILE = ("help", "config", "show-config", "version")  # options that no file holds
NOT_KEPT = (*ABOUT_THE_FILE, "quiet", "log-file")  # and those that no run records


class HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Shows defaults, but neither None and False nor those that the text tells already."""

    def _get_help_string(self, action: Action) -> str | None:
        if action.default in (None, False, SUPPRESS, []) or "(default" in (action.help or ""):
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class ScriptParser(ArgumentParser):
    """The parser of every script: shows defaults, accepts no abbreviations, and takes options from a file, too.

    With --config FILE (see `feats.config_file`) its options stand before the typed ones, which win. The namespace
    also has `given`, all options that were typed or in the file, as JSON values: what a run keeps.
    """

    def __init__(self, description: str | None = None, epilog: str | None = None, examples: Sequence[str] = ()):
        super().__init__(description=description, epilog=epilog, formatter_class=HelpFormatter, allow_abbrev=False)
        self.examples = examples
        self.file: Path | None = None
        self.fillers: list[Callable[[Namespace], Mapping[str, Any]]] = []
        group = self.add_argument_group("messages")
        group.add_argument("--quiet", action="store_true", help="show results and errors only")
        group.add_argument("--log-file", type=Path, metavar="FILE", help="also append what is shown to it, with times")
        group.add_argument("--version", action=_ShowVersion, nargs=0, help="print versions, and end")
        group = self.add_argument_group("options from a file")
        group.add_argument(
            "--config", type=Path, metavar="FILE", help="a TOML file of options, or a run's config.json; typed ones win"
        )
        group.add_argument(
            "--show-config", action="store_true", help="print all options with their values as such a file, and end"
        )

    def format_help(self) -> str:
        """As any parser's, with the examples, each a line as one types it, at its end."""
        return "\n".join([super().format_help(), "examples:", *(f"  {example}" for example in self.examples), ""])

    def fill_in(self, filler: Callable[[Namespace], Mapping[str, Any]]) -> None:
        """For --show-config: what options that weren't given come to, by the namespace's names."""
        self.fillers.append(filler)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As any parser's. One line and exit status 2 for what a file holds and can't, and for what can't be shown."""
        typed = list(sys.argv[1:] if args is None else args)
        finder = ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", nargs="?", type=Path)
        self.file = finder.parse_known_args(typed)[0].config
        try:
            words = self._with_file(typed)
            found = super().parse_args(words, namespace)
            found.given = self._given(words)
            self._refuse_two_names(typed)
            ask(Asked(found.quiet, found.log_file))
            if found.show_config:
                self.end_with("\n".join(self._config_lines(found)))
        except (UsageError, BrokenPipeError) as error:
            self.exit(EXIT_UNUSABLE, f"{error_line(error)}\n")
        return found

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """As any parser's. The message is escaped: what was typed wrong may be anything. Help isn't: Pythons from 3.14
        on colour it."""
        super().exit(status, message and printable(message))

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is not sys.stdout:
            super()._print_message(message, file)
            return
        with written_out():
            print(message, end="", flush=True)

    def end_with(self, text: str) -> NoReturn:
        """Print the text alone, and end. Raises as `written_out`."""
        self._print_message(f"{text}\n", sys.stdout)
        self.exit()

    def error(self, message: str) -> NoReturn:
        """One line, without the usage, which takes up to 30; it names a known option that is written much like it."""
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        known = [name for action in self._actions for name in action.option_strings]
        close = get_close_matches(unknown[1], known, 1, 0.7) if unknown else []
        hint = f"; did you mean {close[0]}?" if close else ";"
        whose = f" (options of {self.file}, and typed ones)" if self.file else ""
        self.exit(EXIT_UNUSABLE, f"error: {message}{whose}{hint} {self.prog} --help lists the options\n")

    def _refuse_two_names(self, typed: Sequence[str]) -> None:
        """Raise `UsageError` for an option that is typed by two of its names with different values."""
        finder = ArgumentParser(add_help=False, allow_abbrev=False, argument_default=SUPPRESS)
        several = [action for action in self._actions if len(_long(action)) > 1 and action.nargs != 0]
        for action in several:
            for name in _long(action):
                finder.add_argument(name, dest=name, nargs=action.nargs, type=action.type or str)
        found = vars(finder.parse_known_args(typed)[0])
        for action in several:
            named = {name: found[name] for name in _long(action) if name in found}
            if any(value != next(iter(named.values())) for value in named.values()):
                raise UsageError(f"{' and '.join(named)} are one option, given two values; give one of them")

    def _with_file(self, typed: list[str]) -> list[str]:
        """The words of the file's options, then the typed ones."""
        if self.file is None:
            return typed
        known = {
            name.lstrip("-").replace("_", "-"): action
            for action in self._actions
            for name in action.option_strings or [action.dest]
        }
        words = []
        for key, value in read_options(self.file).items():
            name = key.replace("_", "-")
            action = known.get(name)
            if action is None or name in ABOUT_THE_FILE:
                close = get_close_matches(name, [k for k in known if k not in ABOUT_THE_FILE], 1)
                by = made_by(self.file)
                raise UsageError(
                    f"{self.file}: {key} is no option of {self.prog}"
                    f"{f'; did you mean {close[0]}?' if close else ''}"
                    f"{f' (the run was made by {by})' if by and Path(by).name != self.prog else ''}"
                )
            if action.option_strings:
                words += self._words(action, key, value)
            else:
                self._stand_in(action, key, value)
        # Between both this one: the last list of the file mustn't take in what is typed first.
        return [*words, f"--config={self.file}", *typed]

    def _stand_in(self, action: Action, key: str, value: Any) -> None:
        """A positional one of the file: typed ones take its place."""
        values = [self._get_value(action, text) for text in as_texts(value)]
        if action.nargs == "?" and len(values) != 1:
            raise UsageError(f"{self.file}: {key} has {len(values)} values; expected one")
        action.default = values[0] if action.nargs == "?" else values
        action.nargs, action.required = "?" if action.nargs == "?" else "*", False

    def _words(self, action: Action, key: str, value: Any) -> list[str]:
        option = f"--{_name(action)}"
        if (action.nargs == 0) != isinstance(value, bool):
            expected = "true or false" if action.nargs == 0 else "a value, not true or false"
            raise UsageError(f"{self.file}: {key} = {as_plain(value)}: expected {expected}")
        if isinstance(value, bool):
            return [option] if value else []
        texts = as_texts(value)
        if action.nargs is None and len(texts) != 1:
            raise UsageError(f"{self.file}: {key} has {len(texts)} values; {option} takes one")
        return [f"{option}={texts[0]}"] if len(texts) == 1 else [option, *texts]

    def _given(self, words: Sequence[str]) -> dict[str, Any]:
        """Options and values that are no defaults, by name."""
        before = {action: action.default for action in self._actions}
        try:
            for action in self._actions:
                if action.option_strings:
                    action.default = SUPPRESS
            found = vars(super().parse_args(words))
        finally:
            for action, default in before.items():
                action.default = default
        # A positional one has no mark of being left out but that it holds nothing.
        named = [a for a in self._actions if a.dest in found and (a.option_strings or found[a.dest])]
        return {_name(action): as_plain(found[action.dest]) for action in named if _name(action) not in NOT_KEPT}

    def _config_lines(self, found: Namespace) -> list[str]:
        values = dict(vars(found))
        for filler in self.fillers:
            values |= {name: value for name, value in filler(found).items() if values.get(name) is None}
        groups = []
        for group in self._action_groups:
            actions = [a for a in group._group_actions if _name(a) not in ABOUT_THE_FILE]
            if actions:
                plain = {_name(a): _shown(a, values.get(a.dest)) for a in actions}
                about = {_name(a): _about(a) for a in actions}
                groups.append((group.title or "", plain, about))
        return toml_lines(groups)


def _name(action: Action) -> str:
    """An option as a file names it."""
    return (_long(action) or action.option_strings)[0].lstrip("-") if action.option_strings else action.dest


def _long(action: Action) -> list[str]:
    """An option's names but for those of one letter, the one that records hold first."""
    return [name for name in action.option_strings if name.startswith("--")]


class _ShowVersion(Action):
    def __call__(self, parser: ArgumentParser, *given: Any) -> None:
        assert isinstance(parser, ScriptParser)  # whose option it is
        parser.end_with(version_line())


def _about(action: Action) -> str:
    return "of no use here" if action.help == SUPPRESS else (action.help or "").replace("%%", "%")


def _shown(action: Action, value: Any) -> Any:
    """An option's value as a file has it; None where it isn't set, also for a list that couldn't be typed empty."""
    if action.nargs == 0:
        return bool(value)
    plain = as_plain(value)
    if action.nargs in ("+", "*") and value is not None:
        plain = plain if isinstance(plain, list) else [plain]
    return None if value is None or (action.nargs == "+" and not plain) else plain
