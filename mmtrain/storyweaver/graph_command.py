"""`python -m mmtrain data story-graph FOLDER`: the Character-Graph of each story world in a folder, as JSON, with a
report: who is in it, which mentions of the captions mean whom, and whether all prompts come out of the graph."""

import argparse
import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, get_args

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from mmtrain.config_errors import UserError
from mmtrain.story import Frame, StoryFault, World
from mmtrain.storyweaver.captioners import FileCaptioner, VisionLanguageCaptioner
from mmtrain.storyweaver.graph import CharacterGraph, Picture, Portraits
from mmtrain.storyweaver.link_grammar import LinkGrammarParser
from mmtrain.storyweaver.matching import ClassRetriever
from mmtrain.storyweaver.parsing import RuleParser
from mmtrain.storyweaver.scene import Captioner, Parser, Scope

# A room knows no data module. As configs do it for training, the reader is named here and imported when the verb runs.
READER = "datamodules.story_folder"
FILE = "graph.json"
PARSERS = {"rule": RuleParser, "link-grammar": LinkGrammarParser}
MOST_SHOWN = 20


class Source(NamedTuple):
    """A picture of a world's folder: its caption's file and first line, and the same as a frame."""

    path: Path
    caption_path: Path
    raw: str
    frame: Frame

    @property
    def key(self) -> str:
        return f"{self.path.parent.name}/{self.path.stem}"


@dataclass
class Report:
    """What was found in a graph; lists hold lines that begin with a file's name.

    Args:
        num_prompts: prompts that are as they should be. differing: those that are not.
        means: number of mentions by the character they mean.
        ambiguous, unmatched: mentions that may mean several characters, or mean none.
        disagreeing: pictures whose mentions mean others than the tags name.
    """

    num_prompts: int = 0
    differing: list[str] = field(default_factory=list)
    means: Counter[str] = field(default_factory=Counter)
    ambiguous: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    disagreeing: list[str] = field(default_factory=list)

    @property
    def num_mentions(self) -> int:
        return self.means.total() + len(self.ambiguous) + len(self.unmatched)


def main(argv: list[str]) -> int:
    """Build, write and report.

    Returns:
        0; 1 if a prompt does not come out of its graph, with --check also if a mention is ambiguous or tags disagree.

    Raises:
        UserError: see `datamodules.story_folder.read_world`; several worlds for one --out; no such parser or model.
    """
    arguments = _arguments(argv)
    reader = importlib.import_module(READER)
    worlds = [arguments.world] if arguments.world else world_names(arguments.folder)
    if arguments.out and len(worlds) > 1:
        raise UserError(f"--out {arguments.out}: the folder has {len(worlds)} worlds: name one by --world")
    console, code = Console(), 0
    for name in worlds:
        tree = reader.read_world(arguments.folder, name)
        for warning in tree.warnings:
            console.print(f"{tree.world.name}: {warning}", style="yellow", markup=False, soft_wrap=True)
        sources = [Source(frame.path, frame.caption_path, frame.raw, frame.frame) for frame in tree.frames]
        graph, report = graph_of(tree.world, sources, arguments.captions, arguments.parser, console)
        show(graph, report, console)
        faults = report.differing + (report.ambiguous + report.disagreeing) * arguments.check
        code = 1 if faults else code
        if not arguments.check:
            path = arguments.out or tree.folder / FILE
            graph.save(path)
            console.print(f"written: {path}", markup=False, soft_wrap=True)
    return code


def world_names(folder: Path) -> list[str | None]:
    """Folders of a tree's worlds, [None] if it has none, for the reader to say what is wrong."""
    train = folder.expanduser() / "train-folder"
    return sorted(path.name for path in train.iterdir() if path.is_dir()) if train.is_dir() else [None]


def graph_of(
    world: World,
    sources: Sequence[Source],
    captions: str = "files",
    parser: str = "rule",
    console: Console | None = None,
) -> tuple[CharacterGraph, Report]:
    """The graph of a world and what is to be said of it.

    Args:
        captions: "files", or the folder of an image-text model, whose captions then stand for the files'.
        parser: a key of PARSERS.
    """
    classes = [character.coarse_class for character in world.characters.values()]
    is_of_files = captions == "files"
    captioner = FileCaptioner({s.path: s.caption_path for s in sources}) if is_of_files else None
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("captions", total=len(sources))
        graph = build_graph(
            world,
            sources,
            captioner or VisionLanguageCaptioner(captions),
            PARSERS[parser](classes),
            is_of_files,
            lambda done: progress.update(bar, completed=done),
        )
    return graph, examine(graph, sources, is_of_files)


