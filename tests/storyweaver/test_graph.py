"""The Character-Graph: the paper's worked case, the released prompts out of the graph and its file, bad files."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmtrain.config_errors import UserError
from mmtrain.story import Character, StoryFault, World, parse_caption
from mmtrain.storyweaver.captioners import FileCaptioner, VisionLanguageCaptioner
from mmtrain.storyweaver.graph import CharacterGraph, Picture, Portraits
from mmtrain.storyweaver.matching import ClassRetriever
from mmtrain.storyweaver.parsing import RuleParser
from mmtrain.storyweaver.scene import DESCRIBE_CHARACTER, DESCRIBE_FRAME, AmbiguousMention, NoMatch, Relation

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/storyweaver/prompts.json").read_text(encoding="utf-8"))
LOOPY = "This pink beaver has reddish round nose, wearing pink and white dress with a flower barrette on her head."
SKIING = "a polar bear and a beaver are skiing together on a snowy mountain"


class Texts:
    """A captioner that knows texts by the picture's path, of characters by the name of its folder."""

    def __init__(self, characters: dict[str, str], frames: dict[str, str]) -> None:
        self.characters, self.frames = characters, frames

    def caption(self, image: Path, instruction: str) -> str:
        is_character = instruction == DESCRIBE_CHARACTER
        return self.characters[image.parent.name] if is_character else self.frames[image.as_posix()]


def world_of(name: str) -> World:
    about = GOLDEN["worlds"][name]
    cast = {n: Character(n, c, about["description"][n]) for n, c in about["coarse_class"].items()}
    return World(name, about["style"], cast)


def golden_graph(name: str) -> tuple[CharacterGraph, dict[str, dict[str, Any]]]:
    """The graph of a benchmark's world, made of its 237 training captions, and their golden rows by key."""
    world = world_of(name)
    rows = {row["file"].split("caption/")[1].removesuffix(".txt"): row for row in GOLDEN["rows"] if is_of(row, name)}
    texts = Texts({n: c.description for n, c in world.characters.items()}, {k: row["raw"] for k, row in rows.items()})
    portraits = [Portraits(n, (Path(n, "0.png"),), c.coarse_class) for n, c in world.characters.items()]
    parser = RuleParser([c.coarse_class for c in world.characters.values()])
    pictures = [Picture(key, Path(key)) for key in rows]
    return CharacterGraph.build(portraits, texts, parser, ClassRetriever(), pictures, name, world.style), rows


def is_of(row: dict[str, Any], name: str) -> bool:
    return row["kind"] == "train" and row["world"] == name


@pytest.fixture(scope="module")
def pororo() -> tuple[CharacterGraph, dict[str, dict[str, Any]]]:
    return golden_graph("Pororo")


@pytest.fixture(scope="module")
def frozen() -> tuple[CharacterGraph, dict[str, dict[str, Any]]]:
    return golden_graph("Frozen")


def test_all_released_prompts_come_out_of_the_graph_that_was_written_and_read(pororo, frozen, tmp_path):
    num_prompts = 0
    for graph, rows in (pororo, frozen):
        graph.save(tmp_path / "of" / "graph.json")
        kept = CharacterGraph.load(tmp_path / "of" / "graph.json")
        assert kept == graph
        for key, row in rows.items():
            text = kept.text(key)
            assert zlib.crc32(text.prompt().encode()) == row["text_crc32"], (key, text.prompt())
            assert text.frame == parse_caption(row["raw"], graph.as_world(), key)
            num_prompts += 1
    assert num_prompts == 237


def test_prompts_are_made_of_what_the_graph_holds(pororo):
    content = pororo[0].to_dict()
    content["style"] = "Oil painting."
    content["characters"]["Loopy"]["description"] = "A brown beaver."
    content["pictures"]["Multi/1"] |= {"event": "They run.", "characters": ["Crong", "Loopy"]}
    dinosaur = pororo[0].vocabulary.entries["Crong"].description
    prompt = CharacterGraph.from_dict(content).text("Multi/1").prompt()
    assert prompt == f"Oil painting. They run. {dinosaur} A brown beaver."


