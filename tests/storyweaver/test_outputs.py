"""`predict`: pictures of stories with all that is needed to repeat them; nothing is drawn twice or lost unasked."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mmtrain.config_errors import UserError
from mmtrain.story import Character, Frame, FrameBatch
from mmtrain.storyweaver import outputs
from mmtrain.storyweaver.figures import contact_sheet, wrapped
from mmtrain.storyweaver.outputs import PredictSettings, StoryWriter, read_picture, weights_fingerprint
from mmtrain.storyweaver.sampling import SamplerSettings

FOX = Character("Eddy", "fox", "This brown fox has large ears.")
EVENTS = ("A fox runs.", "A fox sleeps.", "A fox eats an apple.")


class Drawer(nn.Module):
    """Stands in for a story model: a picture's colour tells its frame, its seed, and the weights."""

    def __init__(self, run: Path, steps: int = 2, batch_size: int = 2, **options: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0]))
        self.trainer = SimpleNamespace(
            default_root_dir=str(run), ckpt_path="run/last.ckpt", progress_bar_callback=None, precision="32-true"
        )
        self.sampler, self.predict_settings = (
            SamplerSettings(steps=steps, batch_size=batch_size),
            PredictSettings(**options),
        )
        self.world, self.calls, self.fail_at = None, [], None

    def sampling_about(self) -> dict:
        return {"method": "StoryWeaver", "sampler": vars(self.sampler), "picture_size": [8, 14]}

    def wording(self, frame: Frame) -> Frame:
        return frame

    def draw(self, frames: list[Frame], seeds: list[int], progress=None) -> Tensor:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append([(frame.event, seed) for frame, seed in zip(frames, seeds, strict=True)])
        progress(1, 1)
        return torch.stack([colour(f, s, int(self.weight)) for f, s in zip(frames, seeds, strict=True)])


def colour(frame: Frame, seed: int, weight: int = 3) -> Tensor:
    return torch.tensor([len(frame.prompt), seed % 256, weight], dtype=torch.uint8)[:, None, None].repeat(1, 8, 14)


def batch(events: tuple[str, ...] = EVENTS, story: str = "walk", first: int = 0) -> dict:
    frames = FrameBatch(Frame(event, (FOX,), "Cartoon style.") for event in events)
    return {"frames": frames, "story": [story] * len(frames), "line": list(range(first, first + len(frames)))}


def predict(module: Drawer, *batches: dict) -> list[Path]:
    writer = StoryWriter(module)
    written = [path for given in batches or (batch(),) for path in writer.write(given)]
    return written + writer.finish()


def test_a_story_gets_pictures_prompts_options_and_a_sheet(tmp_path) -> None:
    module = Drawer(tmp_path, seeds=2)
    written = predict(module, batch(), batch(("A fox swims.",), "swim"))
    stories = tmp_path / "stories"
    assert len(written) == 4 * 2 + 2 and all(path.is_file() for path in written)
    assert module.calls[0] == [("A fox runs.", 655), ("A fox runs.", 115)]  # as many as the sampler takes
    for seed in (655, 115):
        folder = stories / "walk" / f"seed_{seed}"
        assert sorted(p.name for p in (folder / "image").iterdir()) == ["00000.png", "00001.png", "00002.png"]
        prompt = (folder / "text" / "00002.txt").read_text()
        assert prompt == "Cartoon style. A fox eats an apple. This brown fox has large ears."
        assert torch.equal(read_picture(folder / "image" / "00002.png"), colour(batch()["frames"][2], seed))
        options = json.loads((folder / "options.json").read_text())
        assert options["seed"] == seed and options["sampler"]["steps"] == 2 and options["precision"] == "32-true"
        assert options["checkpoint"] == "run/last.ckpt" and len(options["weights"]) == 16
    sheet = Image.open(stories / "walk" / "contact_sheet.png")
    single = Image.open(stories / "swim" / "contact_sheet.png")
    assert sheet.width > 2.5 * single.width and not list(stories.rglob("*.part*"))


def test_what_is_done_is_not_drawn_again(tmp_path) -> None:
    first = Drawer(tmp_path)
    first.fail_at = 1
    with pytest.raises(KeyboardInterrupt):  # after two of three pictures
        predict(first)
    second = Drawer(tmp_path, batch_size=1)
    second.trainer.ckpt_path, second.trainer.default_root_dir = "copied/last.ckpt", str(tmp_path)
    written = predict(second)
    assert second.calls == [[(EVENTS[2], 655)]] and [p.name for p in written] == ["00002.png", "contact_sheet.png"]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "stories").rglob("*.*")}
    third = Drawer(tmp_path)
    assert predict(third) == [] and not third.calls
    assert times == {path: path.stat().st_mtime_ns for path in times}
    more = Drawer(tmp_path, seeds=2)
    predict(more)
    assert [job for call in more.calls for job in call] == [(event, 115) for event in EVENTS]
    (tmp_path / "stories/walk/seed_655/text/00001.txt").unlink()
    again = Drawer(tmp_path)
    predict(again)
    assert again.calls == [[(EVENTS[1], 655)]]


