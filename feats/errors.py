"""The two ways stage 1 can fail: the whole command, or one row."""


class UsageError(Exception):
    """Arguments or input that no run can work with.

    The message says what was found, what was expected and what to do next. Scripts print it as one line
    on stderr and exit with status 2.
    """


class RowError(Exception):
    """One pair that can't be encoded. The row is quarantined with this message as its reason; the run goes on."""


def first_line(error: BaseException) -> str:
    """The first line of a library's message that says anything, for one-line errors; the error's type if none does.
    Without backquotes, which name our own settings."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.replace("`", "'")
