"""What `predict` does: a sound for each video, written beside it as wav, video with sound, and picture.

Batches: "path" of the video, "frames" uint8 [T, 3, H, W], "fps" of the frames, "seconds" of the video.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from mmtrain.config_errors import UserError
from mmtrain.difffoley.figures import sound_picture
from mmtrain.difffoley.generation import generate_long, join, to_waveform
from mmtrain.media import add_sound, write_wav
from mmtrain.metrics.onsets import detect_onsets
from mmtrain.seeding import clip_generator

if TYPE_CHECKING:
    from mmtrain.difffoley.module import LatentDiffusion

VIDEO = (".mp4", ".mkv")
PICTURE_SECONDS = 60  # of a picture: of longer videos it shows the beginning


@dataclass
class PredictSettings:
    """What `predict` writes.

    Args:
        folder: in the run folder.
        seed: of the noise; the same seed gives a video the same sound on every device.
        samples: sounds a video; of several, the files are numbered.
        overwrite: make again what is there; without it, videos that were done with the same settings are left out.
        video: write the video with the sound as well.
        picture: draw frames, spectrogram and onsets.
    """

    folder: str = "sounds"
    seed: int = 0
    samples: int = 1
    overwrite: bool = False
    video: bool = True
    picture: bool = True

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"predict.samples: {self.samples}, must be at least 1")


class SoundWriter:
    """Writes the sounds of videos into the run folder; knows which are done.

    Args:
        module: what generates.
    """

    def __init__(self, module: "LatentDiffusion") -> None:
        self.module, self.settings = module, module.predict_settings
        self.folder = Path(module.trainer.default_root_dir) / self.settings.folder

    def about(self, path: str, sample: int) -> dict[str, Any]:
        """What a sound depends on, as plain values: written beside it, and compared before it is made again."""
        module, source = self.module, Path(path)
        return {
            "video": str(source.resolve()),
            "changed": source.stat().st_mtime if source.is_file() else None,
            "checkpoint": str(module.trainer.ckpt_path),
            "step": module.trained.get("step", 0),
            "cavp": module.cavp,
            "guidance": asdict(module.guidance),
            "guidance_classifier": module.guidance_classifier if module.guidance.classifier_scale else None,
            "sampler": asdict(module.sampler),
            "seed": self.settings.seed,
            "sample": sample,
        }

    def target(self, path: str, sample: int) -> Path:
        """File without suffix; two videos of one name get different ones."""
        stem = Path(path).stem + (f"-{sample}" if self.settings.samples > 1 else "")
        own = str(Path(path).resolve())
        taken = read_about(self.folder / f"{stem}.json").get("video", own)
        if taken != own:
            stem = f"{stem}-{hashlib.sha256(own.encode()).hexdigest()[:6]}"
        return self.folder / stem

    def is_done(self, path: str, sample: int) -> bool:
        """Whether this sound was made with the same settings, and all of its files are there."""
        target = self.target(path, sample)
        wanted = [".wav"] + [".png"] * self.settings.picture
        there = all((target.parent / f"{target.name}{suffix}").is_file() for suffix in wanted)
        if self.settings.video:
            there &= any((target.parent / f"{target.name}{suffix}").is_file() for suffix in VIDEO)
        return there and read_about(target.parent / f"{target.name}.json") == self.about(path, sample)

    def write(self, batch: dict[str, Any]) -> list[Path]:
        """Generate and write the sounds of one video; returns the wav files that were written.

        Raises:
            UserError: no frames, or frames of another rate than the format's.
        """
        path, module = str(batch["path"]), self.module
        check_video(batch, module.format.fps)
        todo = [n for n in range(self.settings.samples) if self.settings.overwrite or not self.is_done(path, n)]
        if not todo:
            return []
        features = module.cavp_features().extract(batch["frames"].cpu()).to(module.device)
        return [self._write(batch, features, sample) for sample in todo]

    def _write(self, batch: dict[str, Any], features: Tensor, sample: int) -> Path:
        path, module = str(batch["path"]), self.module
        rate = module.format.sample_rate
        mel, waveform = self.sound(features, Path(path).name, sample, float(batch["seconds"]))
        target = self.target(path, sample)
        written = write_wav(target.parent / f"{target.name}.wav", waveform.numpy(), rate)
        if self.settings.video:
            with_sound(path, waveform, rate, target)
        if self.settings.picture:
            sound_picture(
                target.parent / f"{target.name}.png",
                {"generated": mel[:, : int(PICTURE_SECONDS * module.format.mel_rate)].numpy()},
                batch["frames"][: int(PICTURE_SECONDS * module.format.fps)].cpu().numpy(),
                module.format.fps,
                {"generated": [t for t in detect_onsets(waveform, rate).tolist() if t < PICTURE_SECONDS]},
                title=f"{Path(path).name}: {module.method}",
            )
        # last: what has no such file is not done
        text = json.dumps(self.about(path, sample), indent=1)
        (target.parent / f"{target.name}.json").write_text(text, encoding="utf-8")
        return written

    def sound(self, features: Tensor, name: str, sample: int, seconds: float) -> tuple[Tensor, Tensor]:
        """Spectrogram [C, F] and waveform [N] of the video's length, on the CPU.

        Args:
            features: [T, D] of the whole video.
            name: of the video, for the progress bar.
        """
        module = self.module
        generator = clip_generator(self.settings.seed, 0, sample)
        quiet = module.trainer.progress_bar_callback is None
        with tqdm(total=module.sampler.steps, desc=name, unit="step", leave=False, position=1, disable=quiet) as bar:
            mel = generate_long(
                module.network,
                module.first_stage,
                features,
                module.format,
                module.schedule,
                module.objective,
                module.guidance,
                module.sampler,
                module.guide,
                generator,
                progress=lambda done, steps: show(bar, done, steps),
            )
        samples = round(seconds * module.format.sample_rate)
        if module.sampler.long == "consecutive":
            waveform = join(to_waveform(mel, generator=generator))[0]
            mel = mel.movedim(0, 1).flatten(1)
        else:
            waveform, mel = to_waveform(mel, generator=generator, samples=samples)[0], mel[0]
        return mel.float().cpu(), waveform[:samples].float().cpu()


def show(bar: tqdm, done: int, steps: int) -> None:
    """Move a progress bar."""
    bar.total = steps
    bar.update(done - bar.n)


def with_sound(path: str, waveform: Tensor, rate: int, target: Path) -> Path:
    """Write the video with this sound as mp4, or as mkv where mp4 cannot hold its pictures; returns the file."""
    files = [target.parent / f"{target.name}{suffix}" for suffix in VIDEO]
    try:
        return add_sound(path, waveform.numpy(), rate, files[0])
    except UserError:
        return add_sound(path, waveform.numpy(), rate, files[1])


def read_about(path: Path) -> dict[str, Any]:
    """What stands beside a sound; empty if nothing does, or something broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_video(batch: dict[str, Any], fps: float) -> None:
    """Refuse a video that the model cannot take.

    Raises:
        UserError: names the video and the setting.
    """
    if not len(batch["frames"]):
        raise UserError(f"{batch['path']}: has no frames")
    if float(batch["fps"]) != fps:
        raise UserError(
            f"{batch['path']}: was read at {float(batch['fps']):g} frames/s, the model has format.fps {fps:g}: give "
            "data and model the same format"
        )