def test_other_drawings_are_replaced_only_when_told_so(tmp_path) -> None:
    predict(Drawer(tmp_path))
    pictures = [tmp_path / f"stories/walk/seed_655/image/0000{i}.png" for i in range(3)]
    before = [path.read_bytes() for path in pictures]
    other = Drawer(tmp_path, steps=5)
    with pytest.raises(UserError, match=r"00000.png: is there, but was drawn with sampler.steps 2, now 5. .*overwrite"):
        predict(other)
    trained = Drawer(tmp_path)
    trained.weight.data += 1
    with pytest.raises(UserError, match=r"was drawn with other weights \(checkpoint run/last.ckpt\)"):
        predict(trained)
    edited = (EVENTS[0], "A fox sleeps long.", EVENTS[2])
    with pytest.raises(UserError, match=r"00001.png: is there, but was drawn from another prompt"):
        predict(Drawer(tmp_path), batch(edited))
    assert not other.calls and before == [path.read_bytes() for path in pictures]
    told = Drawer(tmp_path, overwrite=True)
    predict(told, batch(edited))
    assert told.calls == [[("A fox sleeps long.", 655)]]  # the others would be the same
    assert before[::2] == [path.read_bytes() for path in pictures[::2]] and pictures[1].read_bytes() != before[1]
    trained.predict_settings.overwrite, trained.fail_at = True, 1
    with pytest.raises(KeyboardInterrupt):
        predict(trained)
    trained.calls, trained.fail_at = [], None
    predict(trained)  # goes on with what is still of the old weights
    assert trained.calls == [[(EVENTS[2], 655)]]
    Image.new("RGB", (14, 8)).save(pictures[0])
    with pytest.raises(UserError, match=r"00000.png: is there, but"):
        predict(trained.__class__(tmp_path))


def test_jpg_and_other_folders(tmp_path) -> None:
    settings = {"format": "jpg", "folder": "elsewhere", "contact_sheet": False}
    written = predict(Drawer(tmp_path, **settings))
    assert written[0] == tmp_path / "elsewhere/walk/seed_655/image/00000.jpg"
    with Image.open(written[0]) as image:
        assert image.format == "JPEG" and image.size == (14, 8)
    assert (read_picture(written[0]).int() - colour(batch()["frames"][0], 655).int()).abs().max() <= 3
    assert not (tmp_path / "elsewhere/walk/contact_sheet.png").exists()
    again = Drawer(tmp_path, **settings)
    assert not predict(again) and not again.calls
    absolute = Drawer(tmp_path, folder=str(tmp_path / "x" / "y"))
    assert predict(absolute)[0].is_relative_to(tmp_path / "x" / "y" / "walk")


def test_the_first_process_draws_the_sheets_of_all(tmp_path, monkeypatch) -> None:
    writers = [StoryWriter(Drawer(tmp_path)), StoryWriter(Drawer(tmp_path))]
    writers[0].write(batch(EVENTS[:1]))
    writers[1].write(batch(EVENTS[1:], first=1))
    writers[1].write(batch(EVENTS[:1], "other"))

    def gather(parts: list, own: tuple) -> None:
        parts[:] = [(w._lines, w._changed) for w in writers]

    monkeypatch.setattr(outputs, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    sheets = writers[0].finish()
    assert [path.parent.name for path in sheets] == ["walk", "other"]
    monkeypatch.setattr(outputs, "rank", lambda: 1)
    assert writers[1].finish() == []
    assert Image.open(sheets[0]).width > 2 * Image.open(sheets[1]).width


def test_weights_are_told_apart_wherever_they_are(tmp_path) -> None:
    module = Drawer(tmp_path)
    own = weights_fingerprint(module)
    assert own == weights_fingerprint(Drawer(tmp_path / "copy"))
    part = nn.Embedding(1000, 8)
    module.components = SimpleNamespace(unet=part, objective="eps")
    with_part = weights_fingerprint(module)
    assert with_part != own
    part.weight.data[-1] += 1  # a word that was added
    assert weights_fingerprint(module) != with_part


def test_mistakes_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"predict.format: 'gif', must be one of png, jpg"):
        PredictSettings(format="gif")
    with pytest.raises(UserError, match=r"predict.seeds: 0, must be 1 to 1023"):
        PredictSettings(seeds=0)
    for name in ("../walk", "", ".."):
        with pytest.raises(UserError, match="is no name of a folder"):
            StoryWriter(Drawer(tmp_path)).write(batch(story=name))


def test_a_contact_sheet_shows_pictures_in_their_order(tmp_path) -> None:
    pictures = torch.zeros(5, 3, 64, 112, dtype=torch.uint8)
    for i in range(5):
        pictures[i] = 40 * i + 20
    path = contact_sheet(
        tmp_path / "new" / "sheet.png", pictures, ["A fox $x_1$ é.", "", "word " * 40, "a\nb", "x" * 200], 3
    )
    sheet = np.asarray(Image.open(path))
    rows = [[sheet[8 + 64, 8 + 232 * c + 112] for c in range(3)], None]
    assert [int(p[0]) for p in rows[0]] == [20, 60, 100]  # twice as large, 8 pixels apart
    below = sheet[:, 8 + 112, 0]
    assert 140 in below and np.argmax(below == 140) > 8 + 128 + 7 * 17  # under the longest title of the row above
    assert (sheet[8 + 128 + 4 : 8 + 128 + 4 + 17, 8:232] < 100).any()  # ink
    large = contact_sheet(tmp_path / "large.png", torch.zeros(1, 3, 512, 896, dtype=torch.uint8), [""], 4)
    assert Image.open(large).width == 384 + 16
    assert all(wrapped("x" * 300, 100)) and len(wrapped("word " * 100, 100)) == 7
    assert wrapped("a  b\nc", 100) == ["a b", "c"]
    with pytest.raises(ValueError, match="5 pictures, 1 titles"):
        contact_sheet(path, pictures, ["a"])
