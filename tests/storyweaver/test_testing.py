"""The test of a story model: numbers by hand, pictures that survive an interruption, two processes, what is refused."""

import json
from multiprocessing.pool import Pool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from mmtrain.config_errors import UserError
from mmtrain.story import Character, Frame, FrameBatch, World
from mmtrain.storyweaver import evaluate
from mmtrain.storyweaver.evaluate import StoryTestSettings
from mmtrain.storyweaver.outputs import read_picture
from mmtrain.storyweaver.records import picture_values, read_records
from mmtrain.storyweaver.testing import StoryTest
from tests.datamodules.story_worlds import CAST
from tests.metrics.conftest import two_processes  # noqa: F401

NAMES = ["Ada", "Bo", "Cy"]
WORLD = World("tiny", "Flat.", {name: Character(name, *CAST[name][:2]) for name in NAMES})
COLOURS = torch.tensor([CAST[name][2] for name in NAMES], dtype=torch.float32)
SIZE = (12, 20)


def frame(*names: str, number: int = 0) -> Frame:
    return Frame(f"Scene {number}.", tuple(WORLD.characters[name] for name in names), WORLD.style)


# Cy is never drawn: lines 2 and 4 are wrong; line 5 asks for an order that the drawer turns around
LINES = [frame("Ada"), frame("Bo"), frame("Cy"), frame("Ada", "Bo"), frame("Ada", "Cy"), frame("Bo", "Ada", number=9)]
STORIES = [("one", 0), ("one", 1), ("one", 2), ("two", 0), ("two", 1), ("two", 2)]


def batch(rows: list[int]) -> dict:
    return {
        "frames": FrameBatch(LINES[row] for row in rows),
        "id": torch.tensor(rows),
        "story": [STORIES[row][0] for row in rows],
        "line": [STORIES[row][1] for row in rows],
    }


