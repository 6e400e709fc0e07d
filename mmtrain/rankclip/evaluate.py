"""Zero-shot classification and retrieval on any number of sets, in training and in the end."""

import open_clip
import torch
from torch import Tensor, nn

from mmtrain.metrics.retrieval import RetrievalRecall
from mmtrain.metrics.zero_shot import ZeroShotAccuracy, class_weights
from mmtrain.rankclip.networks import encode_images, encode_texts


class ImageTextEvaluation(nn.Module):
    """The metrics of one evaluation set.

    Args:
        num_samples: pictures in the set, over all processes.
        captioned: the set has captions, so retrieval is measured.
        prompts: token ids [classes, templates, context] for zero-shot classification, None for a set without labels.
    """

    def __init__(self, num_samples: int, captioned: bool, prompts: Tensor | None = None) -> None:
        super().__init__()
        self.num_samples, self.prompts = (
            num_samples,
            prompts,
        )  # not a buffer: 80,000 prompts don't belong in checkpoints
        self.weights: Tensor | None = None
        self.zero_shot = ZeroShotAccuracy() if prompts is not None else None
        self.retrieval = RetrievalRecall(ties="pessimistic") if captioned else None

    def begin(self, network: open_clip.CLIP, device: torch.device, chunk: int = 512) -> None:
        """Forget earlier batches and encode the class prompts with the present weights."""
        if self.retrieval is not None:
            self.retrieval.reset()
        if self.zero_shot is not None:
            self.zero_shot.reset()
            classes, templates, context = self.prompts.shape
            tokens = self.prompts.view(-1, context).split(chunk)
            features = torch.cat([encode_texts(network, t.to(device)).float() for t in tokens])
            self.weights = class_weights(features.view(classes, templates, -1))

    def update(self, network: open_clip.CLIP, batch: dict[str, Tensor]) -> None:
        """Add a batch: image, id, and text with text_id, or label, or both."""
        if "image" not in batch:
            return  # every picture of the batch was unreadable
        images = encode_images(network, batch["image"])
        if self.zero_shot is not None:
            self.zero_shot.update(images, batch["label"], self.weights, batch["id"])
        if self.retrieval is not None:
            self.retrieval.update(images, batch["id"], encode_texts(network, batch["text"]), batch["text_id"])

    def compute(self) -> dict[str, float]:
        """Fractions in [0, 1] over all processes."""
        values = {}
        if self.zero_shot is not None:
            values |= {f"zero_shot_{name}": value for name, value in self.zero_shot.compute().items()}
        if self.retrieval is not None:
            values |= self.retrieval.compute()
        return {name: float(value) for name, value in values.items()}

    def chance(self, name: str) -> float:
        """What guessing scores under a name of `compute`: k of the classes, or k of the pictures."""
        k = int("".join(c for c in name.rpartition("_")[2] if c.isdigit()))
        return min(1.0, k / (len(self.prompts) if name.startswith("zero_shot") else self.num_samples))
