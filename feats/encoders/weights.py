"""Where weights come from: local files, the hub and its cache; their sha256; what to say when they can't be had."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from feats.errors import NoWeightsError, Remedy, UsageError
from feats.writing import open_to_others

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "model.safetensors"  # of a saved encoder, as of a Hugging Face model folder
HUB_TIMEOUT = 5  # seconds; the hub's own downloads retry for half a minute before they say that there is no network


def hub_reachable() -> bool:
    """Whether the hub answers one unrepeated question, whatever the answer. False under HF_HUB_OFFLINE."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # noqa: BLE001 - the hub's http library and its exceptions differ by version
        return False
    return True


def sha256_of(path: Path | str) -> str:
    """Hex sha256 of a file; of a folder's weight files (`*.safetensors`, else `*.bin`), joined in name order.

    A folder with a single weight file has that file's sha256.
    """
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digests = [sha256_of(file) for file in weight_files(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def verified_sha256(path: Path | str, expected: str | None) -> str:
    """`sha256_of` weights that are about to be opened. Raises `UsageError` when they aren't the `expected` ones."""
    digest = sha256_of(path)
    if expected is not None and digest != expected:
        raise UsageError(f"{path} isn't the file asked for (weights_sha256 {digest}, expected {expected})")
    return digest


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face model folder, safetensors preferred. Raises `UsageError` if it has none."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UsageError(f"{folder} holds no weights; expected *.safetensors or pytorch_model*.bin in it")
    return files


def weights_at(path: Path) -> Path:
    """The state-dict file that `path` names: itself, or the one in a folder of a saved encoder."""
    return path / WEIGHTS_FILE if path.is_dir() else path


def save_weights(folder: Path, state: Mapping[str, "torch.Tensor"], metadata: Mapping[str, str] | None = None) -> None:
    """Write a state dict, whose tensors share no memory, as `model.safetensors` in `folder`, bit for bit."""
    from safetensors.torch import save_file

    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(tensors, folder / WEIGHTS_FILE, dict(metadata) if metadata else None)
    open_to_others(folder / WEIGHTS_FILE)


_LOCAL = Remedy("give a local file or folder with `weights`", settings={"weights": "PATH"})
_OF_HUB = (
    Remedy("set HF_ENDPOINT to a hub mirror you can reach", {"HF_ENDPOINT": "https://MIRROR"}),
    Remedy("set HF_HOME to a folder that holds a filled hub cache", {"HF_HOME": "FOLDER"}),
)
_OFFLINE = Remedy("use an offline encoder")
_OF_TORCH_HUB = (Remedy("set TORCH_HOME to a folder whose hub/checkpoints holds the file", {"TORCH_HOME": "FOLDER"}),)


def unobtainable(what: str, tried: Sequence[str], *, torch_hub: bool = False) -> NoWeightsError:
    """The error for weights that can't be had from the Hugging Face hub, or from torch hub: every place tried, then
    the remedies."""
    return NoWeightsError(what, tried, (_LOCAL, *(_OF_TORCH_HUB if torch_hub else _OF_HUB), _OFFLINE))
