"""The command lines of stage 1, and what those of stage 2 share with them: exit status, help, argument types, messages.

The only module of this stage that knows argparse, stderr and the progress bar. It imports nothing heavy before it needs
it, so that `--help` is quick.
"""

import math
import re
import shlex
import signal
import sys
import warnings
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from feats.config_file import as_plain, made_by, read_options, toml_lines
from feats.errors import NoWeightsError, UsageError
from feats.escapes import one_line, printable
from feats.extraction.settings import ExtractionSettings
from feats.extras import remedy
from feats.interrupts import interruptible
from feats.names import checked_name
from feats.terminal import Asked, ask, rows_progress, showing, version_line, written_out

if TYPE_CHECKING:
    from feats.extraction.job import Job
    from feats.extraction.shared import Share, Worker

EXIT_DONE, EXIT_UNUSABLE, EXIT_QUARANTINE, EXIT_INTERRUPTED = 0, 2, 3, 130


class HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Shows defaults, but neither None and False nor those that the text tells already."""

    def _get_help_string(self, action: Action) -> str | None:
        if action.default in (None, False, SUPPRESS, []) or "(default" in (action.help or ""):
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def data_place(text: str) -> Path | str:
    """An argument that is a path, or a URL, which stays a string."""
    from feats.reading.remote import is_url

    return text if is_url(text) else Path(text)


def add_columns_option(group: ArgumentParser | _ArgumentGroup) -> None:
    """Which columns of a table are ours; `columns_from` reads it."""
    group.add_argument(
        "--columns",
        nargs="+",
        default=[],
        dest="table_columns",  # an encoder has a setting of that name
        metavar="OURS=YOURS",
        help="which columns of a table are image, text, label, id and split, e.g. text=title label=category; "
        "label= for none (default: by usual names)",
    )


def columns_from(args: Namespace) -> dict[str, str]:
    """What was typed for `add_columns_option`. Raises `UsageError`."""
    from feats.reading.columns import parse_columns

    return parse_columns(args.table_columns)


def remark(text: object) -> str:
    """A library's remark as a line of stderr: a warning, or the note it calls itself."""
    line = one_line(str(text))
    return line if line.startswith("note: ") else f"warning: {line}"


def error_line(error: object, named: Mapping[str, str] = {}) -> str:
    """What can't be done as a line of stderr, in the words of a command line: see `as_typed`."""
    return f"error: {one_line(as_typed(error, named))}"


def positive(text: str) -> int:
    """An argument that is a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "positive integer"  # argparse shows it: "invalid positive integer value: '0'"


def amount(text: str) -> float:
    """An argument that is a finite number from 0 on."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


amount.__name__ = "amount"


def as_typed(message: object, named: Mapping[str, str] = {}) -> str:
    """A library's message in the words of a command line: settings, which it names in backquotes, become options.

    "give a larger `val_ratio`" -> "give a larger --val-ratio". `named` maps settings to options of other names.
    """
    return re.sub(r"`(\w+)`", lambda match: "--" + named.get(match[1], match[1]).replace("_", "-"), str(message))


def show_warning(named: Mapping[str, str] = {}) -> Callable[..., None]:
    """What to set `warnings.showwarning` to: this project's warnings are lines of stderr, others stay as they are."""
    usual = warnings.showwarning
    home = Path(__file__).parents[1]

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        if category is UserWarning and Path(filename).parent.is_relative_to(home):
            print(remark(as_typed(message, named)), file=sys.stderr)
        else:
            usual(message, category, filename, lineno, *rest)

    return show


# -- options from a file -----------------------------------------------------------------------------------------

ABOUT_THE_FILE = ("help", "config", "show-config", "version")  # options that no file holds
NOT_KEPT = (*ABOUT_THE_FILE, "quiet", "log-file")  # and those that no run records


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
        values = [self._get_value(action, text) for text in _texts(value)]
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
        texts = _texts(value)
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


def _texts(value: Any) -> list[str]:
    return [str(x) for x in (value if isinstance(value, list) else [value])]


def _shown(action: Action, value: Any) -> Any:
    """An option's value as a file has it; None where it isn't set, also for a list that couldn't be typed empty."""
    if action.nargs == 0:
        return bool(value)
    plain = as_plain(value)
    if action.nargs in ("+", "*") and value is not None:
        plain = plain if isinstance(plain, list) else [plain]
    return None if value is None or (action.nargs == "+" and not plain) else plain


# -- extraction --------------------------------------------------------------------------------------------------


