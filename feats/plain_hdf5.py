"""What a cache's HDF5 file may hold: plain datasets of known types, and small attributes.

HDF5 can do far more. A name may lead into other files, devices or pipes among them (external and soft links, external
storage, virtual datasets), a filter may be a library that is loaded to read it, and a shape of a few bytes may claim
terabytes. All this is told by the file's structure, before a value is read.
"""

from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np

MAX_ENTRIES = 64  # of datasets, and of attributes
MAX_ATTRIBUTE_BYTES = 1 << 20


def attribute_problem(file: h5py.File) -> str:
    """What is wrong with a file's attributes, '' for nothing: strings, numbers and truth values of fixed, small size
    are all they may be."""
    if h5py.h5a.get_num_attrs(file.id) > MAX_ENTRIES:
        return f"it has more than {MAX_ENTRIES} attributes"
    for number in range(h5py.h5a.get_num_attrs(file.id)):
        attribute = h5py.h5a.open(file.id, index=number)
        kind, name = attribute.get_type(), _shown(attribute.name)
        if attribute.shape != () or attribute.get_storage_size() > MAX_ATTRIBUTE_BYTES:
            return f"its attribute {name} isn't one value of at most {MAX_ATTRIBUTE_BYTES} bytes"
        if kind.get_class() not in (h5py.h5t.STRING, h5py.h5t.INTEGER, h5py.h5t.ENUM) or _is_variable(kind):
            return f"its attribute {name} is of an unknown type"
    return ""


def dataset_problem(file: h5py.File, known: Mapping[str, Any], lengths: Mapping[str, int | None]) -> str:
    """What is wrong with a file's datasets, '' for nothing. `known` gives the dtype of datasets by name ("S": text of
    any fixed length); all others must be float16. All are as long as `status`, but for those in `lengths`: longer by
    that, or (None) of any length."""
    if len(file) > MAX_ENTRIES:
        return f"it has more than {MAX_ENTRIES} datasets"
    rows: dict[str, int] = {}
    for name in file:
        if type(file.get(name, getlink=True)) is not h5py.HardLink:
            return f"{_shown(name)} is a link to elsewhere"
        if file.get(name, getclass=True) is not h5py.Dataset:
            return f"{_shown(name)} is no dataset"
        dataset = file[name]
        problem = _problem(dataset, known.get(name, np.float16))
        if problem:
            return f"{_shown(name)} {problem}"
        rows[name] = dataset.shape[0]
    if "status" not in rows:
        return "it holds no status"
    for name, length in rows.items():
        longer = lengths.get(name, 0)
        if longer is not None and length != rows["status"] + longer:
            return f"{_shown(name)} is of {length} rows, status of {rows['status']}"
    return ""


def _problem(dataset: h5py.Dataset, dtype: Any) -> str:
    created = dataset.id.get_create_plist()
    if created.get_layout() != h5py.h5d.CHUNKED or created.get_external_count():
        return "isn't stored in chunks in the file itself"
    filters = [created.get_filter(number)[0] for number in range(created.get_nfilters())]
    if filters != [h5py.h5z.FILTER_FLETCHER32]:
        return f"has the filters {filters}, expected {[h5py.h5z.FILTER_FLETCHER32]} (checksums)"
    kind = dataset.id.get_type()
    if dtype == "S":
        if kind.get_class() != h5py.h5t.STRING or _is_variable(kind):
            return "isn't text of a fixed length"
    elif kind.get_class() not in (h5py.h5t.INTEGER, h5py.h5t.FLOAT) or kind.dtype != np.dtype(dtype):
        return f"isn't of type {np.dtype(dtype)}"
    shape = dataset.shape
    if not shape or dataset.maxshape != shape or (dtype is not np.float16 and len(shape) > 1):
        return f"is of shape {shape}"
    claimed = int(np.prod([float(size) for size in shape])) * kind.get_size()
    if claimed > dataset.id.get_storage_size() or claimed > _file_bytes(dataset):
        return f"claims {claimed} bytes, more than the file holds of it"
    return ""


def _file_bytes(dataset: h5py.Dataset) -> int:
    size: int = dataset.file.id.get_filesize()
    return size


def _is_variable(kind: h5py.h5t.TypeID) -> bool:
    return kind.get_class() == h5py.h5t.STRING and bool(kind.is_variable_str())


def _shown(name: str | bytes) -> str:
    text = name.decode(errors="replace") if isinstance(name, bytes) else name
    return text[:80] if text.isprintable() else ascii(text[:80])
