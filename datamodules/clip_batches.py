"""Data sets that turn draws into batches, one for each stage of Diff-Foley."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from datamodules.clip_reader import ClipReader
from datamodules.loading import Draw
from datamodules.sources import UnusableSample, substitute
from datamodules.video_audio_windows import (
    Part,
    contrast_starts,
    shifted_window,
    single_window,
    split_and_merge,
    window_at,
)
from mmtrain.audio import preset
from mmtrain.config_errors import UserError
from mmtrain.video_audio import Clip, ClipFormat

SUBSTITUTES = 64  # others tried in place of a training clip that cannot be used
TRUE, SHIFTED, WRONG = 0, 1, 2  # kinds of pairs
PARTNER_SEED = 0  # of the clips that stand for another one in evaluation: the same for all stages and runs
EVALUATED_KINDS = (TRUE, TRUE, SHIFTED, WRONG)  # every clip is evaluated as each of them


class ClipBatches(torch.utils.data.Dataset):
    """Reads the clips of a batch and puts the items that a subclass makes of them together.

    In training a clip that cannot be used is replaced by the next usable one, so that batches stay equal; in evaluation
    it is left out. Either is counted by reason under "skipped".

    Args:
        reader: where clips come from.
        training: draw what an item is cut from with the generator of its draw; else it is always the same.
    """

    items_per_clip = 1

    def __init__(self, reader: ClipReader, training: bool) -> None:
        self.reader, self.training, self.format = reader, training, reader.format

    def __len__(self) -> int:
        return len(self.reader) * (1 if self.training else self.items_per_clip)

    def item(self, draw: Draw, clip: Clip) -> dict[str, Any]:
        """One item: arrays, which are stacked, numbers, and what stays a list: strings and tensors."""
        raise NotImplementedError

    def __getitem__(self, draws: list[Draw]) -> dict[str, Any]:
        skipped: Counter[str] = Counter()
        clips = self.reader.read([self._clip_of(draw) for draw in draws])
        items = [self._load(draw, clip, skipped) for draw, clip in zip(draws, clips, strict=True)]
        items = [item for item in items if item is not None]
        return (collate(items) if items else {}) | {"skipped": dict(skipped)}

    def _clip_of(self, draw: Draw) -> int:
        return draw.sample if self.training else draw.sample // self.items_per_clip

    def _load(self, draw: Draw, clip: Clip | UnusableSample, skipped: Counter) -> dict[str, Any] | None:
        number, starts = self._clip_of(draw), self.reader.source.shard_starts
        for _ in range(SUBSTITUTES + 1):
            try:
                if isinstance(clip, UnusableSample):
                    raise clip
                return self.item(draw, clip)
            except UnusableSample as error:
                problem = error
            skipped[problem.reason] += 1
            if not self.training:
                return None
            number = substitute(number, problem.reason, starts, len(self.reader))
            (clip,) = self.reader.read([number])
        place, last = self.reader.source.place, f"; the last: {problem.detail}" if problem.detail else ""
        raise UserError(f"{place}: {SUBSTITUTES + 1} clips in a row cannot be used: {dict(skipped)}{last}")


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One batch; keys that not all items have are left out."""
    batch: dict[str, Any] = {}
    for key, value in items[0].items():
        column = [item[key] for item in items if key in item]
        if len(column) < len(items):
            continue
        if isinstance(value, np.ndarray):
            batch[key] = torch.from_numpy(np.stack(column))
        elif isinstance(value, (int, float)):
            batch[key] = torch.tensor(column, dtype=torch.int64 if isinstance(value, int) else torch.float32)
        else:
            batch[key] = column
    return batch


def partners(num: int, seed: int = PARTNER_SEED) -> np.ndarray:
    """Another clip for every one of `num` clips, int64 [num]: each is taken once, none stands for itself.

    All are one random cycle, so that from a clip that cannot be used its own partner leads on to all others.

    Example:
        >>> partners(3).tolist() in ([1, 2, 0], [2, 0, 1])
        True
    """
    order = np.random.default_rng(seed).permutation(num)
    chosen = np.empty(num, np.int64)
    chosen[order] = np.roll(order, -1)
    return chosen


