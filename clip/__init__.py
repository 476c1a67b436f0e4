"""CLIP: tokenizer, text tower, image tower, preprocessing."""

from clip.encode import TextEncoder, TwoTowerEncoder
from clip.model import SD15_TEXT, VIT_H, CLIPImage, CLIPImageConfig, CLIPText, CLIPTextConfig
from clip.preprocess import PictureError, open_picture, preprocess
from clip.tokenizer import tokenize

__all__ = [
    "SD15_TEXT",
    "VIT_H",
    "CLIPImage",
    "CLIPImageConfig",
    "CLIPText",
    "CLIPTextConfig",
    "PictureError",
    "TextEncoder",
    "TwoTowerEncoder",
    "open_picture",
    "preprocess",
    "tokenize",
]
