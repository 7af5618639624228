"""Every kind of hostile input there is for data sets, by name."""

from tests.fuzzing.commands import COMMANDS
from tests.fuzzing.folders import FOLDERS
from tests.fuzzing.lists import LISTS
from tests.fuzzing.outcomes import Kind
from tests.fuzzing.pictures import PICTURES
from tests.fuzzing.shards import SHARDS
from tests.fuzzing.tables import TABLES
from tests.fuzzing.texts import TEXTS

KINDS: dict[str, Kind] = {**TABLES, **FOLDERS, **SHARDS, **PICTURES, **TEXTS, **LISTS, **COMMANDS}
SELDOM = {"command": 10, "process": 500}  # one of so many turns: what takes long
