"""What scripts of this stage show, and the one line for whatever ends them."""

from __future__ import annotations

import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from feats.command_line.exit_status import EXIT_INTERRUPTED, EXIT_UNUSABLE
from feats.command_line.messages import refuse, refuse_without_extra, show_warning, with_messages
from feats.command_line.wording import as_typed
from feats.errors import UsageError
from feats.interrupts import interruptible
from feats.terminal import progress
from modeling.training.config import Epochs, TrainConfig

if TYPE_CHECKING:
    from modeling.experiments.experiment import Experiment


# Settings that the command line knows by another name.
OPTION_OF = {"sides": "ablation", "image": "vtype", "text": "ttype"}


def command_line(argv: Sequence[str] | None) -> str:
    """What the user typed, for the run's records."""
    return shlex.join(["python", sys.argv[0], *(sys.argv[1:] if argv is None else argv)])


@contextmanager
def progress_bar(what: str, total: int, unit: str) -> Iterator[Callable[[int], Any]]:
    """Progress on stderr while the block runs, and the function that moves it on by some steps; of epochs with the
    head whose they are."""
    with progress(what, total, unit) as shown:
        yield lambda steps: shown.add(steps, now=steps.config.head.head if isinstance(steps, Epochs) else "")


@contextmanager
def training_bar(configs: Sequence[TrainConfig], experiment: Experiment) -> Iterator[Callable[[int], Any]]:
    """As `progress_bar`, of the epochs of `train_all`: the time left goes by what an epoch of each head takes."""
    from modeling.experiments.fitting import epoch_weights, total_epochs

    takes = epoch_weights(configs, experiment)
    weight = sum(takes[config] * total_epochs([config], experiment) for config in configs)

    def add(epochs: int) -> None:
        assert isinstance(epochs, Epochs)
        shown.add(epochs, takes[epochs.config] * epochs, epochs.config.head.head)

    with progress("train", total_epochs(configs, experiment), "epoch", weight) as shown:
        yield add


def say(line: str) -> None:
    """Print a line while a bar is shown, which stays whole below it."""
    from tqdm import tqdm

    tqdm.write(line)


def print_note(text: str) -> None:
    """Say something that is no result, and no warning."""
    print(f"note: {text}", file=sys.stderr)


def print_lines(lines: Iterable[str], quiet: bool = False) -> None:
    """Print what libraries have to say, notes to stderr; nothing if `quiet`."""
    for line in lines:
        if not quiet:
            print(as_typed(line, OPTION_OF), file=sys.stderr if line.startswith("note:") else sys.stdout)


def guarded(
    work: Callable[[], int],
    interrupted: str,
    named: Mapping[str, str] = OPTION_OF,
    *,
    same_bits: bool = False,
    given: Mapping[str, Any] | None = None,
) -> int:
    """Run a script's work and show what libraries say. Unusable input ends with one line and status 2, an interruption
    with `interrupted` and 130. `named`: settings that the script knows by another name; `given`: its options, for the
    commands that help where weights are missing, see `feats.command_line.commands.no_weights_lines`.
    `same_bits`: from the beginning as `feats.acceleration.deterministic`."""
    import torch  # noqa: F401 - here Ctrl-C still ends the process at once: torch's import may swallow an exception

    with interruptible(signal.SIGINT):
        return with_messages(partial(_guarded, work, interrupted, named, same_bits, given))


def _guarded(
    work: Callable[[], int],
    interrupted: str,
    named: Mapping[str, str],
    same_bits: bool,
    given: Mapping[str, Any] | None,
) -> int:
    try:
        return _refusing(work, named, same_bits, given)
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return EXIT_INTERRUPTED


def _refusing(
    work: Callable[[], int], named: Mapping[str, str], same_bits: bool, given: Mapping[str, Any] | None
) -> int:
    import torch

    from feats.acceleration import deterministic

    with warnings.catch_warnings():
        warnings.showwarning = show_warning(named)
        try:
            with deterministic(same_bits):
                return work()
        except (UsageError, OSError) as error:  # what can't be read or written names its file
            return refuse(error, given, named)
        except ModuleNotFoundError as error:
            return refuse_without_extra(error)
        except torch.OutOfMemoryError:
            print("error: the GPU's memory is full; use --device cpu, or to train a smaller --bs", file=sys.stderr)
            return EXIT_UNUSABLE
