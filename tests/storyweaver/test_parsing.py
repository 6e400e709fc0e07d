"""Scene graphs of captions: by rules, and by a grammar where its program is installed."""

import shutil

import pytest

from mmtrain.config_errors import UserError
from mmtrain.storyweaver.link_grammar import PROGRAM, LinkGrammarParser
from mmtrain.storyweaver.parsing import RuleParser
from mmtrain.storyweaver.scene import Relation, SceneGraph

CLASSES = ["dinosaur", "fox", "bird", "beaver", "Adélie penguin", "polar bear", "robot", "brown-hair girl", "man"]
RULES = RuleParser(CLASSES)
SKIING = "a polar bear and a beaver are skiing together on a snowy mountain"


def triples(scene: SceneGraph) -> list[str]:
    return [f"{r.subject} | {r.predicate} | {r.object} | {r.scope.removeprefix('char-')}" for r in scene.relations]


def attributes(scene: SceneGraph) -> list[str]:
    return [f"{a.subject}: {a.text} ({a.kind})" for a in scene.attributes]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A fox plays xylophone and a robot plays drum in a brown room.", "fox | plays | xylophone | object"),
        ("A fox plays xylophone and a robot plays drum in a brown room.", "robot | plays | brown room | scene"),
        ("A dinosaur is sitting on a sofa and a beaver is next to him.", "beaver | next to | dinosaur | char"),
        ("A man is holding tools with a fox next to him.", "fox | next to | man | char"),
        ("A man is standing by a hut with a bird flying over the house.", "bird | flying over | house | scene"),
        ("In the snowy forest, A fox looks up at the willow tree.", "fox | looks | snowy forest | scene"),
        ("A beaver and a polar bear fish in a frozen lake.", "polar bear | fish | frozen lake | scene"),
        ("A fox, a bird and a man are in a dark, old house", "fox | in | dark old house | scene"),
        ("A fox sits next to a man. They play football.", "fox | play | football | object"),
        ("A Adélie penguin holds a green and grey tennis racket in the snow outside a house at night",
         "Adélie penguin | holds | green and grey tennis racket | object"),
        ("Two robots fight in a cave", "robot | fight | cave | scene"),
        ("A polar bear exercies in a living room", "polar bear | exercies | living room | scene"),
    ],
)  # fmt: skip
def test_relations_by_rules(text, expected):
    assert expected in triples(RULES.parse(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("This pink bird has orange beak with yellow feathers around, blue shirt with big purple bowtie.",
         ["bird: pink (color)", "bird: orange beak (part)", "bird: yellow feathers (part)",
          "bird: blue shirt (clothing)", "bird: big purple bowtie (accessory)"]),
        ("This brown fennec fox with large ears, white feather around black nose, white shirt under blue overalls.",
         ["fox: brown (color)", "fox: fennec (species)", "fox: large ears (part)",
          "fox: white feather around black nose (part)", "fox: white shirt under blue overalls (clothing)"]),
        ("Tongtong is an orange dragon with two horn wears green jacket and black shoes.",
         ["Tongtong: dragon (species)", "Tongtong: orange (color)", "Tongtong: two horn (part)",
          "Tongtong: green jacket (clothing)", "Tongtong: black shoes (clothing)"]),
        ("A beaver in a pink apron and chef hat stands in a kitchen.",
         ["beaver: pink apron (clothing)", "beaver: chef hat (accessory)"]),
        ("A man and a brown-hair girl in purple dress smile at the sea, looking happy.",
         ["brown-hair girl: purple dress (clothing)", "man: happy (other)", "brown-hair girl: happy (other)"]),
        ("A man wears a ring, the sea behind him, a horse near the shore", ["man: ring (accessory)"]),
        ("The sky is blue.", ["sky: blue (color)"]),
    ],
)  # fmt: skip
def test_attributes_by_rules(text, expected):
    assert attributes(RULES.parse(text)) == expected


def test_things_that_are_there_by_rules():
    scene = RULES.parse("In the image, a cartoon fox is near the yellow robot, with trees in the background.")
    assert scene.objects == ("fox", "robot", "trees")
    assert RULES.parse("a blue penguin on a sled") == SceneGraph(
        ("blue penguin", "sled"), (), (Relation("blue penguin", "on", "sled", "char-object"),)
    )


@pytest.mark.parametrize(
    "text", ["", ".", "and", "a the", "in in of with", ", , ,", "<>", "Fox", "is", "A. B! C?", "日本"]
)
def test_rules_take_any_text(text):
    assert isinstance(RULES.parse(text), SceneGraph)


def test_many_words_are_read_in_time():
    scene = RULES.parse("In the snow, a fox and a man wear a hat with a ring and hold a ball, " * 300)
    assert "fox" in scene.objects


@pytest.mark.skipif(not shutil.which(PROGRAM), reason=f"{PROGRAM} is not installed")
def test_a_grammar_reads_the_worked_case_and_clothes():
    parser = LinkGrammarParser(CLASSES)
    assert set(parser.parse(SKIING).relations) == set(RULES.parse(SKIING).relations)
    worn = parser.parse(
        "The red fox wears a blue jumpsuit and a red bandana. !help\nA robot stands in a room and holds a ball."
    )
    assert attributes(worn)[-2:] == ["fox: blue jumpsuit (clothing)", "fox: red bandana (accessory)"]
    assert triples(worn) == ["robot | stands | room | scene", "robot | holds | ball | object"]
    assert parser.parse("") == SceneGraph()


def test_a_grammar_that_is_not_there(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="is not installed; on Debian: apt-get install link-grammar"):
        LinkGrammarParser()
    with pytest.raises(UserError, match="parser: /bin/false:"):
        LinkGrammarParser(program="/bin/false").parse("A fox runs.")
