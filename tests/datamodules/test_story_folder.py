"""Reading a story world's folder: what is found, in which order, and what is said about files that do not fit."""

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from datamodules.story_folder import CLASS_FILE, TBC_BENCH, read_story, read_world
from mmtrain.story import StoryFault
from tests.datamodules.story_worlds import FOLDER, write, write_world

BENCH = os.environ.get("MMTRAIN_TBC_BENCH")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_world(tmp_path / "root", frames=2, pairs=2)


def test_the_tree_is_read_in_the_order_of_numbers(tmp_path) -> None:
    found = read_world(write_world(tmp_path, characters=3, frames=12, pairs=3), "tiny")
    assert found.world.name == "tiny" and found.world.style == "Flat cartoon style." and not found.warnings
    assert found.world.characters["Bo"].coarse_class == "snow owl"
    assert [(f.group, int(f.path.stem)) for f in found.frames] == [
        *((name, i) for name in ("Ada", "Bo", "Cy") for i in range(12)),
        *(("Multi", i) for i in range(3)),
    ]
    assert all(f.caption_path.stem == f.path.stem and f.caption_path.parent.name == f.group for f in found.frames)
    two = found.frames[-3]
    assert two.frame.names == ("Bo", "Ada")  # as tagged, which is from left to right
    assert two.raw == "<style> A snow owl and a fox stand in the snow. <Bo> <Ada>"
    assert two.frame.prompt == (
        "Flat cartoon style. A snow owl and a fox stand in the snow. This blue owl has large eyes. "
        "This red fox wears a green hat."
    )
    stories = [(s.kind, s.character, s.name, len(s.lines)) for s in found.stories]
    assert stories[:2] == [("single", "Ada", "Ada_1", 3), ("single", "Ada", "Ada_2", 3)]
    assert stories[-1] == ("multi", None, "multi_2", 3) and len(stories) == 8
    assert [prompt.names for prompt in found.prompts] == [("Ada",), ("Bo",)]
    assert found.prompts[0].style == found.world.style  # written out in the file


def test_pictures_and_captions_are_matched_by_stem_whatever_the_case(root) -> None:
    image, caption = (root / "train-folder" / FOLDER / kind / "Ada" for kind in ("image", "caption"))
    (image / "0.png").rename(image / "Frame_A.PNG")
    (caption / "0.txt").rename(caption / "frame_a.TXT")
    write(image / ".hidden.png", "not looked at")
    write(image / "notes.md", "left out")
    found = read_world(root)
    assert [f.path.name for f in found.frames[:2]] == ["1.png", "Frame_A.PNG"]
    (warning,) = found.warnings
    assert "left out" in warning and warning.endswith(f"{'image'}/Ada/notes.md")


def test_what_has_no_partner_is_left_out_with_one_warning_a_kind(root) -> None:
    world = root / "train-folder" / FOLDER
    for number in (28, 34):  # as in TBC-Bench; the tag names no character
        write(world / "caption" / "Multi" / f"{number}.txt", "<style> A fox is standing next to a robot. <Multi>")
    shutil.copy(world / "image" / "Bo" / "0.png", world / "image" / "Bo" / "7.png")
    shutil.rmtree(world / "image" / "Cy")
    found = read_world(root)
    assert Counter(f.group for f in found.frames) == {"Ada": 2, "Bo": 2, "Multi": 2}
    assert found.warnings == [
        "pictures without a caption, left out: image/Bo/7.png",
        "captions without a picture, left out: caption/Cy/0.txt, caption/Cy/1.txt, caption/Multi/28.txt, "
        "caption/Multi/34.txt",
        f"no picture of this character alone: {FOLDER}/image/Cy",
    ]


