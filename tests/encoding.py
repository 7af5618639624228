"""What tests of encoders share."""

from collections.abc import Sequence

import torch
from PIL import Image

from feats.encoders.base import Encoder, Features


def image_features(encoder: Encoder, pictures: Sequence[Image.Image]) -> Features:
    """As the pipeline does it: preprocessed pictures as bytes, then normalised, then the forward pass."""
    pixels = torch.stack([encoder.image.to_bytes(picture) for picture in pictures])
    with torch.inference_mode():
        return encoder.image.forward(encoder.to_pixels(pixels))


def text_features(encoder: Encoder, texts: Sequence[str]) -> Features:
    """As the pipeline does it: tokenised, then the forward pass."""
    with torch.inference_mode():
        return encoder.text.forward([tokens.ids for tokens in encoder.text.tokenize(texts)])