def extraction_parser(name: str, description: str | None) -> ArgumentParser:
    """The arguments of the script that runs encoder `name`: the shared ones, then the encoder's own."""
    from feats.encoders.registry import ENCODERS
    from feats.records import LAYOUTS
    from feats.text import CLEAN_LEVELS

    spec = ENCODERS[name]
    defaults = ExtractionSettings()
    parser = ScriptParser(
        description,
        epilog="Exit status: 0 done; 2 unusable arguments or input; 3 done with rows in quarantine under --strict; "
        "130 interrupted (the cache is intact: run the same command to go on).",
        examples=(
            f"python feats/{name}_extract_feats.py --data data",
            f"python feats/{name}_extract_feats.py --data pairs.csv --splits test --out saved/feats",
        ),
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", type=data_place, default=Path("data"), metavar="DIR|FILE|URL", help="the image-text pairs"
    )
    data.add_argument("--layout", choices=tuple(LAYOUTS), help="how they lie on disk (default: detected)")
    add_columns_option(data)
    data.add_argument("--splits", nargs="+", metavar="SPLIT", help="only these splits (default: all there are)")
    data.add_argument("--limit", type=positive, metavar="N", help="only the first N rows of each split")
    data.add_argument(
        "--stream",
        action="store_true",
        help="read them piece by piece: a shard at a time, or some rows of a manifest (what a URL in --data implies)",
    )
    cache = parser.add_argument_group("cache")
    cache.add_argument("--out", type=Path, default=Path("saved/feats"), metavar="DIR", help="the folder of caches")
    cache.add_argument("--name", default=name, help="the cache's name: <name>_<split>.h5, --vtype/--ttype later")
    cache.add_argument("--overwrite", action="store_true", help="replace a cache that something else made")
    cache.add_argument("--strict", action="store_true", help="exit with status 3 when rows are in quarantine")
    encoder = parser.add_argument_group("encoder")
    shown = f"{spec.model_help} (default: {spec.default_model})" if spec.default_model else spec.model_help

    def if_of_use(useful: object, text: str) -> str:
        """Help of an option; an encoder that has no use for it refuses it, and shows none."""
        return text if useful else SUPPRESS

    encoder.add_argument("--model", help=if_of_use(spec.model_help, shown))
    encoder.add_argument(
        "--weights",
        metavar="PATH",
        help=if_of_use(spec.takes_weights, "a local file or folder, or a finetuned run (default: see the README)"),
    )
    encoder.add_argument(
        "--tokens", action="store_true", help=if_of_use(spec.tokens, "also cache token and patch level features")
    )
    level = f"cleaning level of texts (default: {spec.text_clean}, or a finetuned encoder's own)"
    encoder.add_argument("--text-clean", choices=CLEAN_LEVELS, help=if_of_use("text" in spec.sides, level))
    encoder.add_argument(
        "--views",
        type=positive,
        metavar="K",
        help=if_of_use("image" in spec.sides, "also cache K augmented views of each picture"),
    )
    encoder.add_argument(
        "--views-seed",
        type=int,
        default=defaults.views_seed,
        metavar="SEED",
        help=if_of_use("image" in spec.sides, "seed of the augmentation"),
    )
    for key, option in spec.options.items():
        encoder.add_argument(
            f"--{option.flag or key.replace('_', '-')}",
            dest=key,
            type=type(option.default),
            default=SUPPRESS,  # one that wasn't typed: a saved encoder has its own
            choices=option.choices or None,
            metavar=option.metavar,
            help=f"{option.help} (default: {option.default})",
        )
    compute = parser.add_argument_group("compute")
    compute.add_argument(
        "--batch-size",
        type=positive,
        metavar="B",
        help="(default: 256 on a GPU; on a CPU 64, or 16 for convolutional nets)",
    )
    compute.add_argument(
        "--workers", type=int, metavar="W", help="decoding processes (default: one per core, 16 at most)"
    )
    compute.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    compute.add_argument(
        "--dtype",
        choices=("auto", "fp16", "bf16", "fp32"),
        default="auto",
        help=f"auto: {spec.auto_dtype or 'fp16 on a GPU, bf16 on a CPU that multiplies it in hardware, else fp32'}",
    )
    shared = parser.add_argument_group("several processes (torchrun, SLURM; each runs the same command)")
    shared.add_argument(
        "--parts", action="store_true", help="work by parts even if alone: others may join by the same command"
    )
    shared.add_argument(
        "--piece-rows",
        type=positive,
        metavar="N",
        help="rows of a part, rounded up to whole blocks (default: 4 parts per process, 32768 rows at most)",
    )
    shared.add_argument(
        "--lease-seconds",
        type=positive,
        default=60,
        metavar="S",
        help="whose lease on a part isn't renewed for so long counts as dead",
    )
    ray = parser.add_argument_group("a Ray cluster (the extra ray)")
    ray.add_argument("--engine", choices=("ray",), help="have workers on a Ray cluster make the cache")
    ray.add_argument("--address", help="the cluster's (default: RAY_ADDRESS, else one on this machine)")
    ray.add_argument(
        "--ray-workers", type=positive, metavar="N", help="(default: as many as the cluster has room for now)"
    )
    ray.add_argument("--gpus-per-worker", type=amount, default=0.0, metavar="G", help="0.5: two share one")
    ray.add_argument(
        "--cpus-per-worker", type=amount, default=1.0, metavar="C", help="the thread of the encoder included"
    )
    shared.add_argument("--no-join", action="store_true", help="leave the parts as they are: merge_feats.py joins them")
    parser.fill_in(partial(_of_encoder, name))
    return parser


