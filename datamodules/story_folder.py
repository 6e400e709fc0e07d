"""A story world's folder, in the layout of TBC-Bench (StoryWeaver, arXiv 2412.07375): read, and checked as a whole.

<root>/train-folder/<World>/style.txt                              one line
                            character/<Name>.txt                   one line: how the character looks
                            image/<Name or Multi>/<n>.png          pictures with one character, or with several
                            caption/<Name or Multi>/<n>.txt        one line, see `mmtrain.story.parse_caption`
<root>/eval-plot/eval_new_story/<World>/Single/<Name>/<n>.txt      stories, one prompt a line
                                        Multi/all/<n>.txt
<root>/eval-plot/eval_train/each/<World>/<n>.txt                   prompts for validation
<root>/characters.json  or  train-folder/<World>/coarse_class.json the characters' coarse classes
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from datamodules.story_files import Faults, by_stem, first_line, folders, listed, read_json, read_text
from mmtrain.config_errors import nearest
from mmtrain.story import Character, Frame, StoryFault, World, parse_caption

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
MULTI = "Multi"  # the group of pictures with several characters
CHARACTERS_FILE, CLASS_FILE = "characters.json", "coarse_class.json"
TBC_BENCH = {  # in the original these stand in program code, so that its folder has no file of them
    "Pororo_the_Little_Penguin": {
        "short_name": "Pororo",
        "coarse_class": {
            "Crong": "dinosaur",
            "Eddy": "fox",
            "Harry": "bird",
            "Loopy": "beaver",
            "Petty": "Adélie penguin",
            "Poby": "polar bear",
            "Pororo": "gentoo penguin",
            "Rody": "robot",
            "Tongtong": "dragon",
        },
    },
    "Frozen": {
        "short_name": "Frozen",
        "coarse_class": {
            "Anna": "brown-hair girl",
            "Elsa": "white-hair girl",
            "Kristoff": "man",
            "Olaf": "snowman",
            "Sven": "reindeer",
        },
    },
}


@dataclass(frozen=True)
class TrainingFrame:
    """A picture and what it shows; `group` is the name of its folder: a character, or Multi."""

    path: Path
    caption_path: Path
    raw: str
    frame: Frame
    group: str


@dataclass(frozen=True)
class Story:
    """Prompts that belong together; `character` is None unless the kind is single, `name` is unique in its kind."""

    kind: Literal["single", "multi", "file"]
    character: str | None
    name: str
    path: Path
    lines: list[Frame]


@dataclass
class StoryFolder:
    """What a world's folder holds.

    Attributes:
        folder: `<root>/train-folder/<World>`.
        frames: group after group in the characters' order, then Multi; by number within a group.
        prompts: for validation.
        warnings: what was left out, one line for each kind.
    """

    root: Path
    folder: Path
    world: World
    frames: list[TrainingFrame] = field(default_factory=list)
    stories: list[Story] = field(default_factory=list)
    prompts: list[Frame] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_world(root: str | Path, world: str | None = None) -> StoryFolder:
    """Read a world's texts and look whether its pictures are pictures; none is decoded.

    Args:
        root: folder with `train-folder` and `eval-plot`; the latter may lack.
        world: name of its folder or its short name, in any case of letters; None if there is only one.

    Raises:
        StoryFault: no such world, or up to five faults of its files: an unknown tag, one that stands twice, an empty
            caption, text that is not UTF-8, a file that is no picture.
    """
    root = Path(root).expanduser()
    folder, faults = find_world(root, world), Faults()
    found = StoryFolder(root, folder, _describe(root, folder, faults))
    found.frames = _frames(folder, found.world, faults)
    found.stories = _stories(root / "eval-plot" / "eval_new_story" / folder.name, found.world, faults)
    for path in by_stem(root / "eval-plot" / "eval_train" / "each" / folder.name, (".txt",), faults).values():
        found.prompts += _lines(path, found.world, faults)
    faults.tell()
    found.warnings = faults.warnings()
    return found


# --- finding the folder ---


def find_world(root: Path, world: str | None) -> Path:
    """`<root>/train-folder/<World>`.

    Raises:
        StoryFault: it is not there; says what is.
    """
    if not root.is_dir():
        raise StoryFault(f"data.path: {root}: no such folder")
    train = root / "train-folder"
    if not train.is_dir():
        raise StoryFault(f"data.path: {root}: has no train-folder in it; {_hint(root)}")
    names = folders(train)
    short = {name: short_name(root, name) for name in names}
    if world is None and len(names) == 1:
        return train / names[0]
    wanted = (world or "").casefold()
    for name in names:
        if wanted and wanted in (name.casefold(), short[name], _slug(name)):
            return train / name
    there = listed([f"{name} ({short[name]})" for name in names]) or "no folders"
    if world is None:
        raise StoryFault(f"data.world: say which world of {train}: {there}")
    guess = nearest(world, [*names, *short.values()])
    meant = f"; nearest: {guess}" if guess else ""
    raise StoryFault(f"data.world: {world}: {train} has no such world{meant}; there are: {there}")


def short_name(root: Path, folder_name: str) -> str:
    """A world's name in metrics: that of `characters.json` or of TBC-Bench, else the folder's; lower case.

    >>> short_name(Path("."), "My World 2")
    'my_world_2'
    """
    described = _entry(root, folder_name) or TBC_BENCH.get(folder_name, {})
    name = _slug(str(described.get("short_name") or folder_name))
    if not name:
        raise StoryFault(
            f"{root / CHARACTERS_FILE}: give the world {folder_name} a short_name of letters a to z and digits"
        )
    return name


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def _hint(root: Path) -> str:
    """Where the tree's root may be instead."""
    for parent, what in ((root.parent, "train-folder"), (root.parent.parent, "a world's folder")):
        if (parent / "train-folder").is_dir() and root.is_relative_to(parent / "train-folder"):
            return f"this is {what}: give {parent}"
    inside = sorted(path.parent for path in root.glob("*/train-folder"))
    if inside:
        return f"give {inside[0]}"
    there = listed(sorted(path.name for path in root.iterdir())) or "nothing"
    return f"looked for train-folder/<World>/style.txt and the rest of TBC-Bench's tree, there is: {there}"


