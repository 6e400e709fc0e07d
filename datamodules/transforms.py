"""Pictures from bytes to uint8 tensors. Normalising happens on the device, with the model's own constants."""

import io
import warnings
from typing import Literal

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode
from torchvision.transforms.v2 import functional as TF

torchvision.disable_beta_transforms_warning()

LOOK_FIRST = 256 * 1024  # bytes; larger files have their size in pixels read before they are decoded
MAX_PIXELS = 64_000_000


class UnreadablePicture(ValueError):
    """The bytes are not a picture that can be used; `reason` is a short name to count by."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode(data: bytes) -> Tensor:
    """Any picture file as uint8 RGB [3, H, W]; the first frame of an animation.

    Raises:
        UnreadablePicture: reason empty_image, undecodable_image or too_large_image.
    """
    if not data:
        raise UnreadablePicture("empty_image")
    if len(data) > LOOK_FIRST:
        _check_size(data)
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = torchvision.io.decode_image(buffer, mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError):
        picture = _decode_rare(data)  # TIFF, BMP, AVIF and what else Pillow knows
    if picture.ndim == 4:
        picture = picture[0]
    if picture.dtype != torch.uint8:  # 16-bit PNG
        picture = TF.to_dtype(picture, torch.uint8, scale=True)
    if picture.shape[0] != 3 or picture.numel() == 0:
        raise UnreadablePicture("undecodable_image")
    return picture


def _check_size(data: bytes) -> None:
    try:
        with Image.open(io.BytesIO(data)) as header:
            width, height = header.size
    except Image.DecompressionBombError:
        raise UnreadablePicture("too_large_image") from None
    except (OSError, ValueError, SyntaxError):
        raise UnreadablePicture("undecodable_image") from None
    if width * height > MAX_PIXELS:
        raise UnreadablePicture("too_large_image")


def _decode_rare(data: bytes) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as picture:
                if picture.size[0] * picture.size[1] > MAX_PIXELS:
                    raise UnreadablePicture("too_large_image")
                return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise error if isinstance(error, UnreadablePicture) else UnreadablePicture("undecodable_image") from None


Interpolation = Literal["bicubic", "bilinear"]


def resize_and_centre_crop(picture: Tensor, size: int, interpolation: Interpolation = "bicubic") -> Tensor:
    """Shorter side to `size`, then the centre [3, size, size]; CLIP's evaluation transform."""
    if picture.shape[-2:] == (size, size):
        return picture
    shorter = min(picture.shape[-2:])
    if max(picture.shape[-2:]) > 8 * shorter:  # only the middle is kept: a thin strip would first grow beyond memory
        picture = TF.center_crop(picture, [min(side, 4 * shorter) for side in picture.shape[-2:]])
    picture = TF.resize(picture, [size], interpolation=TF.InterpolationMode(interpolation), antialias=True)
    return TF.center_crop(picture, [size, size])


def random_crop(
    picture: Tensor,
    size: int,
    generator: np.random.Generator,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.0,
    interpolation: Interpolation = "bicubic",
) -> Tensor:
    """A random part of the picture, resized to [3, size, size], mirrored with probability `flip`.

    Area share and log aspect ratio are uniform, as in torchvision's RandomResizedCrop, but all randomness comes from
    `generator`, so a sample's crop is a function of its place in the data order.
    """
    height, width = picture.shape[-2:]
    top, left, crop_height, crop_width = crop_box(height, width, generator, scale, ratio)
    mode = TF.InterpolationMode(interpolation)
    picture = TF.resized_crop(picture, top, left, crop_height, crop_width, [size, size], mode, antialias=True)
    return TF.horizontal_flip(picture) if flip and generator.random() < flip else picture


def crop_box(
    height: int, width: int, generator: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Top, left, height, width of a random crop; ten tries, then the largest centred one inside `ratio`."""
    for _ in range(10):
        area = height * width * generator.uniform(*scale)
        aspect = np.exp(generator.uniform(np.log(ratio[0]), np.log(ratio[1])))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    h, w = min(height, round(width / aspect)), min(width, round(height * aspect))
    return (height - h) // 2, (width - w) // 2, max(h, 1), max(w, 1)
