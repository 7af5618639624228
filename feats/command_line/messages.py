"""What scripts show on stderr, from warnings to the one line for whatever ends them."""

import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from feats.command_line.commands import no_weights_lines
from feats.command_line.exit_status import EXIT_INTERRUPTED, EXIT_UNUSABLE
from feats.command_line.wording import as_typed, error_line, remark
from feats.errors import NoWeightsError, UsageError
from feats.extras import remedy
from feats.interrupts import interruptible
from feats.terminal import rows_progress, showing


def show_warning(named: Mapping[str, str] = {}) -> Callable[..., None]:
    """What to set `warnings.showwarning` to: this project's warnings are lines of stderr, others stay as they are."""
    usual = warnings.showwarning
    home = Path(__file__).parents[2]

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        if category is UserWarning and Path(filename).parent.is_relative_to(home):
            print(remark(as_typed(message, named)), file=sys.stderr)
        else:
            usual(message, category, filename, lineno, *rest)

    return show


@interruptible(signal.SIGINT, signal.SIGTERM)
def guarded(work: Callable[[], int], interrupted: str, given: Mapping[str, Any] | None = None) -> int:
    """Run a script's work and show what libraries say. Unusable input, and a machine too small, end with one line and
    status 2, an interruption with `interrupted` and 130. `given` options of the script stand in the commands that help
    where weights are missing."""
    return with_messages(partial(_guarded, work, interrupted, given))


def with_messages(work: Callable[[], int]) -> int:
    """Run it while stdout and stderr show what the options of messages say."""
    try:
        with showing():
            return work()
    except (UsageError, BrokenPipeError) as error:  # of the log file, or stdout
        print(error_line(error), file=sys.stderr)
        return EXIT_UNUSABLE


def _guarded(work: Callable[[], int], interrupted: str, given: Mapping[str, Any] | None) -> int:
    with warnings.catch_warnings():
        warnings.showwarning = show_warning()
        try:
            return work()
        except UsageError as error:
            return refuse(error, given)
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


def refuse(error: Exception, given: Mapping[str, Any] | None, named: Mapping[str, str] = {}) -> int:
    """Say what can't be done, in one line as `error_line`, or as `no_weights_lines` where options are `given`; returns
    the exit status."""
    if isinstance(error, NoWeightsError) and given is not None:
        return refuse_without_weights(error, sys.argv[0], given)
    print(error_line(error, named), file=sys.stderr)
    return EXIT_UNUSABLE


def refuse_without_extra(error: ModuleNotFoundError) -> int:
    """Say which extra brings a module that isn't there, and give the exit status. Raises the error itself where none
    does: something else is wrong."""
    said = remedy(error)
    if said is None:
        raise error
    print(f"error: {said}", file=sys.stderr)
    return EXIT_UNUSABLE


def refuse_without_weights(
    error: NoWeightsError, script: str, given: Mapping[str, Any], others: Sequence[tuple[str, str]] = ()
) -> int:
    """Say what there is to say of weights that can't be had, as `no_weights_lines`, and give the exit status."""
    print("\n".join(no_weights_lines(error, script, given, others)), file=sys.stderr)
    return EXIT_UNUSABLE


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
