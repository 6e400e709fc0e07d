"""What a trained character classifier says of pictures that nobody trained on: the evaluator of F-Acc and C-F1.

B batch, C characters.
"""

from math import isfinite, nan
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mmtrain.checkpoint import AtomicCheckpointIO
from mmtrain.config_errors import UserError
from mmtrain.ema import ema_weights
from mmtrain.storyweaver.classifier import CharacterClassifier, check_is_classifier


class Recogniser(nn.Module):
    """A trained classifier, frozen, for pictures that were in nobody's training: the mean of its K networks.

    Args:
        classifier: trained, or loaded.
        name: for protocols.
    """

    def __init__(self, classifier: CharacterClassifier, name: str) -> None:
        super().__init__()
        self.classifier = classifier.eval().requires_grad_(False)
        self.name = name

    @property
    def names(self) -> list[str]:
        """The characters, in the order of its answers."""
        return self.classifier.world.names

    @property
    def held_out(self) -> dict[str, float]:
        """What was measured on pictures that the networks never saw, in the first set of the last validation."""
        return next(iter(self.classifier.held_out.values()), {})

    @property
    def held_out_accuracy(self) -> float | None:
        """Its F-Acc on real pictures, in [0, 1]; None if it was never validated."""
        return self.held_out.get("f_acc")

    def describe(self) -> str:
        """What it is and how good, for protocols."""
        own = self.held_out
        parts = (("single", "f_acc_single"), ("two", "f_acc_two"), ("C-F1", "c_f1"))
        scores = ", ".join(f"{word} {own[key]:.3f}" for word, key in parts if isfinite(own.get(key, nan)))
        accuracy = f"{own['f_acc']:.3f} ({scores})" if own else "unknown"
        return f"recogniser {self.name} ({self.classifier.backbone}), F-Acc on held-out real pictures {accuracy}"

    def _fitted(self, pictures: Tensor) -> Tensor:
        """Pictures in the size of the training, squashed where their shape is another: uint8 [B, 3, h, w]."""
        size = self.classifier.picture_size
        self.to(pictures.device)
        if tuple(pictures.shape[-2:]) == size:
            return pictures
        scaled = interpolate(pictures.float(), size, mode="bilinear", antialias=True, align_corners=False)
        return scaled.round().clamp(0, 255).to(torch.uint8)

    @torch.no_grad()
    def probabilities(self, pictures: Tensor) -> Tensor:
        """Probabilities [B, C] that each character is in a picture, uint8 [B, 3, H, W]; float32."""
        return self._mean(self._fitted(pictures))

    @torch.no_grad()
    def halves(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [B, C] of the left and of the right half of each picture; nothing is stretched."""
        fitted = self._fitted(pictures)
        middle = fitted.shape[-1] // 2
        return self._mean(fitted[..., :middle]), self._mean(fitted[..., -middle:])

    def _mean(self, pictures: Tensor) -> Tensor:
        with torch.autocast(pictures.device.type, enabled=False):
            return self.classifier.logits(pictures).float().sigmoid().mean(dim=0)

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """Features [B, D] before the last layer, of all networks side by side; float32."""
        fitted, head = self._fitted(pictures), self.classifier.heads[0]
        with torch.autocast(pictures.device.type, enabled=False):
            return torch.cat([head.pooled(own(fitted)[0]).float() for own in self.classifier.backbones], dim=1)


def load_recogniser(checkpoint: str | Path, where: str = "recogniser") -> Recogniser:
    """The recogniser of a checkpoint of `CharacterClassifier`, on the CPU.

    Args:
        where: the setting that named the file, for messages.

    Raises:
        UserError: no such file, or one of another model.
    """
    try:
        content = AtomicCheckpointIO().load_checkpoint(checkpoint)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('ckpt_path: ')}") from error
    check_is_classifier(content, f"{where}: {checkpoint}")
    # those with an underscore are notes of the command line
    given = {key: value for key, value in content["hyper_parameters"].items() if not key.startswith("_")}
    weights = given.pop("weights", None)  # the checkpoint holds them; their file may be gone
    frozen = given.pop("frozen_backbone", False)
    given.pop("views", None)
    with torch.random.fork_rng(devices=[]):  # fresh weights, replaced at once, must not move the caller's numbers
        classifier = CharacterClassifier(**given)
        classifier.frozen_backbone, classifier.keep_statistics = frozen, bool(weights) or classifier.keep_statistics
        classifier.on_load_checkpoint(content)
    state = {key: value for key, value in ema_weights(content).items() if not key.startswith("metrics.")}
    classifier.load_state_dict(state)
    return Recogniser(classifier, Path(checkpoint).name)
