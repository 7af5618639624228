"""An encoder's features as the pipeline has them made: preparation, then the forward pass."""

from collections.abc import Sequence

import torch
from PIL import Image

from feats.encoders.registry import Encoder, Features
from feats.extraction.local import Settings, to_pixels
from feats.extraction.preparation import to_array


def image_features(encoder: Encoder, pictures: Sequence[Image.Image], dtype: torch.dtype = torch.float32) -> Features:
    """Preprocessed pictures as bytes, then normalised, then the forward pass in `dtype`."""
    pixels = torch.stack([to_array(encoder.image.preprocess(picture)) for picture in pictures])
    with torch.inference_mode():
        return encoder.image.forward(to_pixels(pixels, encoder.image, Settings(torch.device("cpu"), dtype)))


def text_features(encoder: Encoder, texts: Sequence[str]) -> Features:
    with torch.inference_mode():
        return encoder.text.forward([tokens.ids for tokens in encoder.text.tokenize(texts)])