def _of_encoder(name: str, args: Namespace) -> dict[str, Any]:
    """An encoder's own settings, where none are given; one of `weights` may be a saved encoder, which has others."""
    from feats.encoders.registry import ENCODERS

    spec = ENCODERS[name]
    options = {key: option.default for key, option in spec.options.items()}
    return {} if args.weights else {"model": spec.default_model, "text_clean": spec.text_clean, **options}


def run(name: str, parser: ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Extract every asked split with encoder `name`; returns the exit status. All of a script's output is here."""
    args = parser.parse_args(argv)
    return guarded(lambda: _extracted(name, args), "the cache is intact, run the same command to go on")


@interruptible(signal.SIGINT, signal.SIGTERM)
def guarded(work: Callable[[], int], interrupted: str) -> int:
    """Run a script's work and show what libraries say. Unusable input, and a machine too small, end with one line and
    status 2, an interruption with `interrupted` and 130."""
    return with_messages(partial(_guarded, work, interrupted))


def with_messages(work: Callable[[], int]) -> int:
    """Run it while stdout and stderr show what the options of messages say."""
    try:
        with showing():
            return work()
    except (UsageError, BrokenPipeError) as error:  # of the log file, or stdout
        print(error_line(error), file=sys.stderr)
        return EXIT_UNUSABLE


def _guarded(work: Callable[[], int], interrupted: str) -> int:
    with warnings.catch_warnings():
        warnings.showwarning = show_warning()
        try:
            return work()
        except UsageError as error:
            print(error_line(error), file=sys.stderr)
            return EXIT_UNUSABLE
        except ModuleNotFoundError as error:
            return refuse_without_extra(error)
        except OSError as error:
            if error.filename is None:
                raise
            print(error_line(error), file=sys.stderr)  # a name that is too long, a folder of another's
            return EXIT_UNUSABLE
        except RuntimeError as error:
            said = _resources_spent(error)
            if said is None:
                raise
            print(f"error: {said} (what was done is kept)", file=sys.stderr)
            return EXIT_UNUSABLE
        except KeyboardInterrupt:
            print(f"interrupted: {interrupted}", file=sys.stderr)
            return EXIT_INTERRUPTED


def refuse_without_extra(error: ModuleNotFoundError) -> int:
    """Say which extra brings a module that isn't there, and give the exit status. Raises the error itself where none
    does: something else is wrong."""
    said = remedy(error)
    if said is None:
        raise error
    print(f"error: {said}", file=sys.stderr)
    return EXIT_UNUSABLE


def _extracted(name: str, args: Namespace) -> int:
    try:
        return _extract(name, args)
    except NoWeightsError as error:
        print("\n".join(no_weights_lines(error, name, args.given)), file=sys.stderr)
        return EXIT_UNUSABLE


OF_THE_DATA = ("data", "layout", "splits", "limit", "stream", "out")  # options that another encoder takes over


def no_weights_lines(error: NoWeightsError, name: str, given: Mapping[str, Any]) -> list[str]:
    """What to say where encoder `name` has no weights: a line for each place tried, then the remedies as commands with
    the user's own options, `given`; first the offline encoders of its sides, the nearest first."""
    from feats.encoders.registry import ENCODERS, OFFLINE

    same = {key: value for key, value in given.items() if key in OF_THE_DATA}
    commands = [
        (f"offline, {side}: {other}", extraction_command(other, same))
        for side in ENCODERS[name].sides
        for other in OFFLINE[side]
    ]
    for remedy_ in error.remedies:
        words = [f"{key}={value}" for key, value in remedy_.environment.items()]
        command = extraction_command(name, {**given, **remedy_.settings})
        commands.append((as_typed(remedy_.what), " ".join([*words, command])))
    return [
        f"error: no weights for {error.what}; tried:",
        *(f"  {place}" for place in error.tried),
        "any of these commands helps:",
        *(line for what, command in commands for line in (f"  # {what}", f"  {command}")),
    ]


def extraction_command(name: str, options: Mapping[str, Any]) -> str:
    """What one types to extract with encoder `name`, `options` by their names as in `ScriptParser`'s `given`."""
    words = []
    for key, value in options.items():
        if value is not False:
            words += [f"--{key}", *([] if value is True else _texts(value))]
    return shlex.join(["python", f"feats/{name}_extract_feats.py", *words])


def _extract(name: str, args: Namespace) -> int:
    from feats.extraction.shared import Worker

    worker = Worker.here()
    job = _job(name, args, worker)
    encoder = None if args.engine else job.load(worker)
    data = job.open(encoder)
    quarantined = 0
    for split in chosen_splits(data, args.splits):
        title = job.path(split).stem
        if worker.world > 1:
            title += f" ({worker.rank} of {worker.world})"
        with rows_bar(title) as progress:
            summary = (
                job.run(encoder, data[split], worker, progress)
                if encoder is not None
                else _on_ray(job, split, args, progress)
            )
        print(summary)
        quarantined += summary.quarantined
    return EXIT_QUARANTINE if args.strict and quarantined else EXIT_DONE


def _job(name: str, args: Namespace, worker: "Worker") -> "Job":
    from feats.encoders.registry import ENCODERS
    from feats.extraction.job import Job
    from feats.extraction.shared import time_in
    from feats.reading.shards import is_pattern

    for side, option in (("image", "views"), ("text", "text_clean")):
        if getattr(args, option) is not None and side not in ENCODERS[name].sides:
            raise UsageError(f"{name} encodes no {side}s; leave out `{option}`")
    options = {option: getattr(args, option) for option in ENCODERS[name].options if hasattr(args, option)}
    stream = args.stream or isinstance(args.data, str) or is_pattern(args.data)
    by_parts = bool(worker.world > 1 or args.parts or args.piece_rows or args.no_join or args.engine or stream)
    return Job(
        encoder={
            "name": name,
            "model": args.model,
            "weights": args.weights,
            "dtype": args.dtype,
            "tokens": args.tokens,
            **options,
        },
        data=args.data,
        folder=args.out,
        name=checked_name(args.name, "name"),
        layout=args.layout,
        columns=columns_from(args),
        limit=args.limit,
        stream=stream,
        device=args.device,
        settings=ExtractionSettings(
            batch_size=args.batch_size,
            workers=args.workers,
            text_clean=args.text_clean,
            views=args.views or 0,
            views_seed=args.views_seed,
        ),
        overwrite=args.overwrite,
        by_parts=by_parts,
        piece_rows=args.piece_rows,
        lease_seconds=args.lease_seconds,
        since=time_in(args.out) if by_parts and args.overwrite else None,
        join=not args.no_join,
    )


def _on_ray(job: "Job", split: str, args: Namespace, progress: Callable[[int, int], None]) -> "Share":
    from feats.extraction.ray_engine import RaySettings, work_on_ray

    cluster = RaySettings(args.address, args.ray_workers, args.gpus_per_worker, args.cpus_per_worker)
    return work_on_ray(partial(job.help, split), job.path(split), cluster, progress)


def chosen_splits(splits: Collection[str], wanted: Sequence[str] | None) -> list[str]:
    """Those of the splits that are wanted, all without. Raises `UsageError` for those there aren't."""
    unknown = set(wanted or ()).difference(splits)
    if unknown:
        raise UsageError(f"no split {', '.join(sorted(unknown))} in the data; it has {', '.join(splits)}")
    return [split for split in splits if not wanted or split in wanted]


def rows_bar(title: str, *, passing: bool = False) -> AbstractContextManager[Callable[[int, int], None]]:
    """A callback that shows rows done of rows to do, from when it is first called. A `passing` bar leaves nothing on a
    terminal."""
    return rows_progress(title, stay=not passing)


def _resources_spent(error: RuntimeError) -> str | None:
    """What to say where the machine is too small for the settings; None for an error of another kind."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full; use a smaller --batch-size"
    if str(error).startswith("DataLoader worker"):
        return (
            "a decoding process died, for want of memory or shared memory as a rule; use fewer --workers or a smaller "
            "--batch-size"
        )
    return None