class Painter(nn.Module):
    """Draws characters as blocks of colour, left to right, Ada always first and Cy never."""

    method = "painter"

    def __init__(self, folder: Path, settings: StoryTestSettings, networks: bool = True, rank: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.test_settings, self.sampler = settings, SimpleNamespace(batch_size=2)
        references = {name: [reference(place, share) for share in (0.5, 1.0)] for place, name in enumerate(NAMES)}
        self.trainer = SimpleNamespace(
            default_root_dir=str(folder),
            datamodule=SimpleNamespace(world=WORLD, references=lambda: references),
            is_global_zero=rank == 0,
            ckpt_path=None,
            precision="32-true",
            progress_bar_callback=None,
        )
        self.image_features = self.image_text_features = MeanColour() if networks else None
        self.world = WORLD
        self.lent, self.device, self.options, self.drawn = {}, torch.device("cpu"), {"steps": 2}, []

    def wording(self, one: Frame) -> Frame:
        return one

    def sampling_about(self) -> dict:
        return self.options

    def draw(self, frames: list[Frame], seeds: list[int], progress=None) -> Tensor:
        assert len(frames) == len(seeds) <= self.sampler.batch_size
        self.drawn += [(one.prompt, seed) for one, seed in zip(frames, seeds, strict=True)]
        return torch.stack([paint(one, seed) for one, seed in zip(frames, seeds, strict=True)])


def paint(one: Frame, seed: int) -> Tensor:
    picture = torch.full((3, *SIZE), seed % 50, dtype=torch.uint8)
    drawn = [name for name in sorted(one.names) if name != "Cy"]
    for place, name in enumerate(drawn):
        left = place * SIZE[1] // len(drawn) + 1
        picture[:, 2:-2, left : left + 7] = COLOURS[NAMES.index(name)][:, None, None].to(torch.uint8)
    return picture


def reference(place: int, share: float) -> Tensor:
    return (COLOURS[place] * share)[:, None, None].expand(3, 8, round(16 * share)).to(torch.uint8).contiguous()


class MeanColour:
    name = "mean colour"

    def image_features(self, pictures: Tensor) -> Tensor:
        return pictures.float().mean(dim=(2, 3)) - 60

    def text_features(self, texts: list[str]) -> Tensor:
        return torch.tensor([[len(text) % 7, len(text) % 5, 1.0] for text in texts])


class ColourRecogniser:
    """Knows the world's characters, in another order."""

    names, held_out_accuracy = NAMES[::-1], 0.65

    def describe(self) -> str:
        return "recogniser by colour 0.650"

    def probabilities(self, pictures: Tensor) -> Tensor:
        near = (pictures[:, None].float() - COLOURS.flip(0)[None, :, :, None, None]).abs().amax(dim=2) < 5
        return (near.float().mean(dim=(2, 3)) * 8).clamp(max=0.99)

    def halves(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        middle = pictures.shape[-1] // 2
        return self.probabilities(pictures[..., :middle]), self.probabilities(pictures[..., middle:])


@pytest.fixture(autouse=True)
def by_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "load_recogniser", lambda *_: ColourRecogniser())


def settings(**options) -> StoryTestSettings:
    return StoryTestSettings(**{"recogniser": "r.ckpt", "min_accuracy": 0.6, "seeds": 2} | options)


def run(painter: Painter, batches: list[list[int]], name: str = "tiny_multi") -> tuple[StoryTest, dict[str, float]]:
    test = StoryTest(painter, name)
    for rows in batches:
        test.run(batch(rows))
    return test, test.finish()


ALL = [[0, 1, 2], [3, 4, 5]]


def test_numbers_by_hand(tmp_path: Path) -> None:
    test, found = run(Painter(tmp_path, settings()), [*ALL, [5]])
    assert found["f_acc"] == pytest.approx(4 / 6) and found["f_acc_single"] == pytest.approx(2 / 3)
    assert found["f_acc_two"] == pytest.approx(2 / 3) and found["f_acc_low"] < 4 / 6 < found["f_acc_high"]
    assert found["c_f1"] == pytest.approx(2 * 7 / (2 * 7 + 2)) and found["c_f1_macro"] == pytest.approx(2 / 3)
    assert found["order_kept"] == pytest.approx(1 / 3), "of three pairs one lacks Cy and one is turned around"
    drawn = {(row, seed): paint(LINES[row], seed)[None] for row in range(6) for seed in test.seeds}
    network = MeanColour()
    features = {key: network.image_features(picture)[0] for key, picture in drawn.items()}
    texts = network.text_features([line.event for line in LINES])
    expected = [cosine_similarity(features[key], texts[key[0]], dim=0) for key in drawn]
    assert found["clip_t"] == pytest.approx(float(torch.stack(expected).mean()), abs=1e-5)
    by_character = []
    for place, name in enumerate(NAMES):
        real = [network.image_features(reference(place, share)[None])[0] for share in (0.5, 1.0)]
        pairs = [cosine_similarity(features[row, seed], r, dim=0) for row, seed in drawn for r in real
                 if name in LINES[row].names]  # fmt: skip
        by_character.append(torch.stack(pairs).mean())
    assert found["dino_i"] == found["clip_i"] == pytest.approx(float(torch.stack(by_character).mean()), abs=1e-5)
    assert test.missing == {}
    for words in ("6 lines, 2 seed(s) each (655, 115)", "mean colour", "recogniser by colour 0.650", "not x 100"):
        assert words in test.protocol()


def test_what_is_kept(tmp_path: Path) -> None:
    test, found = run(Painter(tmp_path, settings()), ALL)
    run(Painter(tmp_path, settings()), [[0]], "tiny_single")
    run(Painter(tmp_path, settings()), ALL)
    records = [record for record in read_records(tmp_path) if record["set"] == "tiny_multi"]
    assert len(records) == 12 and len(read_records(tmp_path)) == 14, "a repeated test replaces its own set's records"
    wrong = next(record for record in records if record["story"] == "two" and record["line"] == 1)
    assert wrong["characters"] == ["Ada", "Cy"] and wrong["predicted"] == ["Ada"] and wrong["f_acc"] == 0
    assert torch.equal(read_picture(tmp_path / wrong["file"]), paint(LINES[4], 655))
    assert sum(picture_values(tmp_path, "test/tiny_multi/f_acc")) / 12 == pytest.approx(found["f_acc"])
    assert len(picture_values(tmp_path, "test/tiny_multi/order_kept")) == 6
    assert picture_values(tmp_path, "test/tiny_multi/c_f1") is None
    options = json.loads((tmp_path / "pictures" / "tiny_multi" / "seed_115" / "options.json").read_text())
    assert options["seed"] == 115 and options["steps"] == 2 and "weights" in options
    assert [figure["file"] for figure in test.figures] == ["figures/tiny_multi-stories.png"]
    assert (tmp_path / test.figures[0]["file"]).is_file() and not list(tmp_path.rglob(".*"))


def test_an_interrupted_test_goes_on(tmp_path: Path) -> None:
    _, expected = run(Painter(tmp_path / "whole", settings()), ALL)
    first = Painter(tmp_path / "parts", settings())
    StoryTest(first, "tiny_multi").run(batch(ALL[0]))
    second = Painter(tmp_path / "parts", settings())
    _, found = run(second, ALL)
    assert len(first.drawn) == 6 and len(second.drawn) == 6 and not set(first.drawn) & set(second.drawn)
    assert found == expected
    for change in ({"options": {"steps": 3}}, {"weight": nn.Parameter(torch.zeros(1))}):
        third = Painter(tmp_path / "parts", settings())
        for name, value in change.items():
            setattr(third, name, value)
        run(third, ALL)
        assert len(third.drawn) == 12, f"pictures of another {next(iter(change))} are drawn anew"


def test_what_is_not_given_is_missing_and_said(tmp_path: Path) -> None:
    painter = Painter(tmp_path, settings(recogniser=None, sheet_pictures=0), networks=False)
    test, found = run(painter, ALL)
    assert found == {} and len(painter.drawn) == 12 and test.figures == []
    assert test.missing.keys() == {
        "dino_i",
        "clip_i",
        "clip_t",
        "clip_t_full",
        "f_acc",
        "c_f1",
        "c_f1_macro",
        "order_kept",
    }
    assert "dino_i left out: image_features: is not set" in test.protocol()
    assert read_records(tmp_path)[0]["characters"] == ["Ada"]


def test_a_set_without_pairs_has_no_figures_of_pairs(tmp_path: Path) -> None:
    _, found = run(Painter(tmp_path, settings(seeds=1)), [[0, 1, 2]])
    assert found["f_acc_single"] == found["f_acc"] and not any(key.startswith(("f_acc_two", "order")) for key in found)


def test_a_poor_recogniser_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    painter = Painter(tmp_path, settings(min_accuracy=0.7))
    with pytest.raises(
        UserError, match=r"r\.ckpt: its F-Acc on held-out real pictures is 0\.650, below .* 0\.7.*min_accuracy 0"
    ):
        StoryTest(painter, "tiny_multi")
    assert not painter.drawn
    StoryTest(Painter(tmp_path, settings(min_accuracy=0)), "tiny_multi")
    monkeypatch.setattr(ColourRecogniser, "held_out_accuracy", None)
    with pytest.raises(UserError, match="was never measured"):
        StoryTest(Painter(tmp_path, settings()), "tiny_multi")
    monkeypatch.setattr(ColourRecogniser, "names", ["Ada", "Bo", "Zed"])
    with pytest.raises(UserError, match=r"knows Ada, Bo, Zed; the data are of Ada, Bo, Cy"):
        StoryTest(Painter(tmp_path, settings()), "tiny_multi")


def test_mistakes_are_told(tmp_path: Path) -> None:
    for options, words in (
        ({"seeds": 0}, r"test\.seeds: 0"),
        ({"min_accuracy": 70}, r"test\.min_accuracy: 70"),
        ({"most_references": 0}, r"test\.most_references: 0"),
        ({"sheet_pictures": -1}, r"test\.sheet_pictures: -1"),
    ):
        with pytest.raises(UserError, match=words):
            settings(**options)
    test = StoryTest(Painter(tmp_path, settings()), "tiny_multi")
    test.run(batch([0]))
    with pytest.raises(UserError, match="two lines 0"):
        test.run(batch([1]) | {"line": [0]})
    with pytest.raises(UserError, match="story 'a/b'"):
        test.run(batch([1]) | {"story": ["a/b"]})
    with pytest.raises(UserError, match=r"pictures\.jsonl: cannot be read"):
        read_records(tmp_path / "absent")


def _one_rank(folder: str) -> tuple[int, dict[str, float], int]:
    evaluate.load_recogniser = lambda *_: ColourRecogniser()
    rank = dist.get_rank()
    painter = Painter(Path(folder), settings(), rank=rank)
    test, found = run(painter, [[0, 2, 4], [5]] if rank else [[1, 3, 5]])  # line 5 twice, as a loader repeats it
    return rank, found, len(test.records)


def test_two_processes(two_processes: Pool, tmp_path: Path) -> None:  # noqa: F811
    _, expected = run(Painter(tmp_path / "one", settings()), ALL)
    tasks = two_processes.starmap_async(_one_rank, [(str(tmp_path / "two"),)] * 2, chunksize=1)
    for _, found, records in tasks.get(timeout=500):
        assert found == pytest.approx(expected) and records == 12
    one, two = read_records(tmp_path / "one"), read_records(tmp_path / "two")
    assert one == two and (tmp_path / "two" / "figures" / "tiny_multi-stories.png").is_file()
