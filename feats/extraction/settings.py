"""How to extract, whichever the encoder: typed, and with a default for everything."""

from dataclasses import dataclass

from feats.errors import UsageError

MOST_VIEWS = 1024


@dataclass(frozen=True)
class ExtractionSettings:
    """Settings of one extraction; device, dtype and tokens are the encoder's own.

    None stands for a default that depends: `batch_size` is the cache's own, else what suits device and network;
    `workers` (decoding processes) one per core, 16 at most; `text_clean` (none, basic, tweet) the encoder's level.
    `views` augmented views of each picture are cached, too, drawn from `views_seed`. Raises
    `UsageError` for more than `MOST_VIEWS`.
    """

    batch_size: int | None = None
    workers: int | None = None
    text_clean: str | None = None
    views: int = 0
    views_seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.views <= MOST_VIEWS:
            raise UsageError(
                f"`views` {self.views}: expected 0 to {MOST_VIEWS}, each takes as much room as the pictures"
            )
