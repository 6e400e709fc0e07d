"""From drawn pictures to DINO-I, CLIP-I, CLIP-T, F-Acc and C-F1 of the paper's table (arXiv 2412.07375).

The paper does not tell its backbones, preprocessing, number of seeds or classifier: all of them are given by the user
and told with the numbers. What is not given is not measured, and said to be missing. B pictures, K characters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.config_errors import UserError
from mmtrain.metrics.characters import (
    CharacterF1,
    FrameAccuracy,
    OrderKept,
    decisions,
    frames_right,
    order_kept,
)
from mmtrain.metrics.similarity import ImageFeatures, ImageTextFeatures, ReferenceSimilarity, TextSimilarity, cosines
from mmtrain.story import Frame, World
from mmtrain.storyweaver.recogniser import Recogniser, load_recogniser
from mmtrain.storyweaver.sampling import story_seeds

BY_RECOGNISER = ("f_acc", "c_f1", "c_f1_macro", "order_kept")
NOT_GIVEN = {  # metrics -> what they need
    ("dino_i",): "image_features: is not set, e.g. mmtrain.storyweaver.features.DinoFeatures",
    ("clip_i", "clip_t", "clip_t_full"): "image_text_features: is not set, e.g. mmtrain.storyweaver.features."
    "OpenClipFeatures, or mmtrain.rankclip.features.ClipFeatures for a CLIP of ours",
    BY_RECOGNISER: "test.recogniser: is not set; give a checkpoint of CharacterClassifier",
}


@dataclass
class StoryTestSettings:
    """What `test` measures and keeps.

    Args:
        seeds: pictures a line, drawn with the first so many seeds of `story_seeds`; the paper does not tell its number.
        skip_seeds: leave out the first so many of them: other noise for a repetition.
        recogniser: checkpoint of a `CharacterClassifier` of the same world, for F-Acc and C-F1; None leaves them out.
        min_accuracy: F-Acc that the recogniser must have reached on held-out real pictures, in [0, 1]; 0 takes any.
        most_references: real pictures of a character to compare with, the first so many; None takes all.
        reuse: take pictures that an interrupted test drew with the same weights and options from disk.
        sheet_pictures: at most so many on a set's contact sheet; 0 for none.

    Raises:
        UserError: a value out of range.
    """

    seeds: int = 1
    skip_seeds: int = 0
    recogniser: str | None = None
    min_accuracy: float = 0.7
    most_references: int | None = None
    reuse: bool = True
    sheet_pictures: int = 24

    def __post_init__(self) -> None:
        try:
            story_seeds(self.seeds + max(0, self.skip_seeds))
        except UserError as error:
            raise UserError(f"test.{error}") from error
        if not 0 <= self.min_accuracy <= 1:
            raise UserError(f"test.min_accuracy: {self.min_accuracy}, must be in [0, 1]")
        if self.most_references is not None and self.most_references < 1:
            raise UserError(f"test.most_references: {self.most_references}, must be at least 1, or null for all")
        if self.skip_seeds < 0:
            raise UserError(f"test.skip_seeds: {self.skip_seeds}, must be 0 or more")
        if self.sheet_pictures < 0:
            raise UserError(f"test.sheet_pictures: {self.sheet_pictures}, must be 0 or more")


def checked_recogniser(settings: StoryTestSettings, world: World) -> Recogniser | None:
    """The recogniser that the settings name; None if they name none.

    Raises:
        UserError: it knows other characters, or is not good enough on real pictures for its word to mean anything.
    """
    if settings.recogniser is None:
        return None
    where = f"test.recogniser: {settings.recogniser}"
    recogniser = load_recogniser(settings.recogniser, "test.recogniser")
    if set(recogniser.names) != set(world.names):
        raise UserError(f"{where}: knows {', '.join(recogniser.names)}; the data are of {', '.join(world.names)}")
    accuracy = recogniser.held_out_accuracy
    if settings.min_accuracy > 0 and (accuracy is None or not accuracy >= settings.min_accuracy):
        reached = "was never measured" if accuracy is None else f"is {accuracy:.3f}"
        raise UserError(
            f"{where}: its F-Acc on held-out real pictures {reached}, below test.min_accuracy "
            f"{settings.min_accuracy:g}, so what it says of generated ones means little: train it longer or on a "
            "pretrained backbone (architecture: efficientnet_lite0), or give test.min_accuracy 0 to use it anyway"
        )
    return recogniser


def reference_features(
    network: ImageFeatures, references: Mapping[str, Sequence[Tensor]], device: torch.device
) -> dict[str, Tensor]:
    """Features [R, D] of the real pictures of each character, those of one size together.

    Args:
        references: uint8 [3, h, w] of any sizes, by name.
    """
    found = {}
    for name, pictures in references.items():
        parts = [
            network.image_features(torch.stack(list(same)).to(device)).float()
            for _, same in groupby(pictures, key=lambda picture: picture.shape)
        ]
        if parts:
            found[name] = torch.cat(parts)
    return found


def presence(frames: Sequence[Frame], names: Sequence[str]) -> Tensor:
    """Which characters frames ask for, float32 [B, K] of 0 and 1."""
    return torch.tensor([[float(name in frame.names) for name in names] for frame in frames]).view(-1, len(names))


class StoryEvaluation(nn.Module):
    """Metrics of drawn pictures over all processes; a (line, seed) counts once.

    Args:
        world: whose characters are looked for.
        image_features: for `dino_i`.
        image_text_features: for `clip_i`, `clip_t`, `clip_t_full`.
        recogniser: for `f_acc`, `c_f1`, `c_f1_macro`, `order_kept`.
        references: features of the real pictures, by the name of the network ("image_features",
            "image_text_features"), then by character, see `reference_features`; without those of a network its
            `dino_i` or `clip_i` is missing.
        seed: of the bootstrap intervals.
    """

    def __init__(
        self,
        world: World,
        image_features: ImageFeatures | None = None,
        image_text_features: ImageTextFeatures | None = None,
        recogniser: Recogniser | None = None,
        references: Mapping[str, Mapping[str, Tensor]] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.names, references = world.names, references or {}
        # lists, so that the networks are no parts of this one
        self.lent = [image_features, image_text_features, recogniser]
        self.metrics, self.missing = nn.ModuleDict(), {}
        for metrics, given, words in zip(NOT_GIVEN, self.lent, NOT_GIVEN.values(), strict=True):
            if given is None:
                self.missing |= dict.fromkeys(metrics, words)
        self.known: dict[str, list[str]] = {}  # characters with references
        for name, source, network in (
            ("dino_i", "image_features", image_features),
            ("clip_i", "image_text_features", image_text_features),
        ):
            own = {key: value for key, value in references.get(source, {}).items() if key in self.names}
            if network is not None and own:
                self.metrics[name], self.known[name] = ReferenceSimilarity(own, seed), list(own)
                if lacking := [key for key in self.names if key not in own]:
                    self.missing[f"{name} of {', '.join(lacking)}"] = "the data have no pictures of them alone"
            elif network is not None:
                self.missing[name] = "the data have no pictures of single characters"
        if image_text_features is not None:
            self.metrics["clip_t"], self.metrics["clip_t_full"] = TextSimilarity(seed), TextSimilarity(seed)
        if recogniser is not None:
            self.metrics["f_acc"], self.metrics["order_kept"] = FrameAccuracy(), OrderKept()
            self.metrics["c_f1"], self.metrics["c_f1_macro"] = CharacterF1("micro"), CharacterF1("macro")
            self.order = [recogniser.names.index(name) for name in self.names]

    @torch.no_grad()
    def add(self, frames: Sequence[Frame], pictures: Tensor, ids: Tensor, sample: int) -> list[dict[str, Any]]:
        """Add one picture of each frame.

        Args:
            frames: B.
            pictures: uint8 [B, 3, H, W].
            ids: int64 [B], of the lines.
            sample: which of the seeds.

        Returns:
            The scores of each picture, see `mmtrain.storyweaver.records`.
        """
        image_features, image_text_features, recogniser = self.lent
        scores: list[dict[str, Any]] = [{} for _ in frames]
        with torch.autocast(pictures.device.type, enabled=False):
            if image_features is not None and "dino_i" in self.metrics:
                self._compare("dino_i", image_features.image_features(pictures), frames, ids, sample, scores)
            if image_text_features is not None:
                features = image_text_features.image_features(pictures)
                if "clip_i" in self.metrics:
                    self._compare("clip_i", features, frames, ids, sample, scores)
                for name, texts in (("clip_t", [f.event for f in frames]), ("clip_t_full", [f.prompt for f in frames])):
                    words = image_text_features.text_features(texts).to(features.device)
                    self.metrics[name].update(features, words, ids, sample)
                    _put(scores, name, cosines(features, words))
            if recogniser is not None:
                self._recognise(recogniser, frames, pictures, ids, sample, scores)
        return scores

    def _compare(
        self, name: str, features: Tensor, frames: Sequence[Frame], ids: Tensor, sample: int, scores: list[dict]
    ) -> None:
        metric: ReferenceSimilarity = self.metrics[name]
        present = presence(frames, self.known[name]).to(features.device)
        metric.update(features, present, ids, sample)
        found = (metric.of(features) * present).sum(dim=1) / present.sum(dim=1)  # nan where no character is known
        _put(scores, name, found)

    def _recognise(
        self,
        recogniser: Recogniser,
        frames: Sequence[Frame],
        pictures: Tensor,
        ids: Tensor,
        sample: int,
        scores: list[dict],
    ) -> None:
        present = presence(frames, self.names).to(pictures.device)
        probabilities = recogniser.probabilities(pictures)[:, self.order]
        for name in ("f_acc", "c_f1", "c_f1_macro"):
            self.metrics[name].update(probabilities, present, ids, sample)
        _put(scores, "f_acc", frames_right(probabilities, present).float())
        for score, seen in zip(scores, decisions(probabilities).tolist(), strict=True):
            score["predicted"] = [name for name, is_seen in zip(self.names, seen, strict=True) if is_seen]
        pairs = [row for row, frame in enumerate(frames) if len(frame.names) == 2]
        left = right = probabilities[:0]
        if pairs:
            left, right = (half[:, self.order] for half in recogniser.halves(pictures[pairs]))
        tags = [[self.names.index(name) for name in frames[row].names] for row in pairs]
        first, second = torch.tensor(tags, dtype=torch.int64).view(-1, 2).T.to(left.device)
        self.metrics["order_kept"].update(left, right, first, second, ids[pairs], sample)
        _put([scores[row] for row in pairs], "order_kept", order_kept(left, right, first, second).float())

    def compute(self) -> dict[str, float]:
        """The metrics without a prefix; every process must call it.

        Cosines `dino_i`, `clip_i`, `clip_t` (event sentence), `clip_t_full` (whole prompt); fractions `f_acc`, of
        lines with one character `f_acc_single` and with two or more `f_acc_two`, `c_f1` (micro), `c_f1_macro`,
        `order_kept`. With `_low` and `_high`, the bounds of 95 % intervals over lines. What has no lines is left out.
        """
        found: dict[str, float] = {}
        for name, metric in self.metrics.items():
            for key, value in metric.compute().items():
                inside = next((word for word in ("similarity", "f1") if key.startswith(word)), None)
                found[key if inside is None else name + key.removeprefix(inside)] = float(value)
        empty = [key for key in ("f_acc_single", "f_acc_two", "order_kept") if math.isnan(found.get(key, 0.0))]
        return {key: value for key, value in found.items() if not key.startswith(tuple(empty) or ("\0",))}

    def protocol(self) -> str:
        """What measured, in words."""
        image_features, image_text_features, recogniser = self.lent
        words = []
        pairs = "every pair of a drawn and a real picture of a character, mean over pairs, then over characters"
        if "dino_i" in self.metrics:
            words.append(f"DINO-I: {image_features.name}; {pairs}")
        if image_text_features is not None:
            words.append(
                f"CLIP-I{' (as DINO-I)' if 'dino_i' in self.metrics else f' ({pairs})'} and CLIP-T: "
                f"{image_text_features.name}; CLIP-T of the event sentence, clip_t_full of the whole prompt, as far as "
                "the context goes; cosines, not x 100"
            )
        if recogniser is not None:
            words.append(f"{recogniser.describe()}; threshold 0.5; C-F1 micro; order_kept is ours, not the paper's")
        return "; ".join(words)


def _put(scores: Sequence[dict[str, Any]], name: str, values: Tensor) -> None:
    """Write values [B] into the pictures' scores; what is not a number becomes None, which JSON has."""
    for score, value in zip(scores, values.tolist(), strict=True):
        score[name] = value if math.isfinite(value) else None
