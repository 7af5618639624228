"""The two ways stage 1 can fail: the whole command, or one row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace


class UsageError(Exception):
    """Arguments or input that no run can work with.

    The message says what was found, what was expected and what to do next. Scripts print it as one line
    on stderr and exit with status 2.
    """


class CantWriteError(UsageError):
    """What the file system refuses to take, as when the disk is full. Whoever goes on after other errors, with the next
    row of a table, stops at this one: the next would fare no better."""


@dataclass(frozen=True)
class Remedy:
    """What makes a failed call work: what to do, and how the call then differs, by environment variables and settings,
    whose values in capitals are for the user to fill in. Neither: it is another call."""

    what: str
    environment: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)


class NoWeightsError(UsageError):
    """Weights that can't be had: of what, the places tried, and what helps. Scripts, which know the whole command,
    print a line for each; the message is all of it in one."""

    def __init__(self, what: str, tried: Sequence[str], remedies: Sequence[Remedy]):
        super().__init__(what, tried, remedies)
        self.what, self.tried, self.remedies = what, tuple(tried), tuple(remedies)

    def __str__(self) -> str:
        places = "; ".join(f"({i}) {place}" for i, place in enumerate(self.tried, 1))
        helps = "; ".join(remedy.what for remedy in self.remedies)
        return f"no weights for {self.what}. Tried {places}. Remedies: {helps}"

    def named(self, name: str, *first: Remedy) -> "NoWeightsError":
        """The same of a call that takes weights by the names of encoders, `name` of this one, and needs this encoder
        but for the remedies `first`."""
        own = [
            replace(remedy, settings={key: f"{name}={value}" for key, value in remedy.settings.items()})
            for remedy in self.remedies
            if remedy.settings or remedy.environment
        ]
        return NoWeightsError(f"{self.what}, the encoder of {name}", self.tried, (*first, *own))


class RowError(Exception):
    """One pair that can't be encoded. The row is quarantined with this message as its reason; the run goes on."""


def first_line(error: BaseException) -> str:
    """The first line of a library's message that says anything, for one-line errors; the error's type if none does.
    Without backquotes, which name our own settings."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.replace("`", "'")


def reason_of(error: Exception) -> str:
    """Why a file can't be read or written, without its name, which may be a hidden one."""
    return getattr(error, "strerror", None) or first_line(error)
