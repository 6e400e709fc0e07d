"""`predict`: wav, video with the sound, picture; what is done is not done again; mistakes are named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.video_folder import VideoFolderDataModule
from mmtrain.config_errors import UserError
from mmtrain.difffoley.cavp import CavpNetwork
from mmtrain.difffoley.features import CavpFeatures
from mmtrain.difffoley.figures import sound_picture
from mmtrain.difffoley.module import LatentDiffusion
from mmtrain.difffoley.outputs import PredictSettings, check_video
from mmtrain.media import read_audio, read_frames, read_wav, write_video
from tests.difffoley.foley_data import FIRST_STAGE, FORMAT, OPTIM, UNET, WIDTH, trainer_of

SECONDS = 3


@pytest.fixture(scope="module")
def cavp(tmp_path_factory) -> str:
    """A tiny CAVP with fresh weights, as a file."""
    torch.manual_seed(0)
    network = CavpNetwork(width=2, audio_width=2, feature_dim=WIDTH)
    state = {f"network.{name}": value for name, value in network.state_dict().items()}
    path = tmp_path_factory.mktemp("cavp") / "cavp.ckpt"
    torch.save({"state_dict": state, "hyper_parameters": {"format": vars(FORMAT)}}, path)
    return str(path)


@pytest.fixture
def video(tmp_path) -> Path:
    frames = np.random.default_rng(0).integers(0, 255, (8 * SECONDS, 3, 48, 64), dtype=np.uint8)
    return write_video(tmp_path / "videos" / "ball.mp4", frames, 8)


def diffusion(cavp: str | None, **options: object) -> LatentDiffusion:
    torch.manual_seed(0)
    given = {"first_stage": FIRST_STAGE, "optim": OPTIM, "sampler": {"steps": 2}, "cavp": cavp, **options}
    return LatentDiffusion(FORMAT, UNET, **given)


def predict(folder: Path, module: LatentDiffusion, videos: Path) -> Path:
    trainer_of(folder).predict(module, VideoFolderDataModule(str(videos), FORMAT), return_predictions=False)
    return folder / "sounds"


def test_a_video_gets_sound_in_three_forms(cavp, video, tmp_path) -> None:
    sounds = predict(tmp_path, diffusion(cavp), video)
    assert {path.name for path in sounds.iterdir()} == {"ball.wav", "ball.mp4", "ball.png", "ball.json"}
    samples, rate = read_wav(sounds / "ball.wav")
    assert rate == 16000 and len(samples) == SECONDS * 16000 and samples.std() > 1e-4
    heard = read_audio(sounds / "ball.mp4", 16000)
    assert abs(len(heard) - len(samples)) < 2100 and heard.std() > 0.3 * samples.std()  # AAC comes in blocks
    assert np.array_equal(read_frames(sounds / "ball.mp4", 8, 32), read_frames(video, 8, 32))
    assert min(Image.open(sounds / "ball.png").size) > 200


def test_what_is_done_is_left_alone(cavp, video, tmp_path) -> None:
    def run(**options: object) -> Path:
        quick = PredictSettings(video=False, picture=False, **options)
        return predict(tmp_path, diffusion(cavp, predict=quick), video) / "ball.wav"

    sound = run()
    time, content = sound.stat().st_mtime_ns, sound.read_bytes()
    run()
    assert sound.stat().st_mtime_ns == time
    run(overwrite=True)
    assert sound.stat().st_mtime_ns != time and sound.read_bytes() == content  # the same seed
    run(seed=1)
    assert sound.read_bytes() != content
    (sound.parent / "ball.json").write_text("{")  # cut off: not done
    run()
    assert sound.read_bytes() == content


def test_videos_of_one_name_and_several_samples_have_files_of_their_own(cavp, video, tmp_path) -> None:
    other = write_video(tmp_path / "videos" / "more" / "ball.mp4", np.zeros((16, 3, 32, 32), np.uint8), 8)
    quick = PredictSettings(samples=2, video=False, picture=False)
    predict(tmp_path, diffusion(cavp, predict=quick), video)
    sounds = predict(tmp_path, diffusion(cavp, predict=quick), other)
    names = sorted(path.name for path in sounds.glob("*.wav"))
    assert len(names) == 4 and {"ball-0.wav", "ball-1.wav"} < set(names)
    assert (sounds / "ball-0.wav").read_bytes() != (sounds / "ball-1.wav").read_bytes()
    assert len(read_wav(sounds / "ball-0.wav")[0]) == SECONDS * 16000  # not that of the other


def test_the_released_way_of_long_videos_works(cavp, tmp_path) -> None:
    longer = write_video(tmp_path / "longer.mp4", np.zeros((8 * SECONDS + 6, 3, 32, 32), np.uint8), 8)
    module = diffusion(cavp, sampler={"steps": 2, "long": "consecutive"}, predict=PredictSettings(video=False))
    samples, _ = read_wav(predict(tmp_path, module, longer) / "longer.wav")
    assert len(samples) == SECONDS * (FORMAT.window_mel_frames - 1) * 256  # a window a second, the tail is dropped


def test_mistakes_of_predict_are_named(cavp, video, tmp_path) -> None:
    with pytest.raises(UserError, match=r"cavp: none is given"):
        predict(tmp_path, diffusion(None), video)
    module = diffusion(cavp)
    module.features_from = CavpFeatures(cavp).describe() | {"sha": "0" * 16}
    with pytest.raises(UserError, match=r"cavp: .*cavp.ckpt: has features of another CAVP \(sha"):
        predict(tmp_path, module, video)
    frames = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"x.mp4: was read at 8 frames/s, the model has format.fps 4"):
        check_video({"path": "x.mp4", "frames": frames, "fps": 8}, 4)
    with pytest.raises(UserError, match=r"x.mp4: has no frames"):
        check_video({"path": "x.mp4", "frames": frames[:0], "fps": 4}, 4)
    with pytest.raises(UserError, match=r"predict.samples: 0"):
        PredictSettings(samples=0)


def test_a_picture_shows_what_it_is_given(tmp_path) -> None:
    mel = np.zeros((128, 250), np.float32)
    frames = np.zeros((16, 3, 8, 8), np.uint8)
    plain = sound_picture(tmp_path / "a.png", {"generated": mel})
    full = sound_picture(
        tmp_path / "b.png", {"generated": mel, "real": mel}, frames, 4.0, {"real": [1.0]}, [2.0], title="$x"
    )
    sizes = [Image.open(path).size for path in (plain, full)]
    assert sizes[0][0] == sizes[1][0] and sizes[1][1] > sizes[0][1]
    pixels = np.asarray(Image.open(full).convert("RGB")).reshape(-1, 3)
    blue = (pixels[:, 0] < 120) & (pixels[:, 1] > 120) & (pixels[:, 2] > 150)
    assert blue.any()  # the line of an onset that was heard
    with pytest.raises(ValueError, match="at least one"):
        sound_picture(tmp_path / "c.png", {})