def rewrite(root: Path, part: str, content: str | bytes) -> None:
    """Put other content into a file; W, S and P stand for the folders of pictures, stories and prompts."""
    first, _, rest = part.partition("/")
    first = {
        "W": f"train-folder/{FOLDER}",
        "S": f"eval-plot/eval_new_story/{FOLDER}",
        "P": f"eval-plot/eval_train/each/{FOLDER}",
    }.get(first, first)
    path = root / first / rest
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        ("W/caption/Bo/1.txt", "<style> An owl runs. <Boo>", r"caption/Bo/1\.txt: unknown tag <Boo>; nearest: Bo"),
        ("W/caption/Multi/0.txt", "<style> Foxes. <Ada> <Ada>", r"Multi/0\.txt: the tag <Ada> stands twice"),
        ("W/caption/Ada/0.txt", " \n", r"Ada/0\.txt: the caption is empty"),
        ("W/caption/Ada/0.txt", "<style> <Ada>", r"Ada/0\.txt: has no event"),
        ("W/caption/Ada/0.txt", "<style> A fox runs. <Bo>", r"Ada/0\.txt: has <Bo>; pictures in folder Ada show"),
        ("W/caption/Multi/0.txt", "<style> A beach.", r"Multi/0\.txt: names no character"),
        ("W/caption/Ada/0.txt", "<style> Ad\xe9lie. <Ada>".encode("latin-1"), r"Ada/0\.txt: not UTF-8 .*byte 10"),
        ("W/image/Cy/1.png", b"", r"image/Cy/1\.png: does not open as a picture \(0 bytes\)"),
        ("W/image/Cy/1.png", b"\x89PNG" + bytes(99), r"image/Cy/1\.png: does not open as a picture"),
        ("W/image/Cy/1.jpg", b"x", r"Cy/1\.png: has the same name as 1\.jpg"),
        ("W/image/Adda/1.png", b"x", r"image/Adda: no character of tiny and not Multi; nearest: Ada"),
        ("W/style.txt", "\n", r"style\.txt: is empty"),
        ("W/character/Dee.txt", "A dinosaur.", r"characters\.json: Tiny_World\.coarse_class: has no words for Dee"),
        ("characters.json", "{", r"characters\.json: not JSON"),
        ("characters.json", '{"Tiny_World": ["Ada"]}', r"characters\.json: must be \{"),
        ("S/Single/Bo/1.txt", "<style> Owls.\n", r"Bo/1\.txt: line 1: a story of Bo"),
        ("S/Multi/all/2.txt", "\n", r"all/2\.txt: no lines in it"),
        ("S/Multi/all/2.txt", "\n<style> It.", r"all/2\.txt: line 2: names no"),
        ("S/Single/Booo/1.txt", "x", r"Single/Booo: no character of tiny; nearest: Bo"),
        ("P/1.txt", "<style> A fox. <Ad>", r"Tiny_World/1\.txt: line 1: unknown tag"),
    ],
)  # fmt: skip
def test_a_fault_names_its_file(root, part, content, message) -> None:
    rewrite(root, part, content)
    with pytest.raises(StoryFault, match=message):
        read_world(root)


def test_five_faults_are_told_at_once(root) -> None:
    for name in ("Ada", "Bo", "Cy"):
        for number in range(2):
            rewrite(root, f"W/caption/{name}/{number}.txt", f"<style> It runs. <Zed> <{name}>")
    rewrite(root, "P/1.txt", "<style> It runs. <Zed>")
    with pytest.raises(StoryFault) as fault:
        read_world(root)
    told = str(fault.value).splitlines()
    assert len(told) == 6 and told[-1] == "and 2 more of such faults"
    assert all("unknown tag <Zed>; characters of tiny: Ada, Bo, Cy" in line for line in told[:5])


def test_where_the_coarse_classes_come_from(root) -> None:
    own = root / "train-folder" / FOLDER / CLASS_FILE
    write(root / "characters.json", json.dumps({"Other": {"coarse_class": {}}}))
    with pytest.raises(StoryFault, match=re.escape(f"{own}: no such file") + '.*{"Ada": "words", "Bo": "words"}'):
        read_world(root)
    write(own, json.dumps({"Ada": "vixen", "Bo": "owl", "cy": "robot"}))
    with pytest.raises(StoryFault, match="has no words for Cy; has some for cy"):
        read_world(root)
    write(own, json.dumps({"Ada": "vixen", "Bo": "owl", "Cy": "robot"}))
    assert read_world(root).world.characters["Ada"].coarse_class == "vixen"
    assert read_world(root).world.name == "tiny_world"  # no short name: the folder's


