"""`python -m mmtrain data story-graph` on a small world's folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmtrain.__main__ import main
from mmtrain.storyweaver.graph import CharacterGraph
from tests.datamodules.story_worlds import FOLDER, write_world

VERB = ["data", "story-graph"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_world(tmp_path / "tree", stories=1, lines=1, size=(8, 14))


def caption(tree: Path, group: str = "Multi", number: int = 0) -> Path:
    return tree / "train-folder" / FOLDER / "caption" / group / f"{number}.txt"


def test_the_graph_is_written_and_reported(tree, capsys):
    assert main([*VERB, str(tree)]) == 0
    shown = capsys.readouterr().out
    path = tree / "train-folder" / FOLDER / "graph.json"
    assert f"written: {path}" in shown.replace("\n", "")
    graph = CharacterGraph.load(path)
    assert f"{len(graph.pictures)} of {len(graph.pictures)} prompts come out of the graph" in shown
    assert f"{len(graph.pictures)} of {len(graph.pictures)} pictures: tags and mentions agree" in shown
    assert graph.vocabulary.names == ["Ada", "Bo", "Cy"]
    assert graph.vocabulary.entries["Ada"].phrases == ["red fox", "green hat"]
    assert graph.vocabulary.entries["Ada"].portraits[0].startswith("image/Ada/")


def test_findings_are_told_by_file_and_checked(tree, capsys):
    caption(tree).write_text("<style> A snow owl, a horse and a small dragon run. <Bo> <Ada>")
    assert main([*VERB, str(tree), "--check"]) == 1
    shown = capsys.readouterr().out
    assert "caption/Multi/0.txt: tags name Bo, Ada, the sentence Bo" in shown
    assert "caption/Multi/0.txt: 'horse'" in shown
    assert not list(tree.rglob("graph.json"))
    assert main([*VERB, str(tree), "--out", str(tree / "g" / "x.json")]) == 0  # as all prompts come out
    picture = json.loads((tree / "g" / "x.json").read_text())["pictures"]["Multi/0"]
    assert picture["characters"] == ["Bo", "Ada"] and picture["event"].startswith("A snow owl")


def test_mistakes_of_the_user(tree, tmp_path, capsys):
    assert main([*VERB, str(tmp_path / "nothing")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main([*VERB, str(tree), "--world", "tony"]) == 2
    assert "nearest: tiny" in capsys.readouterr().err
    assert main([*VERB, str(tree), "--captions", str(tmp_path)]) == 2
    assert "no folder of a model" in capsys.readouterr().err
    assert main([*VERB, str(tree), "--parser", "rules"]) == 2
    assert "invalid choice" in capsys.readouterr().err
    (tree / "train-folder" / "Other").mkdir()
    assert main([*VERB, str(tree), "--out", "x.json"]) == 2
    assert "2 worlds: name one by --world" in capsys.readouterr().err
    for picture in (tree / "train-folder" / FOLDER / "image" / "Ada").iterdir():
        picture.unlink()
    assert main([*VERB, str(tree), "--world", "tiny"]) == 2
    assert "no picture shows Ada alone" in capsys.readouterr().err


def test_the_verb_is_listed_and_starts_without_torch(capsys):
    assert main(["--help"]) == 0
    assert "data story-graph" in capsys.readouterr().out
    heavy = "{'torch', 'lightning', 'transformers'}"
    code = f"import sys, mmtrain.storyweaver.graph_command; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