# --- style, characters, coarse classes ---


def _describe(root: Path, folder: Path, faults: Faults) -> World:
    """Its faults come alone: without characters every caption would be one more."""
    style, characters = "", {}
    with faults.collected():
        style = first_line(folder / "style.txt")
    files = {path.stem: path for path in by_stem(folder / "character", (".txt",), faults).values()}
    if not files:
        faults.messages.append(f"{folder / 'character'}: no files <Name>.txt with a line on how the character looks")
    else:
        with faults.collected():
            classes = _coarse_classes(root, folder, list(files))
            for name, path in files.items():
                with faults.collected():
                    characters[name] = Character(name, classes[name], first_line(path))
    faults.tell()
    return World(short_name(root, folder.name), style, characters)


def _coarse_classes(root: Path, folder: Path, names: Sequence[str]) -> dict[str, str]:
    own = folder / CLASS_FILE
    if (entry := _entry(root, folder.name)) is not None:
        where, classes = f"{root / CHARACTERS_FILE}: {folder.name}.coarse_class", entry.get("coarse_class")
    elif own.exists():
        where, classes = str(own), read_json(own)
    elif folder.name in TBC_BENCH:
        where, classes = f"{folder}: TBC-Bench's coarse classes", TBC_BENCH[folder.name]["coarse_class"]
    else:
        example = json.dumps(dict.fromkeys(names[:2], "words"), ensure_ascii=False)
        raise StoryFault(
            f"{own}: no such file, and no {root / CHARACTERS_FILE} that tells of this world: write by what words event "
            f"sentences call each character, as {example}"
        )
    if not isinstance(classes, dict):
        raise StoryFault(f"{where}: must be an object of names and words, is {classes!r}")
    for name in names:
        words = classes.get(name)
        if not isinstance(words, str) or not words.strip():
            guess = None if name in classes else nearest(name, classes)
            raise StoryFault(f"{where}: has no words for {name}" + (f"; has some for {guess}" if guess else ""))
    return {name: classes[name].strip() for name in names}


def _entry(root: Path, folder_name: str) -> dict[str, Any] | None:
    """What `characters.json` says of a world; None if it says nothing or is not there."""
    path = root / CHARACTERS_FILE
    described = read_json(path) if path.exists() else {}
    entry = described.get(folder_name) if isinstance(described, dict) else described
    if entry is not None and not isinstance(entry, dict):
        raise StoryFault(f'{path}: must be {{"{folder_name}": {{"short_name": ..., "coarse_class": {{...}}}}}}')
    return entry


