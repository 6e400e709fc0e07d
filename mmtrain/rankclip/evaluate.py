"""Zero-shot classification, retrieval, linear probes and geometry on any number of sets, in training and in the end."""

import open_clip
import torch
from torch import Tensor, nn

from mmtrain.feature_cache import Rows
from mmtrain.metrics.geometry import PairGeometry
from mmtrain.metrics.linear_probe import LinearProbe, ProbeSettings
from mmtrain.metrics.retrieval import RetrievalRecall
from mmtrain.metrics.zero_shot import ZeroShotAccuracy, class_weights
from mmtrain.rankclip.networks import encode_texts, project_images

# Table 3 and the last column of Table 4: the average is over exactly these.
PROBE_AVERAGE = (
    "cifar10", "cifar100", "dtd", "fgvc_aircraft", "food101", "gtsrb", "oxford_pets", "sst2", "stl10", "svhn"
)  # fmt: skip


def feature_rows(network: open_clip.CLIP, batch: dict) -> Rows:
    """What an evaluation needs of a batch: image [B, D] un-normalised, text [M, D] unit, and id, text_id, label."""
    if "image" not in batch:
        return {}  # every picture of the batch was unreadable
    rows = {"image": project_images(network, batch["image"]).float()}
    if "text" in batch:
        rows["text"] = encode_texts(network, batch["text"]).float()
    return rows | {name: batch[name] for name in ("id", "text_id", "label") if name in batch}


def encode_classes(network: open_clip.CLIP, prompts: Tensor, device: torch.device, chunk: int = 512) -> Tensor:
    """Class weights [classes, D] of prompts [classes, templates, context], encoded `chunk` at a time."""
    classes, templates, context = prompts.shape
    features = [encode_texts(network, tokens.to(device)).float() for tokens in prompts.view(-1, context).split(chunk)]
    return class_weights(torch.cat(features).view(classes, templates, -1))


