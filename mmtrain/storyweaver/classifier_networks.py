"""Networks of the character classifier: a backbone that makes a map of features, and a head that pools it. B batch."""

import hashlib
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mmtrain.config_errors import UserError
from mmtrain.storyweaver.features import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LITE_MEAN,
    LITE_STD,
    check_file,
    efficientnet_lite0,
    read_weights,
    standardised,
)

Architecture = Literal["small", "efficientnet_lite0", "inception_v3"]
Pooling = Literal["max", "mean", "positions"]
SHARPNESS = 2.0  # of the smooth maximum over positions
DROPOUT = 0.3
SMALL_STAGES = 4
INCEPTION_SIZE, INCEPTION_LEAST = 299, 75  # pixels a side: with its second head, and at all


class Backbone(nn.Module):
    """Pictures uint8 [B, 3, h, w] of any size -> map [B, D, h', w'], and a second map while Inception is trained.

    Attributes:
        channels: D. second_channels: of the second map, None for a network without.
    """

    channels: int
    second_channels: int | None = None

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError


class SmallBackbone(Backbone):
    """Strided convolutions with batch normalisation; `width` channels in the first, then twice as many each."""

    def __init__(self, width: int = 32, stages: int = SMALL_STAGES) -> None:
        super().__init__()
        widths = [3, *(width * 2 ** min(stage, 2) for stage in range(stages))]
        self.channels = widths[-1]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                for a, b in pairwise(widths)
            )
        )

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.stages(standardised(pictures.float() / 255, LITE_MEAN, LITE_STD)), None


class LiteBackbone(Backbone):
    """EfficientNet-lite0 up to its last convolution: D = 1280, 1/32 of the picture's size."""

    channels = 1280

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        self.network = efficientnet_lite0(pretrained)
        self.network._fc = nn.Identity()  # of ImageNet's classes

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.network.extract_features(standardised(pictures.float() / 255, LITE_MEAN, LITE_STD)), None


class InceptionBackbone(Backbone):
    """Inception-v3 of torchvision up to its last map: D = 2048; the second map, 768 wide, is its auxiliary head's.

    Args:
        weights: file of torchvision's layout; None for fresh weights.

    Raises:
        UserError: no such file, or of another network.
    """

    channels, second_channels = 2048, 768

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        from torchvision.models import inception_v3

        self.network = inception_v3(weights=None, aux_logits=True, init_weights=weights is None)
        if weights is not None:
            check_file(weights, "weights", "save torchvision's inception_v3 as a file and name it")
            try:
                self.network.load_state_dict(read_weights(weights, "weights"))
            except RuntimeError as error:
                raise UserError(
                    f"weights: {weights}: is not torchvision's inception_v3 ({str(error).splitlines()[1].strip()})"
                ) from error
        self.network.fc, self.network.AuxLogits.fc = nn.Identity(), nn.Identity()

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        least = INCEPTION_SIZE if self.training else INCEPTION_LEAST
        if min(pictures.shape[-2:]) < least:
            raise UserError(f"data.size: {list(pictures.shape[-2:])}: Inception takes at least {least} pixels a side")
        x = standardised(pictures.float() / 255, IMAGENET_MEAN, IMAGENET_STD)
        auxiliary = None
        for name, layer in self.network.named_children():
            if name == "AuxLogits":
                auxiliary = layer(x).flatten(1)[..., None, None] if self.training else None
                continue
            if name == "avgpool":
                break
            x = layer(x)
        return x, auxiliary


