"""What the slow policy sees, as one vector: pictures through a network each, low-dimensional streams as they are.

Spec section 3. B batch, T observations. Parameter names are those of the released checkpoints.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.transforms.v2.functional import center_crop

from mmtrain import distributed
from mmtrain.config_errors import UserError

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FEATURES = {"resnet18": 512, "small": 64}
GROUP = 16  # channels that a GroupNorm of the ResNet takes together


class ObservationEncoder(nn.Module):
    """Features of two observations: pictures first, then low-dimensional streams, each group in alphabetical order.

    Pictures are cropped (at random in training, one crop a picture; the middle in evaluation) and normalised, except
    for keys that contain "gripper": a tactile picture is used whole and only brought to [-1, 1].

    Args:
        images: key -> height and width of its pictures.
        low_dim: key -> numbers of that stream.
        backbone: "resnet18" as released, with GroupNorm and without pretraining; "small" for pictures of 64 to 96
            pixels on a CPU: four convolutions and 64 features.
        image_norm: "corrected" takes ImageNet's mean and deviation from pictures in [0, 1]; "reference" as released
            brings them to [-1, 1] first, so they are normalised twice and lie in about [-6.5, 2.7].
        crop: share of height and width that is kept.

    Raises:
        UserError: an unknown choice, a crop outside (0, 1], or nothing to encode.
    """

    def __init__(
        self,
        images: Mapping[str, tuple[int, int]],
        low_dim: Mapping[str, int],
        backbone: Literal["resnet18", "small"] = "resnet18",
        image_norm: Literal["corrected", "reference"] = "corrected",
        crop: float = 0.9,
    ) -> None:
        super().__init__()
        if backbone not in FEATURES:
            raise UserError(f"backbone: {backbone} is not known {list(FEATURES)}")
        if image_norm not in ("corrected", "reference"):
            raise UserError(f"image_norm: {image_norm} is not known ['corrected', 'reference']")
        if not 0 < crop <= 1:
            raise UserError(f"crop: {crop}, expected the share of a picture's height and width to keep, in (0, 1]")
        if not images and not low_dim:
            raise UserError("the policy sees nothing: no picture and no low-dimensional stream")
        self.images = {key: tuple(images[key]) for key in sorted(images)}
        self.low_dim = dict(sorted(low_dim.items()))
        self.image_norm = image_norm
        self.crops = {
            key: size if is_tactile(key) else (int(crop * size[0]), int(crop * size[1]))
            for key, size in self.images.items()
        }
        build = group_norm_resnet18 if backbone == "resnet18" else small_network
        self.key_model_map = nn.ModuleDict({key: build(self.crops[key]) for key in self.images})
        self.feature_dim = len(self.images) * FEATURES[backbone] + sum(self.low_dim.values())

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """The condition of the slow policy.

        Args:
            observation: pictures [B, T, 3, H, W], uint8 or float in [0, 1]; normalised streams [B, T, D].

        Returns:
            [B, T * feature_dim], observation by observation.

        Raises:
            UserError: a stream is missing or has another shape.
        """
        shapes = {key: (3, *size) for key, size in self.images.items()}
        for key, shape in (shapes | {key: (width,) for key, width in self.low_dim.items()}).items():
            self._check(observation, key, shape)
        parts = [self._encode(key, observation[key]) for key in self.images]
        return torch.cat(parts + [observation[key] for key in self.low_dim], dim=-1).flatten(1)

    def _check(self, observation: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> None:
        if key not in observation:
            raise UserError(f"observation: {key} is missing, the policy was built to see it; given {list(observation)}")
        found = tuple(observation[key].shape[2:])
        if found != shape:
            raise UserError(f"observation: {key} has shape {list(found)} at each step, the policy takes {list(shape)}")

    def _encode(self, key: str, pictures: Tensor) -> Tensor:
        flat = pictures.flatten(0, 1)
        if self.crops[key] != self.images[key]:
            crop = random_crop if self.training else center_crop
            flat = crop(flat, list(self.crops[key]))
        features = self.key_model_map[key](normalise_pictures(flat, self.image_norm, is_tactile(key)))
        return features.unflatten(0, pictures.shape[:2])


def is_tactile(key: str) -> bool:
    """Whether a stream of pictures shows a sensor's gel, as the released code tells it: by its name."""
    return "gripper" in key


def normalise_pictures(pictures: Tensor, image_norm: str, tactile: bool) -> Tensor:
    """Network input [N, 3, H, W] of pictures, uint8 or float in [0, 1]; see `ObservationEncoder`."""
    mean, deviation = pictures.new_tensor([IMAGENET_MEAN, IMAGENET_DEVIATION], dtype=torch.float32).view(2, 3, 1, 1)
    if tactile:
        scale, offset = torch.full_like(mean, 2.0), torch.full_like(mean, -1.0)
    elif image_norm == "reference":
        scale, offset = 2 / deviation, -(1 + mean) / deviation
    else:
        scale, offset = 1 / deviation, -mean / deviation
    if not pictures.is_floating_point():
        scale = scale / 255
    return torch.addcmul(offset, pictures.float(), scale)


def random_crop(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """A part [N, C, *size] of each picture [N, C, H, W], elsewhere in each."""
    count, device = len(pictures), pictures.device
    rows, columns = (
        distributed.rows_of_all(lambda n, most=full - kept: torch.randint(most + 1, (n, 1), device=device), count)
        + torch.arange(kept, device=device)
        for full, kept in zip(pictures.shape[-2:], size, strict=True)
    )
    number = torch.arange(count, device=device)[:, None, None]
    return pictures[number, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def group_norm_resnet18(size: tuple[int, int]) -> nn.Module:
    """ResNet-18 without classifier, 512 features, GroupNorm over 16 channels each, for pictures of any size."""
    network = resnet18(weights=None, norm_layer=lambda channels: nn.GroupNorm(channels // GROUP, channels))
    network.fc = nn.Identity()
    return network


def small_network(size: tuple[int, int]) -> nn.Module:
    """Four convolutions of stride 2 and a linear layer, 64 features, for small pictures of one size."""
    channels = (3, 16, 32, 32, 32)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU()]
        size = tuple((side + 1) // 2 for side in size)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * size[0] * size[1], FEATURES["small"]))