class ImageTextEvaluation(nn.Module):
    """The metrics of one evaluation set.

    Args:
        num_samples: pictures in the set, over all processes.
        captioned: the set has captions, so retrieval is measured.
        prompts: token ids [classes, templates, context] for zero-shot classification, None for none.
        class_names: of the prompts, for pictures of results.
        present: classes that occur in the set; the accuracy is then among these only, and the one among all classes
            stands beside it as `all_classes_top{k}`. None chooses among all.
        probe_classes: classes of a linear probe on the set's labels; None for a set without a probe.
        probe_chance: what guessing scores in it.
        probe: how it is fitted.
        thorough: measure the one-caption protocol and the geometry of the pairs too, as `test` does.
    """

    def __init__(
        self,
        num_samples: int,
        captioned: bool,
        prompts: Tensor | None = None,
        class_names: list[str] | None = None,
        present: list[int] | None = None,
        probe_classes: int | None = None,
        probe_chance: float | None = None,
        probe: ProbeSettings | None = None,
        thorough: bool = False,
    ) -> None:
        super().__init__()
        self.num_samples, self.class_names, self.present, self.probe_chance = (
            num_samples, class_names, present, probe_chance
        )  # fmt: skip
        self.prompts = prompts  # not a buffer: 80,000 prompts don't belong in checkpoints
        self.weights: Tensor | None = None
        zero_shot = prompts is not None
        self.zero_shot = ZeroShotAccuracy() if zero_shot else None
        self.all_classes = ZeroShotAccuracy() if zero_shot and present is not None else None
        self.retrieval = (
            RetrievalRecall(ties="pessimistic", captions="both" if thorough else "all") if captioned else None
        )
        self.geometry = PairGeometry() if thorough and (captioned or zero_shot) else None
        self.probe = LinearProbe(probe_classes, probe) if probe_classes is not None else None

    def begin(self, network: open_clip.CLIP, device: torch.device, known: dict[int, Tensor] | None = None) -> None:
        """Forget earlier batches and encode the class prompts with the present weights.

        Args:
            known: class weights by `id` of their prompts, which sets with the same classes share.
        """
        for metric in self.children():
            metric.reset()
        if self.zero_shot is not None:
            known = {} if known is None else known
            if id(self.prompts) not in known:
                known[id(self.prompts)] = encode_classes(network, self.prompts, device)
            self.weights = known[id(self.prompts)]

    def add(self, rows: Rows, split: str = "test") -> None:
        """Add the rows of a batch, see `feature_rows`; those of split "train" are for fitting the probe only."""
        if not rows:
            return
        images, ids, labels = rows["image"], rows["id"], rows.get("label")
        if self.probe is not None:
            self.probe.update(images, labels, ids, split)
        if split == "train":
            return
        if self.zero_shot is not None:
            self._classify(images, labels, ids)
        if self.retrieval is not None:
            self.retrieval.update(images, ids, rows["text"], rows["text_id"])
        if self.geometry is not None:
            self.geometry.update(images, self._partners(rows), ids)

    def _classify(self, images: Tensor, labels: Tensor, ids: Tensor) -> None:
        if self.all_classes is None:
            self.zero_shot.update(images, labels, self.weights, ids)
            return
        present = torch.tensor(self.present, device=labels.device)
        self.zero_shot.update(images, torch.searchsorted(present, labels), self.weights[present], ids)
        self.all_classes.update(images, labels, self.weights, ids)

    def _partners(self, rows: Rows) -> Tensor:
        """The text of each picture: its first caption, or the text of its class."""
        if self.retrieval is None:
            return self.weights[rows["label"]]
        order = rows["text_id"].argsort(stable=True)
        first = torch.searchsorted(rows["text_id"][order], rows["id"])
        return rows["text"][order[first]]

    def compute(self) -> dict[str, float]:
        """Fractions in [0, 1] over all processes; of the geometry plain numbers."""
        values = {}
        if self.zero_shot is not None:
            values |= {f"zero_shot_{name}": value for name, value in self.zero_shot.compute().items()}
        if self.all_classes is not None:
            values |= {f"all_classes_{name}": value for name, value in self.all_classes.compute().items()}
        for metric in (self.retrieval, self.probe, self.geometry):
            values |= metric.compute() if metric is not None else {}
        return {name: float(value) for name, value in values.items()}

    def pairs(self, limit: int) -> tuple[Tensor, Tensor] | None:
        """Some pairs of image and text features, unit rows, for a figure; gathers, so call it on every process."""
        return self.geometry.pairs(limit) if self.geometry is not None and self.num_samples > 1 else None

    def chance(self, name: str) -> float | None:
        """What guessing scores under a name of `compute`: k of the classes, or k of the pictures; None for geometry."""
        if name.startswith("linear_probe"):
            return self.probe_chance
        start, _, k = name.rpartition("_")
        if not k.lstrip("topr").isdigit():
            return None
        among = self.num_samples
        if start in ("zero_shot", "all_classes"):
            among = len(self.present) if start == "zero_shot" and self.present is not None else len(self.prompts)
        return min(1.0, int(k.lstrip("topr")) / among)

    def protocol(self) -> str:
        """How the figures of this set are counted, in words."""
        parts = []
        if self.zero_shot is not None:
            among = f"{len(self.present)} classes that occur" if self.present is not None else "all classes"
            parts.append(f"zero-shot: {self.prompts.shape[1]} templates, among {among} of {len(self.prompts)}")
        if self.retrieval is not None:
            parts.append("retrieval: ties against the model; one_caption_ keeps the first caption of a picture")
        if self.probe is not None:
            parts.append(f"{self.probe.settings}")
        return "; ".join(parts)


def probe_average(values: dict[str, float], prefix: str) -> dict[str, float]:
    """The plain mean over the ten sets of Table 3, if all are there."""
    found = {}
    for metric in ("linear_probe", "linear_probe_lbfgs"):
        probes = [values.get(f"{prefix}/{name}/{metric}") for name in PROBE_AVERAGE]
        if None not in probes:
            found[f"{prefix}/average/{metric}"] = sum(probes) / len(probes)
    return found