def test_mentions_of_the_benchmark_mean_the_tagged_characters(pororo, frozen):
    others = ["charizard", "horse", "person", "white horse"]
    for (graph, _), counts in ((pororo, (188, ["toy monkey"])), (frozen, (114, others))):
        mentions = [mention for picture in graph.pictures.values() for mention in picture.mentions]
        strangers = sorted(mention.text for mention in mentions if not mention.character)
        assert (sum(mention.character is not None for mention in mentions), strangers) == counts
        assert all(picture.agrees for picture in graph.pictures.values())
    (penguin,) = (m for m in pororo[0].pictures["Multi/38"].mentions if m.text == "blue penguin")
    assert penguin.character == "Pororo"  # by what it wears, as its class is not said


def worked_case() -> tuple[CharacterGraph, RuleParser]:
    texts = Texts({"Loopy": LOOPY, "Poby": "This polar bear has black round nose."}, {"1.png": SKIING})
    parser = RuleParser(["beaver", "polar bear"])
    portraits = [Portraits("Loopy", (Path("Loopy/0.png"),)), Portraits("Poby", (Path("Poby/0.png"),))]
    pictures = [Picture("1", Path("1.png"))]
    return CharacterGraph.build(portraits, texts, parser, ClassRetriever(), pictures, "w", "Cartoon style."), parser


def test_worked_case_of_the_paper_s_figure():
    graph, _ = worked_case()
    loopy = graph.vocabulary.entries["Loopy"]
    assert loopy.coarse_class == "beaver"  # told by its caption, as none was given
    assert set(loopy.phrases) == {"pink beaver", "reddish round nose", "flower barrette", "pink and white dress"}
    picture = graph.pictures["1"]
    assert [(m.text, m.character) for m in picture.mentions] == [("polar bear", "Poby"), ("beaver", "Loopy")]
    assert set(picture.relations) == {
        Relation("polar bear", "skiing", "snowy mountain", "char-scene"),
        Relation("beaver", "skiing", "snowy mountain", "char-scene"),
        Relation("polar bear", "skiing with", "beaver", "char-char"),
    }
    assert Relation("Poby", "skiing with", "Loopy", "char-char") in graph.relations
    wanted = f"Cartoon style. {SKIING} This polar bear has black round nose. {LOOPY}"
    assert graph.text("1").prompt() == wanted  # a caption without tags gets the style, and characters as mentioned


def test_texts_composed_of_the_graph():
    texts = Texts({"Loopy": f"{LOOPY} It stands on the snow.", "Poby": "A polar bear."}, {"1.png": SKIING + ". Fun!"})
    portraits = [Portraits(name, (Path(name, "0.png"),)) for name in ("Loopy", "Poby")]
    graph = CharacterGraph.build(
        portraits,
        texts,
        RuleParser(["beaver", "polar bear"]),
        ClassRetriever(),
        [Picture("1", Path("1.png"))],
        texts="graph",
    )
    loopy = graph.vocabulary.entries["Loopy"].description
    assert loopy == "This pink beaver has reddish round nose, wearing pink and white dress and flower barrette."
    assert graph.text("1").event.startswith("Polar bear skiing snowy mountain, beaver skiing snowy mountain")


def test_new_sentences_are_read_with_and_without_tags(pororo):
    graph, parser = pororo[0], RuleParser([e.coarse_class for e in pororo[0].vocabulary.entries.values()])
    read = graph.read("The red fox and a penguin play.", parser, ClassRetriever())
    assert read.characters == ("Eddy",)
    assert read.mentions[1].character is None and read.mentions[1].candidates == ("Petty", "Pororo")
    tagged = graph.read("<style>A fox and a robot play. <Rody> <Eddy>", parser, ClassRetriever())
    assert graph.text(tagged).prompt().startswith("2.5D cartoon style.A fox") and tagged.characters == ("Rody", "Eddy")
    with pytest.raises(StoryFault, match="new: unknown tag <Rodi>; nearest: Rody"):
        graph.read("<style> A robot. <Rodi>", parser, ClassRetriever(), where="new")


