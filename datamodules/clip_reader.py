"""Clips of one length with the spectrograms of one preset, from any source, if wished all kept in memory."""

import math
from collections.abc import Collection, Sequence

import numpy as np
import torch

from datamodules.sources import UnusableSample
from datamodules.video_audio_sources import VideoAudioSource
from mmtrain.audio import check_rate, clip_spectrogram, preset, resample
from mmtrain.config_errors import UserError
from mmtrain.video_audio import Clip, ClipFormat


class PartOfSource:
    """Some clips of a source, by their positions."""

    def __init__(self, source: VideoAudioSource, positions: np.ndarray) -> None:
        self.source, self.positions = source, np.asarray(positions, np.int64)
        self.fields, self.mel_preset, self.place = source.fields, source.mel_preset, source.place
        self.class_names, self.warnings = source.class_names, source.warnings
        starts = source.shard_starts
        self.shard_starts = None if starts is None else np.searchsorted(self.positions, starts)
        self.counts = {**source.counts, "samples": len(self.positions), "part_of": len(source)}

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, samples: Sequence[int], fields: Collection[str]) -> list[Clip | UnusableSample]:
        return self.source.read(self.positions[np.asarray(samples, np.int64)], fields)


class ClipReader:
    """Reads clips, each brought to the length of `clip_format`.

    A clip that is shorter by less than a video frame is padded: silence, the last frame, the last feature. One that is
    shorter is repeated from its beginning, picture and sound by the same time.

    Args:
        source: where clips come from.
        clip_format: lengths.
        fields: which of frames, audio, features the clips shall have.
        mel: preset of the spectrogram that they shall have, taken from the source where it has that one, else computed
            of the sound; None for none.
        cache: keep every clip that was read, decoded, in the memory of this process.

    Raises:
        UserError: the source does not have what is wanted.
    """

    def __init__(
        self,
        source: VideoAudioSource,
        clip_format: ClipFormat,
        fields: Collection[str] = (),
        mel: str | None = None,
        cache: bool = False,
    ) -> None:
        self.source, self.format, self.mel, self.cached = source, clip_format, mel, cache
        self.fields = frozenset(fields)
        self._kept: dict[int, Clip | UnusableSample] = {}
        wanted = set(fields)
        if mel is not None:
            wanted.add("mel" if source.mel_preset == mel else "audio")
            if not wanted <= source.fields and source.mel_preset not in (None, mel) and "audio" not in source.fields:
                raise UserError(
                    f"{source.place}: has spectrograms of {source.mel_preset} and no sound; this stage needs {mel} "
                    "(the first stage has 250 samples between frames, the diffusion model 256)"
                )
            if "mel" not in wanted and preset(mel).sample_rate == 16000:
                check_rate(clip_format.sample_rate, preset(mel), "format.sample_rate")
        if missing := sorted(wanted - source.fields):
            hint = ": give data.features, which makes them" if "features" in missing else ""
            raise UserError(f"{source.place}: its clips have no {' and no '.join(missing)}{hint}")
        self._wanted = frozenset(wanted)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, samples: Sequence[int]) -> list[Clip | UnusableSample]:
        """The clips, or for each that cannot be used the reason."""
        samples = [int(s) for s in samples]
        new = [s for s in dict.fromkeys(samples) if s not in self._kept]
        found = dict(zip(new, self._load(new), strict=True)) if new else {}
        if self.cached:
            self._kept |= found
        return [self._kept[s] if s in self._kept else found[s] for s in samples]

    def features(self, sample: int) -> np.ndarray | UnusableSample:
        """float32 [T, D] of one clip; reads nothing else of it."""
        if sample in self._kept:
            clip = self._kept[sample]
        else:
            (clip,) = self.source.read([sample], {"features"})
        if isinstance(clip, UnusableSample):
            return clip
        return resize_first(clip.features, self.format.frames)

    def _load(self, samples: Sequence[int]) -> list[Clip | UnusableSample]:
        clips = self.source.read(samples, self._wanted)
        for position, clip in enumerate(clips):
            if isinstance(clip, Clip):
                try:
                    fit_length(clip, self.format)
                except UnusableSample as problem:
                    clips[position] = problem
        usable = [clip for clip in clips if isinstance(clip, Clip)]
        if self.mel is not None and usable:
            if "mel" in self._wanted:
                length = -(-self._rate_samples() // preset(self.mel).hop)
                for clip in usable:
                    clip.mel = resize_first(clip.mel.T, length, tile=True).T
            else:
                self._add_mels(usable)
        return clips

    def _rate_samples(self) -> int:
        return round(self.format.seconds * preset(self.mel).sample_rate)

    def _add_mels(self, clips: list[Clip]) -> None:
        chosen = preset(self.mel)
        waveforms = torch.from_numpy(np.stack([clip.audio for clip in clips]))
        if chosen.sample_rate != self.format.sample_rate:
            waveforms = resample(waveforms, self.format.sample_rate, chosen.sample_rate)
        for clip, mel in zip(clips, clip_spectrogram(waveforms, chosen, self.format.seconds), strict=True):
            clip.mel = mel.numpy().copy() if self.cached else mel.numpy()
            if "audio" not in self.fields:
                clip.audio = None


def fit_length(clip: Clip, clip_format: ClipFormat) -> None:
    """Bring frames, features and sound of a clip to the format's length, in place; the spectrogram is left.

    Raises:
        UnusableSample: there is no frame, or less sound than one frame lasts.
    """
    seconds = [len(a) / clip_format.fps for a in (clip.frames, clip.features) if a is not None]
    if clip.audio is not None:
        seconds.append(len(clip.audio) / clip_format.sample_rate)
    frame = 1 / clip_format.fps
    if not seconds:
        return
    if min(seconds) < frame:
        raise UnusableSample("too_short")
    # whole frames that both have, where one lacks a frame or more
    frames = min(math.ceil(min(seconds) * clip_format.fps - 0.01), clip_format.frames)
    samples = round(frames * frame * clip_format.sample_rate)
    if clip.frames is not None:
        clip.frames = resize_first(resize_first(clip.frames, frames), clip_format.frames, tile=True)
    if clip.features is not None:
        clip.features = resize_first(resize_first(clip.features, frames), clip_format.frames, tile=True)
    if clip.audio is not None:
        audio = clip.audio
        if frames < clip_format.frames:
            audio = audio[:samples]
            audio = np.pad(audio, (0, samples - len(audio)))
            clip.audio = resize_first(audio, clip_format.samples, tile=True)
        else:
            audio = audio[: clip_format.samples]
            clip.audio = np.pad(audio, (0, clip_format.samples - len(audio)))
        if clip.onsets is not None and frames < clip_format.frames:
            clip.onsets = _repeated_onsets(clip.onsets, frames * frame, clip_format.seconds)


def _repeated_onsets(onsets: Sequence[float], period: float, seconds: float) -> list[float]:
    times = [t + turn * period for turn in range(int(seconds / period) + 1) for t in onsets if t < period]
    return [t for t in times if t < seconds]


def resize_first(array: np.ndarray, length: int, tile: bool = False) -> np.ndarray:
    """Cut the first axis to `length`, or lengthen it: by the last entry, or from its beginning with `tile`.

    Example:
        >>> resize_first(np.array([1, 2, 3]), 5, tile=True).tolist(), resize_first(np.array([1, 2, 3]), 5).tolist()
        ([1, 2, 3, 1, 2], [1, 2, 3, 3, 3])
    """
    if len(array) >= length:
        return array[:length]
    places = np.arange(length)
    return array[places % len(array) if tile else np.minimum(places, len(array) - 1)]
