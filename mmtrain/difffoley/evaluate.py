"""From generated sounds to the numbers of Diff-Foley's main table (arXiv 2306.17203), figures and words.

Sounds are scored on the features of a classifier (IS, FID, KL), by an alignment classifier (Align Acc with what puts it
into proportion), by the times of their onsets, and by the time that each part took.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from mmtrain.audio import official_conversion, preset, resample, spectrogram
from mmtrain.config_errors import UserError
from mmtrain.difffoley.alignment import load_alignment
from mmtrain.difffoley.figures import draw_alignment, draw_onset_scores
from mmtrain.difffoley.sound_classifier import load_feature_network
from mmtrain.distributed import world_size
from mmtrain.feature_cache import fingerprint
from mmtrain.metrics.generation import MAX_SAMPLES, AlignmentAccuracy, GeneratedSounds, clip_means, with_bounds
from mmtrain.metrics.intervals import score_interval
from mmtrain.metrics.latency import InferenceLatency, device_name
from mmtrain.metrics.onsets import OnsetSynchrony
from mmtrain.video_audio import ClipFormat

PARTS = ("features", "diffusion", "decode", "inversion")  # of the time
WARM_UP = 3  # batches whose time is not counted

Audio = Literal["generated", "ground_truth", "random"]
Conversion = Literal["waveform", "official"]


@dataclass
class FoleyTestSettings:
    """What `test` measures.

    Args:
        audio: "generated"; or what proves the evaluators: "ground_truth", the clip's own sound, and "random", another
            clip's.
        samples: sounds a clip; the paper does not tell its number, SpecVQGAN's protocol has 10.
        sampling_seed: of the noise that sampling starts from.
        feature_network: sound classifier for IS, FID and KL: ours or the released melception; None leaves them out.
        alignment_classifier: trained with `noisy: false`; None leaves Align Acc out.
        spec_conversion: "waveform" takes the spectrogram of the generated sound; "official" converts the generated
            spectrogram as the released code does, with its faults (see `mmtrain.audio.official_conversion`). Their
            numbers cannot be compared. Real sound is cut to the same window, where the released evaluation takes 848
            frames of the whole clip against 706 generated ones.
        examples: clips whose sound and pictures are kept.
    """

    audio: Audio = "generated"
    samples: int = 1
    sampling_seed: int = 0
    feature_network: str | None = None
    alignment_classifier: str | None = None
    spec_conversion: Conversion = "waveform"
    examples: int = 6

    def __post_init__(self) -> None:
        for name, kind in (("audio", Audio), ("spec_conversion", Conversion)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise UserError(f"test.{name}: {value!r}, must be one of {', '.join(get_args(kind))}")
        if not 1 <= self.samples < MAX_SAMPLES:
            raise UserError(f"test.samples: {self.samples}, must be from 1 to {MAX_SAMPLES - 1}")
        if self.examples < 0:
            raise UserError(f"test.examples: {self.examples}, must be 0 or more")


class SampleOnsets(OnsetSynchrony):
    """Onset synchrony whose ids are id * 65536 + sample: samples of one clip are no independent trials."""

    def compute(self) -> dict[str, Tensor]:
        """As `OnsetSynchrony.compute`, the interval over clips."""
        found = super().compute()
        self.counted = self.clips()
        if len(self.counted["ids"]):
            by_clip = clip_means(torch.tensor(self.counted["f1"]), torch.tensor(self.counted["ids"]) // MAX_SAMPLES)
            found |= with_bounds("onset_f1", score_interval(by_clip, self.seed))
        return found


class FoleyEvaluation(nn.Module):
    """Metrics of generated sounds over all processes; a (clip, sample) counts once.

    Args:
        settings: what is measured; the networks that it names are loaded here.
        format: how the clips are cut; the alignment classifier must have the same.
        first_stage: of the model, to refuse an alignment classifier of other latents; None: not compared.
        inverter: how spectrograms become sound, for the protocol.
        feature_network, classifier: networks instead of those that the settings name.
        seed: of the bootstrap.

    Raises:
        UserError: a network's file is missing, or was made for other clips.
    """

    def __init__(
        self,
        settings: FoleyTestSettings,
        format: ClipFormat,
        first_stage: nn.Module | None = None,
        inverter: str = "non-negative least squares, Griffin-Lim 32 iterations",
        feature_network: nn.Module | None = None,
        classifier: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.settings, self.format, self.inverter = settings, format, inverter
        if feature_network is None and settings.feature_network:
            feature_network = load_feature_network(settings.feature_network, "test.feature_network")
        if classifier is None and settings.alignment_classifier:
            where = "test.alignment_classifier"
            classifier = load_alignment(settings.alignment_classifier, where, format, first_stage, noisy=False)
        self.feature_network, self.classifier = feature_network, classifier
        lacking = [
            f"test.{setting} is not set: {names} left out"
            for network, setting, names in (
                (feature_network, "feature_network", "inception_score, fid, kid and kl are"),
                (classifier, "alignment_classifier", "align_acc is"),
            )
            if network is None
        ]
        if lacking:
            rank_zero_warn("; ".join(lacking), category=UserWarning)
        self.metrics = nn.ModuleDict({"onsets": SampleOnsets(format.sample_rate, seed=seed)})
        if feature_network is not None:
            self.metrics["sounds"] = GeneratedSounds(seed)
        if classifier is not None:
            self.metrics["alignment"] = AlignmentAccuracy(seed)
        self.names: dict[int, str] = {}
        self.seconds: list[dict[str, float]] = []  # a clip, by part, of each batch of this process
        self.batch_size = self.largest_batch = 0  # of this process, of all
        self.all_names: dict[int, str] = {}  # of all processes, as `all_seconds`, after `compute`
        self.all_seconds: list[dict[str, float]] = []
        self._real: tuple[Tensor, dict[str, Tensor]] | None = None  # ids and outputs of the batch before

    @torch.no_grad()
    def add(
        self,
        batch: Mapping[str, Any],
        waveform: Tensor,
        mel: Tensor,
        seconds: Mapping[str, float] | None = None,
        sample: int = 0,
    ) -> None:
        """Add one sound for each clip of a batch.

        Args:
            batch: "id" int64 [B], "audio" [B, N] the clips' own sound, "mel" [B, C, F] of it, "features" [B, T, D]; if
                known "name" (B names) and "onsets" (B tensors of seconds, or None for a clip without), and for Align
                Acc "shifted_features", "wrong_features" [B, T, D].
            waveform: [B, N'] of the format's rate; what is longer, this or the clip's own sound, is cut.
            mel: [B, C, F] in [0, 1] of `mel_ldm`, from which the waveform was made.
            seconds: time of each of `PARTS` for the whole batch; those that are absent are not reported.
            sample: which of the samples of these clips.
        """
        if batch.get("audio") is None:
            raise UserError("data: the clips have no sound to compare with; give videos, or shards that hold it")
        if seconds and (unknown := seconds.keys() - set(PARTS)):
            raise ValueError(f"seconds must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
        ids = torch.as_tensor(batch["id"]).long().cpu()
        samples = min(waveform.shape[-1], batch["audio"].shape[-1])
        sound, real = waveform[..., :samples].float(), batch["audio"][..., :samples].float()
        names = batch.get("name") or [str(number) for number in ids.tolist()]
        self.names |= {number: name for number, name in zip(ids.tolist(), names, strict=True) if number >= 0}
        self._add_onsets(batch.get("onsets"), sound, real, ids, sample)
        with torch.autocast(sound.device.type, enabled=False):  # scores are of float32, whatever sampling ran in
            if self.feature_network is not None:
                self._add_features(sound, real, mel.float(), ids, sample)
            if self.classifier is not None:
                self._add_alignment(batch, mel.float(), ids, sample)
        self.batch_size = max(self.batch_size, len(ids))
        if seconds:
            self.seconds.append({part: value / len(ids) for part, value in seconds.items()})

    def _add_onsets(
        self, known: Sequence[Tensor | None] | None, sound: Tensor, real: Tensor, ids: Tensor, sample: int
    ) -> None:
        """Compare with the known times, or where there are none with those heard in the clip's own sound."""
        diverged = ~sound.isfinite().all(dim=-1)
        if diverged.any():
            rank_zero_warn(f"{int(diverged.sum())} generated sound(s) are not finite and count as silence")
            sound = sound.masked_fill(diverged[:, None], 0.0)
        keys = torch.where(ids >= 0, ids * MAX_SAMPLES + sample, ids)
        self.metrics["onsets"].update(sound, known or [None] * len(ids), keys, real)

    def _add_features(self, sound: Tensor, real: Tensor, mel: Tensor, ids: Tensor, sample: int) -> None:
        if self._real is None or not torch.equal(self._real[0], ids):  # else another sample of the same clips
            self._real = ids, self.feature_network(self._classifier_mel(real))
        official = self.settings.spec_conversion == "official"
        generated = official_conversion(mel.clamp(0, 1)) if official else self._classifier_mel(sound)
        self.metrics["sounds"].update(self.feature_network(generated), self._real[1], ids, sample)

    def _classifier_mel(self, waveform: Tensor) -> Tensor:
        """Spectrogram [B, 80, F] that sound classifiers take."""
        settings = preset("mel_specvqgan")
        return spectrogram(resample(waveform, self.format.sample_rate, settings.sample_rate), settings)

    def _add_alignment(self, batch: Mapping[str, Any], mel: Tensor, ids: Tensor, sample: int) -> None:
        first_stage, logits = self.classifier.first_stage, self.classifier.logits
        generated = logits(first_stage.encode(mel.clamp(0, 1), sample=False), batch["features"])
        own = first_stage.encode(batch["mel"], sample=False)
        real, shifted, wrong = (
            logits(own, batch[name]) if batch.get(name) is not None else None
            for name in ("features", "shifted_features", "wrong_features")
        )
        self.metrics["alignment"].update(generated, real, shifted, wrong, ids, sample)

    def compute(self) -> dict[str, float]:
        """Return the metrics without a prefix; every process must call it.

        With a feature network `inception_score`, `inception_score_std`, `fid`, `kid`, `kl`; with a classifier
        `align_acc`, `align_acc_shifted`, `align_acc_wrong`, `align_acc_real`; `onset_f1`, `onset_precision`,
        `onset_recall`, `onset_offset` in seconds; `seconds_PART`, medians over batches, and `seconds_per_clip`, their
        sum. `_low` and `_high` are the bounds of 95 % intervals over clips.
        """
        self._gather_names_and_times()
        found: dict[str, float] = {}
        for metric in self.metrics.values():
            found |= {key: float(value) for key, value in metric.compute().items()}
        return found | self._times()

    def _gather_names_and_times(self) -> None:
        kept = self.seconds[min(WARM_UP, len(self.seconds) - 1) :] if self.seconds else []
        mine = {"names": self.names, "seconds": kept, "batch_size": self.batch_size}
        everyone: list[Any] = [mine]
        if world_size() > 1:
            everyone = [None] * world_size()
            dist.all_gather_object(everyone, mine)
        self.all_names = dict(sorted({n: name for one in everyone for n, name in one["names"].items()}.items()))
        self.all_seconds = [times for one in everyone for times in one["seconds"]]
        self.largest_batch = max(one["batch_size"] for one in everyone)

    def _times(self) -> dict[str, float]:
        """Median seconds a clip of each part, over the batches that timed it, and their sum."""
        found = {}
        for part in PARTS:
            if values := [times[part] for times in self.all_seconds if part in times]:
                metric = InferenceLatency(warm_up=0, sync_on_compute=False)
                metric.update(torch.tensor(values))
                found[f"seconds_{part}"] = float(metric.compute()["p50"])
        return {"seconds_per_clip": sum(found.values())} | found if found else {}

    def ids(self) -> list[str]:
        """Names of the evaluated clips of all processes, by ascending id, each once; after `compute`."""
        return list(self.all_names.values())

    def write_ids(self, folder: Path) -> Path:
        """Write the names, one a line, to `<folder>/evaluated_ids.txt`; call it on one process, after `compute`."""
        path = Path(folder) / "evaluated_ids.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name}\n" for name in self.ids()))
        return path

    def records(self) -> list[dict[str, Any]]:
        """Scores of every (clip, sample) of all processes, see `mmtrain.difffoley.records`; after `compute`."""
        onsets = self.metrics["onsets"].counted
        names = [(int(key) // MAX_SAMPLES, int(key) % MAX_SAMPLES) for key in onsets["ids"]]
        found = [
            {"name": self.all_names.get(clip, str(clip)), "sample": sample, "onset_f1": float(f1)}
            for (clip, sample), f1 in zip(names, onsets["f1"], strict=True)
        ]
        if self.classifier is not None:
            hits = self.metrics["alignment"].counted["generated"].flatten() > 0  # logits
            for record, hit in zip(found, hits.tolist(), strict=True):
                record["align_acc"] = float(hit)
        return found

    def protocol(self) -> str:
        """How the numbers were measured, in words; after `compute`. Equal protocol ids mean comparable numbers."""
        settings = self.settings
        list_hash = hashlib.sha256("\n".join(self.ids()).encode()).hexdigest()[:12]
        networks = [
            (name, Path(path).name if path else "given", fingerprint(network)[:8])
            for name, network, path in (
                ("feature network", self.feature_network, settings.feature_network),
                ("alignment classifier", self.classifier, settings.alignment_classifier),
            )
            if network is not None
        ]
        conversion = {
            "waveform": "80-mel of the sound at 22,050 Hz",
            "official": "80-mel by the released conversion of the generated mel",
        }[settings.spec_conversion]
        decisive = [list_hash, settings.samples, settings.spec_conversion, self.inverter]
        decisive += [(name, weights) for name, _, weights in networks]
        protocol = hashlib.sha256(repr([*decisive, self.format]).encode()).hexdigest()[:8]
        sound = {
            "generated": f"{settings.samples} generated sound(s) each, sampling seed {settings.sampling_seed}",
            "ground_truth": "the clips' own sound",
            "random": "another clip's sound",
        }[settings.audio]
        words = [
            f"protocol {protocol}: {len(self.ids())} clips (ids sha256 {list_hash})",
            sound,
            f"windows of {self.format.window_seconds:g} s",
            f"inverter: {self.inverter}",
            conversion,
            *(f"{name}: {file} ({weights})" for name, file, weights in networks),
            "Align Acc: posterior mean, t = 0" if self.classifier is not None else "",
            "95 % intervals over clips: Wilson for align_acc, bootstrap else",
            f"seconds: median over batches of up to {self.largest_batch} clips, after up to {WARM_UP} batches of "
            f"warm-up, {device_name(self.device)}"
            if self.all_seconds
            else "",
        ]
        return "; ".join(word for word in words if word)

    @property
    def device(self) -> torch.device:
        """Where the metrics are."""
        return self.metrics["onsets"].device

    def figures(self, folder: Path, prefix: str = "") -> list[dict[str, str]]:
        """Draw into `<folder>/figures`; on one process, after `compute`.

        Args:
            prefix: of the file names, for several sets in one folder.

        Returns:
            `{"file": path in the folder, "title": ..., "kind": "figure"}` for each.
        """
        drawn = []
        onsets = self.metrics["onsets"].counted
        if len(onsets["ids"]):
            drawn.append((f"{prefix}onset_f1.png", "Onset F1 by clip"))
            draw_onset_scores(folder / "figures" / drawn[-1][0], onsets["f1"])
        if "alignment" in self.metrics:
            table = self.metrics["alignment"].counted
            logits = {name: table[name].flatten().numpy() for name in self.metrics["alignment"].columns}
            title = "What the alignment classifier says of generated and of real sound"
            drawn.append((f"{prefix}alignment.png", title))
            draw_alignment(folder / "figures" / drawn[-1][0], logits)
        return [{"file": f"figures/{name}", "title": title, "kind": "figure"} for name, title in drawn]
