"""Whole clips: spectrograms of a chosen preset with the features of all frames, for models without windows."""

from typing import Any

import torch

from datamodules.clip_batches import ClipBatches
from datamodules.loading import Draw
from datamodules.video_audio import LatentDataModule
from datamodules.video_audio_sources import VideoAudioSource
from mmtrain.audio import preset
from mmtrain.video_audio import Clip, ClipFormat


class WholeClipBatches(ClipBatches):
    """{"mel": [B, C, F], "id"}, "features" [B, T, D] where the reader has them, all of the whole clip.

    In evaluation also "name", and where known the sound "audio" [B, N], "label" and "onsets" in seconds.
    """

    def item(self, draw: Draw, clip: Clip) -> dict[str, Any]:
        item: dict[str, Any] = {"mel": clip.mel, "id": draw.sample}
        if "features" in self.reader.fields:
            item["features"] = clip.features
        if self.training:
            return item
        item["name"] = clip.id
        if clip.audio is not None:
            item["audio"] = clip.audio
        if clip.label is not None:
            item["label"] = int(clip.label)
        if clip.onsets is not None:
            item["onsets"] = torch.tensor(clip.onsets, dtype=torch.float32)
        return item


class WholeClipDataModule(LatentDataModule):
    """Whole clips; batches as of `WholeClipBatches`.

    Args:
        path: see `LatentDataModule`, as for the rest; its settings of windows have no meaning here.
        mel: preset of the spectrograms, see `mmtrain.audio`.

    Raises:
        UserError: no such preset.
    """

    def __init__(self, path: str, format: ClipFormat | None = None, mel: str = "mel_specvqgan", **common: Any) -> None:
        preset(mel)  # is there such a one?
        super().__init__(path, format, **common)
        self.mel = mel

    def _dataset(self, source: VideoAudioSource, training: bool) -> ClipBatches:
        fields = {"features"} if self.with_features else set()
        if not training and "audio" in source.fields:
            fields.add("audio")
        return WholeClipBatches(self._reader(source, fields, self.mel), training)
