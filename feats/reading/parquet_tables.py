"""The rows of a Parquet table. The only module of reading that needs pyarrow, the extra parquet."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from feats.errors import UsageError, first_line
from feats.regular import check_regular

_BATCH_ROWS = 1024


def column_names(file: Path | io.BytesIO, name: str) -> list[str]:
    """The columns of a table, which messages call `name`. Raises `OSError`, and `UsageError` for what is no Parquet."""
    with _readable(name), _opened(file) as table:
        return list(table.schema_arrow.names)


def table_rows(file: Path | io.BytesIO, name: str, columns: Sequence[str], first: int) -> Iterator[dict[str, Any]]:
    """The values of some columns from row `first` on, as Python's. Memory: some rows of one row group. Raises as
    `column_names`."""
    with _readable(name), _opened(file) as table:
        for group in range(table.metadata.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if first >= rows:
                first -= rows
                continue
            found = 0
            for batch in table.iter_batches(_BATCH_ROWS, [group], columns=list(columns)):
                found += batch.num_rows
                if first < batch.num_rows:
                    yield from batch.slice(first).to_pylist()
                first = max(0, first - batch.num_rows)
            if found != rows:
                raise UsageError(f"{name}: row group {group + 1} holds {found} rows, not {rows}; write it again")


def _opened(file: Path | io.BytesIO) -> pq.ParquetFile:
    if isinstance(file, Path):
        check_regular(file)
    return pq.ParquetFile(file)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # the system's
            raise
        raise _invalid(name, error) from None
    # Values that Python's types can't hold, and names of time zones that there aren't, come as anything.
    except (pa.ArrowException, ArithmeticError, LookupError, ValueError, NotImplementedError) as error:
        raise _invalid(name, error) from None


def _invalid(name: str, error: Exception) -> UsageError:
    return UsageError(f"{name}: not valid Parquet ({first_line(error)}); write it again")