class ContrastBatches(ClipBatches):
    """{"video": uint8 [B, clips, T, 3, H, W], "mel": [B, clips, C, F], "id"}; in evaluation one centred item a clip,
    without the axis of the clips.
    """

    def __init__(self, reader: ClipReader, training: bool, clips: int = 3) -> None:
        super().__init__(reader, training)
        self.clips = clips

    def item(self, draw: Draw, clip: Clip) -> dict[str, Any]:
        if self.training:
            cut = [self._cut(clip, s) for s in contrast_starts(self.format, self.clips, draw.generator())]
            video, mel = (np.stack(parts) for parts in zip(*cut, strict=True))
        else:
            video, mel = self._cut(clip, (self.format.frames - self.format.contrast_frames) // 2)
        return {"video": video, "mel": mel, "id": draw.sample}

    def _cut(self, clip: Clip, start: int) -> tuple[np.ndarray, np.ndarray]:
        frames, per_frame = self.format.contrast_frames, self.format.mel_per_frame
        mel = clip.mel[:, start * per_frame : (start + frames) * per_frame]
        return clip.frames[start : start + frames], mel


class WindowBatches(ClipBatches):
    """{"mel": [B, C, F], "features": [B, T, D], "id"}, where the reader has features; see `evaluation_item`.

    Args:
        split_merge: share of items that two clips make together.
        aligned: see `datamodules.video_audio_windows.single_window`.
        min_shift_seconds: least distance of the shifted features of an evaluation item.
    """

    def __init__(
        self,
        reader: ClipReader,
        training: bool,
        split_merge: float = 0.5,
        aligned: bool = True,
        min_shift_seconds: float = 0.5,
    ) -> None:
        super().__init__(reader, training)
        self.split_merge, self.aligned, self.min_shift_seconds = split_merge, aligned, min_shift_seconds
        self.with_features = "features" in reader.fields
        self.partners = None if training else partners(len(reader))

    def item(self, draw: Draw, clip: Clip) -> dict[str, Any]:
        if self.training:
            return self.drawn_window(clip, draw.generator()) | {"id": draw.sample}
        return self.evaluation_item(draw, clip)

    def drawn_window(self, clip: Clip, generator: np.random.Generator) -> dict[str, np.ndarray]:
        """A window of the clip, or of parts of it and of another one."""
        if generator.random() >= self.split_merge:
            return self.cut(clip, single_window(self.format, generator, self.aligned))
        (other,) = self.reader.read([int(generator.integers(len(self.reader)))])
        if isinstance(other, UnusableSample):
            raise other
        parts = split_and_merge(self.format, generator, self.aligned)
        first, second = (self.cut(c, part) for c, part in zip((clip, other), parts, strict=True))
        axes = {"mel": 1, "features": 0}
        return {key: np.concatenate([first[key], second[key]], axis=axes[key]) for key in first}

    def cut(self, clip: Clip, part: Part) -> dict[str, np.ndarray]:
        """A run of the spectrogram, and of the features where there are some."""
        window = {"mel": clip.mel[:, part.mel_start : part.mel_start + part.mel_frames]}
        if self.with_features:
            window["features"] = clip.features[part.feature_start : part.feature_start + part.features]
        return window

    def evaluation_item(self, draw: Draw, clip: Clip) -> dict[str, Any]:
        """The first window of a clip, with its sound "audio" [N], "name", "label" and "onsets" (seconds) where known.

        "clip_features" are of all its frames, "shifted_features" of another time of it. "wrong_features", "other_mel"
        and, where there is sound, "other_audio" are of the first window of another clip, the same one for the same set,
        see `partners`: the sound that a test with `audio: random` plays. A set of one clip has none of these.
        """
        item: dict[str, Any] = self.cut(clip, window_at(self.format, 0)) | {"id": draw.sample, "name": clip.id}
        if clip.audio is not None:
            item["audio"] = clip.audio[: self.format.window_samples]
        if clip.label is not None:
            item["label"] = int(clip.label)
        if clip.onsets is not None:
            inside = [t for t in clip.onsets if t < self.format.window_seconds]
            item["onsets"] = torch.tensor(inside, dtype=torch.float32)
        if self.with_features:
            item["clip_features"] = clip.features
            item["shifted_features"] = self.shifted(clip, draw.generator(), start=0)["features"]
        if len(self.reader) > 1:
            other = self.partner(self._clip_of(draw))
            window = self.cut(other, window_at(self.format, 0))
            item["other_mel"] = window["mel"]
            if self.with_features:
                item["wrong_features"] = window["features"]
            if other.audio is not None:
                item["other_audio"] = other.audio[: self.format.window_samples]
        return item

    def partner(self, sample: int) -> Clip:
        """The clip that stands for another one in evaluation: the next usable one from `sample` on, see `partners`."""
        other = int(self.partners[sample])
        while other != sample:
            (clip,) = self.reader.read([other])
            if isinstance(clip, Clip):
                return clip
            other = int(self.partners[other])
        raise UserError(f"{self.reader.source.place}: only one of its {len(self.reader)} clips can be used")

    def shifted(self, clip: Clip, generator: np.random.Generator, start: int | None = None) -> dict[str, np.ndarray]:
        """A window with features of another time of the clip."""
        part, feature, rotation = shifted_window(self.format, generator, self.min_shift_seconds, start)
        window = self.cut(clip, part)
        features = clip.features[feature : feature + self.format.window_frames]
        return window | {"features": np.roll(features, rotation, axis=0)}

    def other_features(self, sample: int, generator: np.random.Generator) -> np.ndarray:
        """Features [T, D] of a drawn window of another clip; which one is drawn in training only."""
        if len(self.reader) < 2:
            raise UserError(f"{self.reader.source.place}: wrong pairs want two clips, there is one")
        if self.training:
            features = self.reader.features((sample + int(generator.integers(1, len(self.reader)))) % len(self.reader))
        else:
            features = self.partner(sample).features
        if isinstance(features, UnusableSample):
            raise features
        start = single_window(self.format, generator).feature_start
        return features[start : start + self.format.window_frames]


class PairBatches(WindowBatches):
    """{"mel", "features", "match": float [B], "kind": int64 [B] (0 true, 1 shifted, 2 wrong), "id"}.

    In evaluation every clip comes four times, twice as a true pair, so that half of the pairs match.

    Args:
        proportions: of true, shifted and wrong pairs in training.
    """

    items_per_clip = len(EVALUATED_KINDS)

    def __init__(
        self,
        reader: ClipReader,
        training: bool,
        proportions: Sequence[float] = (0.5, 0.25, 0.25),
        min_shift_seconds: float = 0.5,
        split_merge: float = 0.0,
        aligned: bool = True,
    ) -> None:
        super().__init__(reader, training, split_merge, aligned, min_shift_seconds)
        self.edges = np.cumsum(proportions) / np.sum(proportions)

    def item(self, draw: Draw, clip: Clip) -> dict[str, Any]:
        generator = draw.generator()
        if self.training:
            kind = int(np.searchsorted(self.edges, generator.random(), side="right"))
        else:
            kind = EVALUATED_KINDS[draw.sample % len(EVALUATED_KINDS)]
        if kind == SHIFTED:
            window = self.shifted(clip, generator)
        elif kind == TRUE and self.training:
            window = self.drawn_window(clip, generator)
        else:
            window = self.cut(clip, single_window(self.format, generator, self.aligned))
        if kind == WRONG:
            window["features"] = self.other_features(self._clip_of(draw), generator)
        return window | {"match": float(kind == TRUE), "kind": kind, "id": draw.sample}


class SoundClassBatches(ClipBatches):
    """{"mel": [B, C, F] of a window, in evaluation of the first, "label", "id"}."""

    def item(self, draw: Draw, clip: Clip) -> dict[str, Any]:
        if clip.label is None:
            raise UnusableSample("without_label")
        frames = window_frames(self.format, self.reader.mel)
        start = int(draw.generator().integers(clip.mel.shape[1] - frames, endpoint=True)) if self.training else 0
        return {"mel": clip.mel[:, start : start + frames], "label": int(clip.label), "id": draw.sample}


def window_frames(clip_format: ClipFormat, name: str) -> int:
    """Mel frames of a preset that fall on one window."""
    chosen = preset(name)
    whole = round(clip_format.seconds * chosen.sample_rate)
    return min(-(-whole // chosen.hop), round(clip_format.window_seconds * chosen.sample_rate) // chosen.hop)
