"""CLIP: tokenizer, text tower, image tower, preprocessing."""

from clip.encode import TextEncoder, TwoTowerEncoder
from clip.model import SD15_TEXT, VIT_H, CLIPImage, CLIPImageConfig, CLIPText, CLIPTextConfig
from clip.preprocess import FRAMINGS, POSITIONS, preprocess
from clip.tokenizer import tokenize
from files.pictures import open_picture

__all__ = [
    "FRAMINGS",
    "POSITIONS",
    "SD15_TEXT",
    "VIT_H",
    "CLIPImage",
    "CLIPImageConfig",
    "CLIPText",
    "CLIPTextConfig",
    "TextEncoder",
    "TwoTowerEncoder",
    "open_picture",
    "preprocess",
    "tokenize",
]