@pytest.mark.parametrize(
    ("mention", "name"),
    [
        ("a gentoo penguin", "Pororo"),
        ("Adelie Penguin", "Petty"),
        ("ADÉLIE PENGUINS", "Petty"),
        ("the happy polar bear", "Poby"),
        ("bear", "Poby"),
        ("blue penguin", "Pororo"),
        ("penguin in a purple dress", "Petty"),
        ("robot cat", "Rody"),
        ("Tongtong", "Tongtong"),
    ],
)
def test_who_is_meant(pororo, mention, name):
    assert ClassRetriever().match(mention, pororo[0].vocabulary) == name


def test_who_is_not_told(pororo, frozen):
    retriever, penguins, girls = ClassRetriever(), pororo[0].vocabulary, frozen[0].vocabulary
    for mention, vocabulary, candidates in (
        ("penguin", penguins, ("Petty", "Pororo")),
        ("girl", girls, ("Anna", "Elsa")),
    ):
        with pytest.raises(AmbiguousMention, match=" may mean ") as caught:
            retriever.match(mention, vocabulary)
        assert caught.value.candidates == candidates
    for stranger in ("white horse", "snow", ""):
        with pytest.raises(NoMatch, match="there are: Anna, Elsa, Kristoff"):
            retriever.match(stranger, girls)
    assert ClassRetriever(threshold=0.05).match("large antlers", girls) == "Sven"
    assert [retriever.is_mention(text, girls) for text in ("girl", "white horse", "blue dress", "snow", "Olaf")] == [
        True,
        True,
        False,
        False,
        True,
    ]


def test_text_features_decide_what_words_do_not(frozen):
    vocabulary = frozen[0].vocabulary
    directions = {"princess of ice": (1.0, 0.1), "white-hair": (1.0, 0.0), "brown-hair": (0.7, 0.7)}

    def text_features(texts: list[str]) -> torch.Tensor:
        near = [next((v for k, v in directions.items() if text.startswith(k)), (0.0, 1.0)) for text in texts]
        return torch.tensor(near)

    with_features = ClassRetriever(encoder=SimpleNamespace(text_features=text_features))
    assert with_features.match("princess of ice", vocabulary) == "Elsa"
    directions |= {"girl": (0.9, 0.3)}
    assert with_features.match("girl", vocabulary) == "Elsa"  # among the two girls only
    directions |= {"girl": (0.92, 0.38)}
    with pytest.raises(AmbiguousMention):
        ClassRetriever(encoder=with_features.encoder, margin=0.1).match("girl", vocabulary)


def test_a_character_must_be_told():
    parser, retriever = RuleParser(), ClassRetriever()
    texts = Texts({"Anna": "Anna has fair skin."}, {})
    portrait = Portraits("Anna", (Path("Anna/0.png"),))
    with pytest.raises(StoryFault, match=r"Anna/0\.png: 'Anna has fair skin\.' does not say what Anna is"):
        CharacterGraph.build([portrait], texts, parser, retriever)
    with pytest.raises(StoryFault, match="Anna has no portrait"):
        CharacterGraph.build([Portraits("Anna", ())], texts, parser, retriever)
    with pytest.raises(StoryFault, match="Anna has portraits twice"):
        CharacterGraph.build([Portraits("Anna", portrait.pictures, "girl")] * 2, texts, parser, retriever)
    assert (
        CharacterGraph.build([Portraits("Anna", portrait.pictures, "girl")], texts, parser, retriever).as_world().names
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=2), "format is 2, this version reads 1: build it again"),
        (lambda c: c.pop("style"), "graph.json has no style"),
        (lambda c: c.update(stile=""), "unknown key stile; nearest: style"),
        (lambda c: c.update(pictures=[]), r"pictures is \[\], expected dict"),
        (lambda c: c["characters"]["Poby"].update(description=3), "characters.Poby.description is 3, expected str"),
        (
            lambda c: c["characters"]["Loopy"]["attributes"][0].update(kind="hue"),
            r"attributes\[0\].kind is 'hue', expect",
        ),
        (lambda c: c["pictures"]["1"]["relations"][0].pop("scope"), r"pictures.1.relations\[0\] has no scope"),
        (
            lambda c: c["pictures"]["1"].update(characters=["Lopy"]),
            "pictures.1.characters: unknown tag <Lopy>; nearest",
        ),
        (lambda c: c["pictures"]["1"]["mentions"].append("x"), r"mentions\[2\] is 'x', expected a mapping"),
        (lambda c: c["pictures"]["1"].update(has_style="no"), "has_style is 'no', expected bool"),
    ],
)
def test_a_bad_file_is_refused_by_name_and_key(tmp_path, change: Callable[[dict], None], message):
    content, path = worked_case()[0].to_dict(), tmp_path / "graph.json"
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(StoryFault, match=message) as caught:
        CharacterGraph.load(path)
    assert str(path) in str(caught.value)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "graph.json"
    with pytest.raises(StoryFault, match="cannot be read"):
        CharacterGraph.load(path)
    path.write_text("{")
    with pytest.raises(StoryFault, match="not JSON"):
        CharacterGraph.load(path)
    with pytest.raises(StoryFault, match="has no picture 2"):
        worked_case()[0].text("2")


