"""Faces for the FaceID adapters: embeddings out of files, or out of pictures where insightface is installed."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch import Tensor
from torch.nn.functional import normalize

from files.errors import UserError
from files.pickles import read_pickle

FACE_DIM = 512
PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # of torch.save: a tensor, or the NumPy array that insightface gives
MOST = 1 << 26  # bytes of a file: 32768 faces
DETECT = (640, 448, 320, 192)  # pixels, one after the other: the detector misses a face that fills a large square


class FaceError(UserError):
    """A face that cannot be used; the message is one line that names the file."""


def read_embedding(path: str | Path) -> Tensor:
    """A face recogniser's embeddings (ArcFace; insightface's `normed_embedding`) out of a .npy, .safetensors or .bin file.

    Returns:
        (faces, 512) fp32, each of length 1.

    Raises:
        FaceError: missing, of another kind, or not 512 finite numbers to a face.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MOST:
            raise FaceError(f"{path}: larger than {MOST >> 20} MB; a face embedding is {FACE_DIM} numbers")
        if path.suffix in (".safetensors", *PICKLES):
            tensors = read_pickle(path) if path.suffix in PICKLES else load_file(path)
            if len(tensors) != 1:
                raise FaceError(f"{path}: holds {len(tensors)} tensors ({', '.join(list(tensors)[:4])}), one is wanted")
            values = next(iter(tensors.values()))
        else:
            values = np.load(path, allow_pickle=False)
        values = np.asarray(values, dtype=np.float32)
    except UserError as error:
        raise FaceError(str(error)) from None
    except Exception as error:  # noqa: BLE001, of a damaged header NumPy raises whatever Python's tokenizer does
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "damaged, or another kind of file"
        raise FaceError(f"{path}: a face embedding, .npy, .safetensors or .bin, is wanted here ({reason})") from None
    if values.size == 0 or values.ndim > 2 or values.shape[-1:] != (FACE_DIM,):
        raise FaceError(
            f"{path}: of shape {values.shape}; a face embedding is {FACE_DIM} numbers, several (n, {FACE_DIM})"
        )
    faces = torch.from_numpy(values).reshape(-1, FACE_DIM)
    if not faces.isfinite().all() or not faces.norm(dim=1).all():
        raise FaceError(f"{path}: {FACE_DIM} finite numbers, not all zero, are wanted for each face")
    return normalize(faces)


def find_faces(images: list[Image.Image], names: list[str]) -> tuple[Tensor, list[Image.Image]]:
    """The largest face of each picture, with insightface's buffalo_l models (fetched by it at its first use).

    Returns:
        embeddings (pictures, 512), each of length 1, and the faces, upright, 224x224: what FaceID-plus shows to CLIP.

    Raises:
        FaceError: insightface is not installed or does not start, or a picture has no face that it finds.
    """
    if not (find_spec("insightface") and find_spec("onnxruntime")):
        raise FaceError(
            "this adapter reads faces: give `face_embedding` FILE (.npy, .safetensors or .bin, 512 numbers), or install "
            "insightface and onnxruntime, and the faces are read off the pictures"
        )
    try:
        from insightface.app import FaceAnalysis
        from insightface.utils.face_align import norm_crop

        app = FaceAnalysis(name="buffalo_l", allowed_modules=["detection", "recognition"])
        app.prepare(ctx_id=0, det_size=(DETECT[0], DETECT[0]))
    except Exception as error:  # noqa: BLE001, it fetches and unpacks its models here and wraps no error
        raise FaceError(
            f"insightface does not start ({type(error).__name__}: {error}); or give `face_embedding`"
        ) from None
    embeddings, crops = [], []
    for image, name in zip(images, names, strict=True):
        pixels = np.ascontiguousarray(np.asarray(image)[:, :, ::-1])  # it works on BGR
        for side in DETECT:
            app.det_model.input_size = (side, side)  # a second `prepare` would not change it
            if found := app.get(pixels):
                break
        else:
            raise FaceError(
                f"{name}: no face found; give a picture with a clearer one, or one that shows the whole head"
            )
        face = max(found, key=lambda face: (face.bbox[2] - face.bbox[0]) * (face.bbox[3] - face.bbox[1]))
        embeddings.append(torch.from_numpy(np.asarray(face.normed_embedding, dtype=np.float32)))
        crop = norm_crop(pixels, landmark=face.kps, image_size=224)
        crops.append(Image.fromarray(np.ascontiguousarray(crop[:, :, ::-1])))
    return torch.stack(embeddings), crops
