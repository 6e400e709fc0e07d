"""What the creatures' world says of a picture, in the grammar of story captions; never of a creature's mark."""

import math
from collections.abc import Sequence

import numpy as np

from datamodules.creature_drawing import ACTIONS, COLOURS, MARK_COLOURS, MARK_SHAPES, SPECIES, Actor, Look, Mark, Scene
from datamodules.creature_scenes import EXTRAS, PLACES
from mmtrain.story import Character, Frame

STYLE = "flat cartoon style."
PLACE_WORDS = {
    "snow": "in the snow",
    "forest": "in the forest",
    "beach": "on the beach",
    "desert": "in the desert",
    "night": "at night",
    "room": "in the room",
}
EXTRA_WORDS = {"": "", "house": " near a house", "rainbow": " under a rainbow"}
# Name -> look. No two share species, body, clothes or the mark's shape; the words never speak of marks.
CHARACTERS: dict[str, Look] = {
    "Doro": Look("dinosaur", "green", "red", Mark("star", "white")),
    "Fenn": Look("fox", "orange", "blue", Mark("stripes", "yellow")),
    "Bixi": Look("bird", "yellow", "purple", Mark("cross", "white")),
    "Tavi": Look("beaver", "brown", "pink", Mark("spots", "blue")),
    "Pilo": Look("penguin", "blue", "yellow", Mark("heart", "red")),
    "Bruno": Look("bear", "white", "green", Mark("bolt", "yellow")),
    "Tobo": Look("robot", "grey", "orange", Mark("letter", "black")),
    "Ember": Look("dragon", "purple", "white", Mark("ring", "blue")),
    "Nevi": Look("snowman", "pink", "brown", Mark("moon", "white")),
}
MARK_CONTRAST = 110.0  # least distance of a mark from the clothes, in 8-bit RGB
VISIBLE = {  # clothes -> colours of marks that can be seen on them
    clothes: tuple(n for n, c in MARK_COLOURS.items() if math.dist(c, COLOURS[clothes]) >= MARK_CONTRAST)
    for clothes in COLOURS
}


def description(look: Look) -> str:
    """How a creature looks, without its mark.

    >>> description(Look("fox", "orange", "blue"))
    'this orange fox wears blue clothes.'
    """
    return f"this {look.body} {look.species} wears {look.clothes} clothes."


def event(scene: Scene, order: tuple[int, ...] | None = None) -> str:
    """The event sentence; creatures are named by species.

    Args:
        order: numbers of the actors in the order of mention; None: left to right.

    >>> event(Scene("snow", (Actor(Look("fox", "red", "blue"), "wave"), Actor(Look("bear", "red", "blue"), "wave"))))
    'a fox and a bear wave in the snow.'
    """
    actors = [scene.actors[i] for i in order or range(len(scene.actors))]
    where = PLACE_WORDS[scene.place] + EXTRA_WORDS[scene.extra]
    if len({actor.action for actor in actors}) == 1 and len(actors) > 1:
        return " and ".join(f"a {actor.look.species}" for actor in actors) + f" {actors[0].action} {where}."
    return " and ".join(f"a {actor.look.species} {_does(actor)}" for actor in actors) + f" {where}."


def _does(actor: Actor) -> str:
    verb, _, what = actor.action.partition(" ")
    return f"{verb}s {what}".rstrip()


def character(look: Look, name: str | None = None) -> Character:
    """A creature as a story's character; without a name it is called by its species."""
    return Character(name or look.species, look.species, description(look))


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """One of them."""
    return options[int(rng.integers(len(options)))]


def random_mark(clothes: str, rng: np.random.Generator) -> Mark:
    """A mark of any shape in a colour that can be seen on the clothes."""
    return Mark(pick(rng, MARK_SHAPES), pick(rng, VISIBLE[clothes]))


def random_look(species: str, rng: np.random.Generator, marked: float = 0.75) -> Look:
    """A creature of a species in two colours, with a random mark at a probability; never in a character's colours."""
    own = {(c.body, c.clothes) for c in CHARACTERS.values() if c.species == species}
    while True:
        body, clothes = pick(rng, tuple(COLOURS)), pick(rng, tuple(COLOURS))
        if body != clothes and (body, clothes) not in own:
            return Look(species, body, clothes, random_mark(clothes, rng) if rng.random() < marked else None)


def random_scene(
    looks: tuple[Look, ...], rng: np.random.Generator, gap: tuple[float, float], extras: float = 0.3
) -> Scene:
    """Looks, left to right, in a random place; two creatures do the same half the time. Rooms have no extras."""
    place = pick(rng, PLACES)
    extra = pick(rng, EXTRAS) if place != "room" and rng.random() < extras else ""
    actions = [pick(rng, ACTIONS) for _ in looks]
    if rng.random() < 0.5:
        actions = actions[:1] * len(actions)
    return Scene(place, tuple(map(Actor, looks, actions)), extra, gap)


def base_sample(rng: np.random.Generator, pairs: float = 0.4) -> tuple[Scene, Frame]:
    """A scene of the base world and its words: order of mention and of description are independent of left and right.

    Args:
        pairs: probability of two creatures; they may stand so near that they overlap.
    """
    count = 2 if rng.random() < pairs else 1
    species = [tuple(SPECIES)[i] for i in rng.permutation(len(SPECIES))[:count]]
    scene = random_scene(tuple(random_look(s, rng) for s in species), rng, (0.26, 0.5))
    mention, described = (tuple(int(i) for i in rng.permutation(count)) for _ in range(2))
    characters = tuple(character(scene.actors[i].look) for i in described)
    return scene, Frame(event(scene, mention), characters, STYLE)