class CharacterHead(nn.Module):
    """Map of features -> logits of the characters.

    Args:
        channels: D of the map.
        characters: C.
        pooling: "max" or "mean" over the map before the last layer; "positions": logits at each position, of
            standardised features, and their smooth maximum: a character is in the picture if it is anywhere.
        bias: of the last layer, to begin with.
        auxiliary: width of the map of a second head; None for none.
    """

    def __init__(
        self, channels: int, characters: int, pooling: Pooling, bias: float = 0.0, auxiliary: int | None = None
    ) -> None:
        super().__init__()
        self.characters, self.pooling = characters, pooling
        self.standard = nn.BatchNorm2d(channels, affine=False) if pooling == "positions" else nn.Identity()
        self.dropout = nn.Dropout(DROPOUT)
        self.last = nn.Linear(channels, characters)
        self.auxiliary = None if auxiliary is None else nn.Linear(auxiliary, characters)
        for layer in (self.last, self.auxiliary):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.constant_(layer.bias, bias)

    def forward(self, maps: Tensor, second: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits [B, C], and those of the second head, which only training has.

        Args:
            maps: [B, D, h, w].
            second: [B, D2, h2, w2].
        """
        extra = None if second is None or self.auxiliary is None else self.auxiliary(second.mean(dim=(2, 3)))
        if self.pooling == "positions":
            kept = self.dropout(maps.new_ones(len(maps), 1, maps.shape[1]))  # features drop out at all positions
            logits = self.last(self.standard(maps).flatten(2).transpose(1, 2) * kept)  # [B, h w, C]
            return smooth_maximum(logits), extra
        return self.last(self.dropout(self.pooled(maps))), extra

    def pooled(self, maps: Tensor) -> Tensor:
        """Features of whole pictures, [B, D] of [B, D, h, w]."""
        return maps.amax(dim=(2, 3)) if self.pooling == "max" else maps.mean(dim=(2, 3))


def smooth_maximum(logits: Tensor, sharpness: float = SHARPNESS) -> Tensor:
    """(1/r) log mean exp(r z) over positions, [B, C] of [B, P, C]: between the mean and the maximum.

    >>> smooth_maximum(torch.tensor([[[1.0], [1.0]]]))
    tensor([[1.]])
    """
    mean = torch.logsumexp(sharpness * logits, dim=1) - torch.tensor(float(logits.shape[1])).log()
    return mean / sharpness


class KeptMaps:
    """Maps of a frozen backbone in memory: of each picture a fixed number of variants, each computed once.

    Training a head takes hundreds of steps, and a step costs little beside the backbone. Half precision on the host.

    Args:
        views: variants of a picture, see `view_of`.
    """

    def __init__(self, views: int) -> None:
        self.views = views
        self.maps: dict[tuple[bytes, int], Tensor] = {}

    def of(self, backbone: Backbone, pictures: Tensor, numbers: Tensor) -> Tensor:
        """Maps [B, D, h', w'] of variants of pictures.

        Args:
            pictures: uint8 [B, 3, h, w].
            numbers: int64 [B] below `views`, which variant of each.
        """
        contents = [hashlib.blake2b(one.cpu().numpy().tobytes(), digest_size=16).digest() for one in pictures]
        keys = list(zip(contents, numbers.tolist(), strict=True))
        rows = {key: row for row, key in enumerate(keys) if key not in self.maps}
        if rows:
            made = torch.stack([view_of(pictures[row], *key) for key, row in rows.items()])
            with torch.no_grad():
                found = backbone(made)[0].to("cpu", torch.float16)
            self.maps |= dict(zip(rows, found, strict=True))
        return torch.stack([self.maps[key] for key in keys]).to(pictures.device).float()


def view_of(picture: Tensor, content: bytes, number: int) -> Tensor:
    """A variant of a picture, uint8 [3, h, w]: 0 as it is, 1 mirrored, from 2 on random parts, mirrored or not, with
    other colours; the same whenever it is asked for.

    Args:
        content: what its random numbers are seeded with, besides the number.
    """  # fmt: skip
    if number < 2:
        return picture.flip(-1) if number else picture
    seed = int.from_bytes(content[:6], "big") + number
    share, top, left, mirrored, *gains = torch.rand(8, generator=torch.Generator().manual_seed(seed)).tolist()
    height, width = picture.shape[-2:]
    rows, columns = (round(side * (0.7 + 0.3 * share)) for side in (height, width))
    top, left = round(top * (height - rows)), round(left * (width - columns))
    part = picture[None, :, top : top + rows, left : left + columns].float()
    values = interpolate(part, (height, width), mode="bilinear", antialias=True, align_corners=False)[0]
    brightness, *channels = gains
    values = (
        values * values.new_tensor([0.8 + 0.4 * gain for gain in channels]).view(3, 1, 1) * (0.7 + 0.6 * brightness)
    )
    values = values.flip(-1) if mirrored < 0.5 else values
    return values.round().clamp(0, 255).to(torch.uint8)


def make_backbone(architecture: Architecture, width: int, weights: str | None, pretrained: bool) -> Backbone:
    """The backbone of that name.

    Args:
        width: of the small one.
        weights: of Inception.
        pretrained: with ImageNet's weights, where they are at hand.
    """
    if architecture == "efficientnet_lite0":
        return LiteBackbone(pretrained)
    return InceptionBackbone(weights) if architecture == "inception_v3" else SmallBackbone(width)


def pooling_of(architecture: Architecture) -> Pooling:
    """How the head pools the map of a backbone."""
    return {"small": "max", "efficientnet_lite0": "positions", "inception_v3": "mean"}[architecture]