def test_texts_of_files(tmp_path):
    for name, text in {
        "character/Ada": "A red fox.\nmore",
        "caption/Ada/1": "\ufeff<style> A fox. <Ada>\n",
        "other": " ",
    }.items():
        (tmp_path / f"{name}.txt").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    image = tmp_path / "image" / "Ada" / "1.png"
    assert FileCaptioner().caption(image, DESCRIBE_CHARACTER) == "A red fox."
    assert FileCaptioner().caption(image, DESCRIBE_FRAME) == "<style> A fox. <Ada>"
    with pytest.raises(StoryFault, match=r"other\.txt: is empty"):
        FileCaptioner({image: tmp_path / "other.txt"}).caption(image, DESCRIBE_FRAME)
    with pytest.raises(StoryFault, match=r"2\.png: its text .*caption/Ada/2\.txt cannot be read"):
        FileCaptioner().caption(image.with_name("2.png"), DESCRIBE_FRAME)


def test_a_model_s_captions(tmp_path):
    """A tiny BLIP of random weights, asked with the instruction: alone, and as a message if it has a chat template."""
    with pytest.raises(UserError, match=r"no folder of a model \(config\.json lacks\)"):
        VisionLanguageCaptioner(tmp_path / "nothing")
    image = write_tiny_model(tmp_path / "blip")
    plain = VisionLanguageCaptioner(tmp_path / "blip", max_new_tokens=4).caption(image, "describe this picture")
    assert plain and set(plain.split()) <= {"a", "fox", "bird", "describe", "this", "picture"}
    template = "{% for m in messages %}{% for c in m.content %}{{ c.text if c.type == 'text' }}{% endfor %}{% endfor %}"
    (tmp_path / "blip" / "chat_template.jinja").write_text(template)
    chat = VisionLanguageCaptioner(tmp_path / "blip", max_new_tokens=4).caption(image, "describe this picture")
    assert chat == plain
    (tmp_path / "blip" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="is no image-text-to-text model of transformers"):
        VisionLanguageCaptioner(tmp_path / "blip").caption(image, "describe this picture")


def write_tiny_model(folder: Path) -> Path:
    """A BLIP of one layer in a folder; returns a picture."""
    from PIL import Image
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    folder.mkdir()
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
    words = [*marks, "a", "fox", "bird", "describe", "this", "picture"]
    (folder / "vocab.txt").write_text("\n".join(words))
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**layers, "vocab_size": len(words), "encoder_hidden_size": 16, "max_position_embeddings": 32}
    text |= {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    vision = {**layers, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder)
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    Image.new("RGB", (40, 30), (200, 30, 30)).save(folder / "red.png")
    return folder / "red.png"