def test_tbc_bench_needs_no_file_of_classes(tmp_path) -> None:
    world = tmp_path / "train-folder" / "Pororo_the_Little_Penguin"
    write(world / "style.txt", "2.5D cartoon style.")
    write(world / "character" / "Petty.txt", "This penguin is blue.")
    found = read_world(tmp_path)
    assert found.world.name == "pororo" and found.world.characters["Petty"].coarse_class == "Adélie penguin"
    assert found.frames == [] and found.stories == []
    assert {name: len(about["coarse_class"]) for name, about in TBC_BENCH.items()} == {
        "Pororo_the_Little_Penguin": 9,
        "Frozen": 5,
    }


def test_the_world_is_found_by_its_names_and_wrong_folders_get_a_hint(root) -> None:
    write(root / "train-folder" / "My Second" / "style.txt", "x")
    for name in ("tiny", "Tiny", FOLDER, "tiny_WORLD"):
        assert read_world(root, name).world.name == "tiny"
    with pytest.raises(StoryFault, match=r"data\.world: say which .*: My Second \(my_second\), Tiny_World \(tiny\)"):
        read_world(root)
    with pytest.raises(StoryFault, match=r"tinny: .* has no such world; nearest: tiny; there are"):
        read_world(root, "tinny")
    train = root / "train-folder"
    for given, hint in [
        (train, f"this is train-folder: give {root}"),
        (train / FOLDER, f"this is a world's folder: give {root}"),
        (root.parent, f"give {root}"),
        (root / "eval-plot", "looked for train-folder/<World>/style.txt.*there is: eval_new_story, eval_train"),
        (root / "nowhere", "no such folder"),
    ]:
        with pytest.raises(StoryFault, match=hint):
            read_world(given, "tiny")


def test_a_story_file_of_the_users_may_have_comments_and_lines_without_tags(root, tmp_path) -> None:
    path, world = tmp_path / "mine.txt", read_world(root).world
    path.write_bytes("\ufeff# My story\r\n\r\n<style> A fox runs. <Ada>\r\n  A beach at night.\r\n".encode())
    lines = read_story(path, world, tagged=False)
    assert [frame.prompt for frame in lines] == [
        "Flat cartoon style. A fox runs. This red fox wears a green hat.",
        "A beach at night.",
    ]
    with pytest.raises(StoryFault, match="line 4: names no character"):
        read_story(path, world)
    with pytest.raises(StoryFault, match=r"none\.txt: No such file"):
        read_story(tmp_path / "none.txt", world)


@pytest.mark.skipif(not BENCH, reason="MMTRAIN_TBC_BENCH names no folder")
@pytest.mark.parametrize(
    ("world", "single", "two", "characters", "lines", "prompts", "warnings"),
    [("pororo", 114, 37, 9, (405, 89), 9, 1), ("frozen", 58, 28, 5, (225, 91), 8, 0)],
)
def test_the_counts_of_tbc_bench(world, single, two, characters, lines, prompts, warnings) -> None:
    found = read_world(BENCH, world)
    sizes = Counter(len(frame.frame.names) for frame in found.frames)
    assert sizes == {1: single, 2: two} and len(found.world.names) == characters
    told = Counter()
    for story in found.stories:
        told[story.kind] += len(story.lines)
    assert (told["single"], told["multi"]) == lines and len(found.prompts) == prompts
    assert len(found.warnings) == warnings
    if warnings:
        assert found.warnings[0].endswith("caption/Multi/28.txt, caption/Multi/34.txt")
    assert found.frames[0].path.stem == "0" and found.frames[2].path.stem == "2"
