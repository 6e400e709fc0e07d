"""What `test` does with a latent diffusion model: generate a sound for each clip, time the parts, score and keep some.

A clip's noise is drawn from its id, so the numbers do not depend on batches or processes.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from mmtrain.difffoley.evaluate import PARTS, FoleyEvaluation
from mmtrain.difffoley.figures import sound_picture
from mmtrain.difffoley.generation import generate_latents, to_waveform
from mmtrain.difffoley.records import write_records
from mmtrain.media import write_wav
from mmtrain.metrics.onsets import detect_onsets
from mmtrain.seeding import clip_generator, clip_noise

if TYPE_CHECKING:
    from mmtrain.difffoley.module import LatentDiffusion

TIMED_BATCHES = 10  # for which feature extraction is timed too
Result = TypeVar("Result")


class Stopwatch:
    """Seconds of the parts of one batch; waits for the GPU before and after each."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, {}

    def __call__(self, part: str, work: Callable[[], Result]) -> Result:
        """Do the work and add its time to `part`."""
        self._wait()
        begin = time.perf_counter()
        result = work()
        self._wait()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begin
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class SoundTest:
    """The test of one data set.

    Args:
        module: what generates.
        name: of the set.
    """

    def __init__(self, module: "LatentDiffusion", name: str) -> None:
        self.module, self.name, self.settings = module, name, module.test_settings
        self.folder = Path(module.trainer.default_root_dir)
        self.evaluation = FoleyEvaluation(self.settings, module.format, module.first_stage).to(module.device)
        self.previous: dict[str, Tensor] | None = None  # last clip of the batch before, where sounds are random
        self.batches = self.kept = 0
        self.figures: list[dict[str, str]] = []

    def run(self, batch: dict[str, Any]) -> None:
        """Add the clips of a batch, see `FoleyEvaluation.add`; an empty one is left out."""
        if not batch:
            return
        samples = self.settings.samples if self.settings.audio == "generated" else 1
        for sample in range(samples):
            waveform, mel, seconds = self.sounds(batch, sample)
            self.evaluation.add(batch, waveform, mel, seconds, sample)
            if sample == 0 and self.module.trainer.is_global_zero:
                self._keep(batch, waveform, mel)
        self.batches += 1

    def sounds(self, batch: dict[str, Any], sample: int) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Waveforms [B, N], spectrograms [B, C, F], and the seconds of each part, for the whole batch."""
        if self.settings.audio == "ground_truth":
            return batch["audio"], batch["mel"], {}
        if self.settings.audio == "random":
            return *self._of_another_clip(batch), {}
        module, seed = self.module, self.settings.sampling_seed
        watch = Stopwatch(module.device)
        if module.cavp is not None and self.batches < TIMED_BATCHES and sample == 0:
            self._time_features(batch, watch)
        shape = module.latent_shape(batch["mel"])
        noise = clip_noise(batch["id"], shape, seed, sample, module.device)
        ids = batch["id"].tolist()
        z = watch("diffusion", lambda: self._latents(batch, noise, clip_generator(seed, ids[0], sample)))
        mel = watch("decode", lambda: module.first_stage.decode(z).float().clamp(0, 1))
        phases = [clip_generator(seed, clip, sample) for clip in ids]
        waveform = watch("inversion", lambda: to_waveform(mel, generator=phases))
        return waveform, mel, watch.seconds

    def _latents(self, batch: dict[str, Any], noise: Tensor, generator: torch.Generator) -> Tensor:
        """`generator` is of the noise that DDIM with eta adds; only with that does a result depend on its batch."""
        module = self.module
        return generate_latents(
            module.network,
            batch["features"],
            noise,
            module.schedule,
            module.objective,
            module.guidance,
            module.sampler,
            module.guide,
            batch.get("clip_features"),
            generator,
        )

    def _of_another_clip(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Sound and spectrogram that the data give as another clip's; without those, of the clip before.

        That one may stand in the batch before; the first batch's first clip has that batch's last.
        """
        if "other_audio" in batch and "other_mel" in batch:
            return batch["other_audio"], batch["other_mel"]
        shifted = {key: batch[key].roll(1, 0) for key in ("audio", "mel")}
        if self.previous is not None:
            shifted = {key: torch.cat((self.previous[key], value[1:])) for key, value in shifted.items()}
        self.previous = {key: batch[key][-1:] for key in shifted}
        return shifted["audio"], shifted["mel"]

    def _time_features(self, batch: dict[str, Any], watch: Stopwatch) -> None:
        """The features of a test come from disk; what they cost is measured on as many random frames."""
        clips, frames = batch["features"].shape[:2]
        size = self.module.format.frame_size
        pictures = torch.randint(256, (clips, frames, 3, size, size), dtype=torch.uint8)
        watch(PARTS[0], lambda: self.module.cavp_features().extract(pictures))

    def _keep(self, batch: dict[str, Any], waveform: Tensor, mel: Tensor) -> None:
        """Write sounds and pictures of the first clips, until there are as many as the settings ask for."""
        folder = self.folder / "figures"
        rate, left = self.module.format.sample_rate, self.settings.examples - self.kept
        for row in range(min(left, len(mel))):
            name = f"{self.name}-{self.settings.audio}-{self.kept}"
            write_wav(folder / f"{name}.wav", waveform[row].float().cpu().numpy(), rate)
            if self.settings.audio == "generated":
                write_wav(folder / f"{self.name}-real-{self.kept}.wav", batch["audio"][row].float().cpu().numpy(), rate)
            heard = {
                self.settings.audio.replace("_", " "): detect_onsets(waveform[row].float().cpu(), rate).tolist(),
                "real": detect_onsets(batch["audio"][row].float().cpu(), rate).tolist(),
            }
            shown = dict(zip(heard, (mel[row], batch["mel"][row]), strict=True))
            onsets = batch.get("onsets")
            title = f"{batch['name'][row] if batch.get('name') else int(batch['id'][row])}: {self.module.method}"
            sound_picture(
                folder / f"{name}.png",
                {key: value.float().cpu().numpy() for key, value in shown.items()},
                found=heard,
                known=None if onsets is None or onsets[row] is None else onsets[row].tolist(),
                title=title,
            )
            self.figures.append({"file": f"figures/{name}.png", "title": title, "kind": "sample"})
            self.kept += 1

    def finish(self) -> dict[str, float]:
        """The metrics; call it on every process. The first one writes the clips' names and scores, and draws."""
        metrics = self.evaluation.compute()
        if self.module.trainer.is_global_zero:
            self.evaluation.write_ids(self.folder)
            write_records(self.folder, self.evaluation.records())
            self.figures += self.evaluation.figures(self.folder, f"{self.name}-{self.settings.audio}-")
        return metrics

    def protocol(self) -> str:
        """How the numbers were measured, with the settings of sampling."""
        if self.settings.audio != "generated":
            return self.evaluation.protocol()
        return f"{self.evaluation.protocol()}; {self.module.sampling_words()}"