# --- pictures with captions ---


def _frames(folder: Path, world: World, faults: Faults) -> list[TrainingFrame]:
    groups = [*world.names, MULTI]
    for kind in ("image", "caption"):
        for name in folders(folder / kind):
            if name not in groups:
                guess = nearest(name, groups)
                hint = f"nearest: {guess}" if guess else f"there are: {', '.join(groups)}"
                faults.messages.append(f"{folder / kind / name}: no character of {world.name} and not {MULTI}; {hint}")
    frames = []
    for group in groups:
        captions = by_stem(folder / "caption" / group, (".txt",), faults)
        pictures = by_stem(folder / "image" / group, PICTURES, faults)
        for stem, picture in pictures.items():
            if stem not in captions:
                faults.note("pictures without a caption, left out", picture)
                continue
            with faults.collected():
                frames.append(_frame(picture, captions[stem], group, world, faults))
        for stem, caption in captions.items():
            if stem not in pictures:
                faults.note("captions without a picture, left out", caption)
    shown = {frame.group for frame in frames}
    for name in world.names if frames else ():
        if name not in shown:
            faults.note("no picture of this character alone", folder / "image" / name)
    return frames


def _frame(picture: Path, caption: Path, group: str, world: World, faults: Faults) -> TrainingFrame:
    lines = [line for line in read_text(caption).splitlines() if line.strip()]
    if not lines:
        raise StoryFault(f"{caption}: the caption is empty")
    if len(lines) > 1:
        faults.note("captions of more than one line, of which the first counts", caption)
    frame = parse_caption(lines[0], world, str(caption))
    if group != MULTI and frame.names != (group,):
        tags = " ".join(f"<{name}>" for name in frame.names) or "no tag"
        raise StoryFault(f"{caption}: has {tags}; pictures in folder {group} show <{group}> alone, else use {MULTI}")
    if not frame.names:
        raise StoryFault(
            f"{caption}: names no character; tags such as <{world.names[0]}> belong at the end of the line"
        )
    _check_picture(picture)
    return TrainingFrame(picture, caption, lines[0].strip(), frame, group)


def _check_picture(path: Path) -> None:
    try:
        with Image.open(path):
            pass
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise StoryFault(f"{path}: does not open as a picture ({path.stat().st_size} bytes)") from error


# --- stories ---


def _stories(folder: Path, world: World, faults: Faults) -> list[Story]:
    stories = []
    for name in folders(folder / "Single"):
        if name not in world.characters:
            guess = nearest(name, world.names)
            hint = f"; nearest: {guess}" if guess else ""
            faults.messages.append(f"{folder / 'Single' / name}: no character of {world.name}{hint}")
    for kind, name, part in [*(("single", n, f"Single/{n}") for n in world.names), ("multi", None, f"{MULTI}/all")]:
        for path in by_stem(folder / part, (".txt",), faults).values():
            lines = _lines(path, world, faults, only=name)
            stories.append(Story(kind, name, f"{name or 'multi'}_{path.stem}", path, lines))
    return stories


def read_story(path: Path, world: World, tagged: bool = True) -> list[Frame]:
    """The lines of a story; blank ones and those that begin with # are skipped.

    Args:
        tagged: every line must name a character.

    Raises:
        StoryFault: no such file, no lines, or lines that are no captions of this world; tells up to five.
    """
    faults = Faults()
    frames = _lines(path, world, faults, tagged)
    faults.tell()
    return frames


def _lines(path: Path, world: World, faults: Faults, tagged: bool = True, only: str | None = None) -> list[Frame]:
    """Frames of a file's lines; with `only` each must name this character and no other."""
    frames, lines = [], []
    with faults.collected():
        lines = list(enumerate(read_text(path).splitlines(), start=1))
        lines = [(number, line) for number, line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not lines:
            raise StoryFault(f"{path}: no lines in it")
    for number, line in lines:
        where = f"{path}: line {number}"
        with faults.collected():
            frame = parse_caption(line, world, where)
            if only is not None and frame.names != (only,):
                raise StoryFault(f"{where}: a story of {only} alone has the one tag <{only}> on each line")
            if tagged and not frame.names:
                raise StoryFault(f"{where}: names no character; tags belong at the end of the line")
            frames.append(frame)
    return frames
