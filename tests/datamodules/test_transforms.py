"""Pixels: the published evaluation transform from uint8 tensors, and random crops that a generator decides alone."""

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from datamodules.transforms import crop_box, random_crop, resize_and_centre_crop


def photo(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """A smooth random picture with some grain and edges, uint8 [3, height, width]."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.zeros(3, height, width)
    for cells in (4, 16, 64):
        coarse = torch.randn(1, 3, cells, cells, generator=generator)
        fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
        picture += fine[0] * 50 / cells**0.5
    picture[:, height // 3 : height // 2, width // 4 : width // 2] += 60
    picture += 4 * torch.randn(3, height, width, generator=generator)
    return (picture + 128).clamp(0, 255).to(torch.uint8)


def open_clip_pixels(picture: torch.Tensor, size: int) -> torch.Tensor:
    """What open_clip's evaluation transform makes of the picture, without its normalisation, in [0, 255]."""
    transform = open_clip.image_transform(size, is_train=False)
    normalised = transform(Image.fromarray(picture.permute(1, 2, 0).numpy()))
    mean, deviation = (
        torch.tensor(c).view(3, 1, 1) for c in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    return (normalised * deviation + mean) * 255


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    error = (a.double() - b.double()).square().mean().item()
    return 10 * np.log10(255**2 / max(error, 1e-12))


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (512, 512, 224),
        (512, 700, 224),
        (701, 512, 224),
        (150, 100, 224),
        (40, 2000, 64),
        (224, 300, 224),
        (224, 224, 224),
    ],
)
def test_evaluation_pixels_equal_open_clips(height, width, size) -> None:
    picture = photo(height, width)
    ours = resize_and_centre_crop(picture, size)
    assert (ours.shape, ours.dtype) == ((3, size, size), torch.uint8)
    assert psnr(ours, open_clip_pixels(picture, size)) >= 60
    if (height, width) == (512, 512):  # the bound tells the right filter from near ones
        assert psnr(resize_and_centre_crop(picture, size, "bilinear"), open_clip_pixels(picture, size)) < 55


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    assert torch.equal(resize_and_centre_crop(photo(64, 64), 64), photo(64, 64))


def test_random_crop_is_a_function_of_its_generator() -> None:
    picture = photo(90, 120)
    crop = lambda seed: random_crop(picture, 32, np.random.default_rng(seed), (0.3, 1.0), flip=0.5)  # noqa: E731
    before = torch.get_rng_state()
    crops = [crop(seed) for seed in range(8)]
    assert torch.equal(before, torch.get_rng_state())
    assert all(c.shape == (3, 32, 32) and c.dtype == torch.uint8 for c in crops)
    assert all(torch.equal(c, crop(seed)) for seed, c in enumerate(crops))
    assert len({c.numpy().tobytes() for c in crops}) == 8


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 480), (512, 512)])
def test_areas_and_ratios_of_crops_keep_their_ranges(height, width) -> None:
    scale, ratio = (0.2, 0.6), (3 / 4, 4 / 3)
    generator = np.random.default_rng(0)
    boxes = np.array([crop_box(height, width, generator, scale, ratio) for _ in range(2000)])
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    share, aspect = h * w / (height * width), w / h
    rounding = 0.01
    assert scale[0] - rounding < share.min() < 0.21 and 0.59 < share.max() < scale[1] + rounding
    assert ratio[0] - rounding < aspect.min() < 0.76 and 1.31 < aspect.max() < ratio[1] + rounding
    assert abs(share.mean() - 0.4) < 0.01  # uniform area share
    assert abs(np.log(aspect).mean()) < 0.02  # log aspect ratio is uniform around 1
    for start, free in ((top, height - h), (left, width - w)):  # places are uniform, both ends included
        start, free = start[free > 0], free[free > 0]
        assert abs((start / free).mean() - 0.5) < 0.03 and start.min() == 0 and (start == free).any()


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 300), (300, 1), (1, 1)])
def test_crops_of_extreme_pictures_are_the_largest_centred_ones(height, width) -> None:
    box = crop_box(height, width, np.random.default_rng(0), (0.9, 1.0), (3 / 4, 4 / 3))
    top, left, h, w = box
    assert h >= 1 and w >= 1 and 0 <= top <= height - h and 0 <= left <= width - w
    assert min(h, w) == min(height, width) or max(h, w) <= 2
    assert abs(top - (height - h) / 2) <= 1 and abs(left - (width - w) / 2) <= 1
    if min(height, width) == 10:
        assert 3 / 4 - 0.05 <= w / h <= 4 / 3 + 0.05
    assert random_crop(photo(height, width), 16, np.random.default_rng(0)).shape == (3, 16, 16)
    assert resize_and_centre_crop(photo(height, width), 16).shape == (3, 16, 16)


def test_flip_mirrors_the_share_of_pictures_that_it_says() -> None:
    picture = photo(32, 32)
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    plain = random_crop(picture, 32, np.random.default_rng(0), **whole)
    assert torch.equal(plain, picture)
    crops = [random_crop(picture, 32, np.random.default_rng(seed), flip=0.25, **whole) for seed in range(400)]
    mirrored = sum(torch.equal(crop, picture.flip(-1)) for crop in crops)
    assert 70 < mirrored < 130 and mirrored + sum(torch.equal(crop, picture) for crop in crops) == 400