def build_graph(
    world: World,
    sources: Sequence[Source],
    captioner: Captioner,
    parser: Parser,
    is_of_files: bool = True,
    progress: Callable[[int], None] | None = None,
) -> CharacterGraph:
    """The graph of a world's pictures; portraits are the pictures of one character alone.

    Args:
        is_of_files: the captions are those of the folder, with tags. Else the tags come from `sources`, and what is
            described and happens is composed by eq. (7) and (8).

    Raises:
        StoryFault: a character without a portrait; and see `CharacterGraph.build`.
    """
    portraits = []
    for name, character in world.characters.items():
        alone = tuple(source.path for source in sources if source.frame.names == (name,))
        if not alone:
            raise StoryFault(
                f"{world.name}: no picture shows {name} alone; the graph needs a portrait of each character"
            )
        portraits.append(Portraits(name, alone, character.coarse_class))
    pictures = [Picture(s.key, s.path, None if is_of_files else s.frame.names) for s in sources]
    return CharacterGraph.build(
        portraits,
        captioner,
        parser,
        ClassRetriever(),
        pictures,
        world.name,
        world.style,
        texts="captions" if is_of_files else "graph",
        root=sources[0].path.parents[2] if sources else None,
        progress=progress,
    )


def examine(graph: CharacterGraph, sources: Sequence[Source], is_of_files: bool = True) -> Report:
    """What is to be said of a graph. Prompts are taken from the graph as its file would hold it, and compared with the
    folder's; for captions of a model with the graph's own before."""
    report, kept = Report(), CharacterGraph.from_dict(graph.to_dict(), f"graph of {graph.world}")
    for source in sources:
        name = "/".join(source.caption_path.parts[-3:])
        picture = kept.pictures[source.key]
        wanted = source.frame.prompt if is_of_files else graph.text(source.key).prompt()
        if (prompt := kept.text(source.key).prompt()) == wanted:
            report.num_prompts += 1
        else:
            report.differing.append(f"{name}: {prompt!r} instead of {wanted!r}")
        for mention in picture.mentions:
            if mention.character:
                report.means[mention.character] += 1
            elif mention.candidates:
                report.ambiguous.append(f"{name}: {mention.text!r} may mean {', '.join(mention.candidates)}")
            else:
                report.unmatched.append(f"{name}: {mention.text!r}")
        if not picture.agrees:
            meant = ", ".join(dict.fromkeys(m.character for m in picture.mentions if m.character)) or "nobody"
            report.disagreeing.append(f"{name}: tags name {', '.join(picture.characters)}, the sentence {meant}")
    return report


def show(graph: CharacterGraph, report: Report, console: Console) -> None:
    """Print the characters, and what is to be said."""
    table = Table("character", "class", "attributes", "pictures", "mentions", title=graph.world, title_justify="left")
    shown = Counter(name for picture in graph.pictures.values() for name in picture.characters)
    for name, entry in graph.vocabulary.entries.items():
        cells = (name, entry.coarse_class, ", ".join(entry.phrases), str(shown[name]), str(report.means[name]))
        table.add_row(*map(escape, cells))
    console.print(table)
    scopes = Counter(relation.scope for picture in graph.pictures.values() for relation in picture.relations)
    lines = [f"{scopes.total():,} relations: {', '.join(f'{scopes[scope]:,} {scope}' for scope in get_args(Scope))}"]
    matched, total = report.means.total(), report.num_mentions
    lines.append(f"{matched:,} of {total:,} mentions mean a character of this world")
    lists = {"ambiguous": report.ambiguous, "no character of this world": report.unmatched}
    num_pictures = len(graph.pictures)
    agreeing = num_pictures - len(report.disagreeing)
    for title, found in lists.items():
        lines += [f"{len(found)} {title}", *_clipped(found)] if found else []
    lines += [f"{agreeing:,} of {num_pictures:,} pictures: tags and mentions agree", *_clipped(report.disagreeing)]
    lines += [f"{report.num_prompts:,} of {num_pictures:,} prompts come out of the graph", *_clipped(report.differing)]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _clipped(lines: Sequence[str]) -> list[str]:
    more = [f"  and {len(lines) - MOST_SHOWN} more"] if len(lines) > MOST_SHOWN else []
    return [f"  {line}" for line in lines[:MOST_SHOWN]] + more


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mmtrain data story-graph", description=__doc__)
    parser.add_argument("folder", type=Path, help="tree in the layout of TBC-Bench: train-folder/<World>/...")
    parser.add_argument("--world", help="only this one; default: all in the folder")
    parser.add_argument("--out", type=Path, help=f"file to write; default: {FILE} in the world's folder")
    parser.add_argument("--parser", choices=PARSERS, default="rule", help="who reads the captions")
    parser.add_argument(
        "--captions", default="files", help="files, or the folder of an image-text model to ask instead"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 also for what is ambiguous")
    return parser.parse_args(argv)
