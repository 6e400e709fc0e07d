"""Word lists for reading captions by rules: no dictionary is at hand, and captions of pictures need few words."""

import re
import unicodedata


def words(text: str) -> frozenset[str]:
    """The words of a text parted by spaces."""
    return frozenset(text.split())


COLORS = words(
    "black white red green blue yellow orange purple pink brown grey gray golden gold silver turquoise navy beige tan "
    "reddish bluish blond blonde golden-blond strawberry-blonde platinum-blonde teal violet cyan magenta dark light "
    "fair pale rosy"
)
PARTS = words(
    "eye ear nose muzzle nostril mouth lip tooth teeth grin beak feather hair fur bang braid skin cheek freckle face "
    "head neck shoulder chest build arm hand finger fist paw claw wing tail leg foot feet limb body belly horn antler "
    "spike stripe spot whisker mane beard shell scale fin trunk tusk crest hip look smile expression"
)
CLOTHING = words(
    "shirt t-shirt dress skirt jumpsuit overalls jacket coat sweater vest pants trousers shorts sleeve apron robe "
    "bathrobe cape cloak shawl suit uniform gown blouse glove boot shoe sock mitten quilt"
)
ACCESSORIES = words(
    "hat cap helmet crown tiara bandana scarf barrette hairband headband ribbon bow bowtie tie necklace earring belt "
    "glasses goggles mask collar harness leash bag backpack button ring bracelet"
)
SCENES = words(
    "room bedroom kitchen classroom library house cabin castle palace building town village city street road path "
    "bridge park garden playground field clearing hill hillside mountain landscape environment area setting scenery "
    "forest tree wood snow ice lake river sea ocean water waterfall pond shore beach island sky cloud sun night dusk "
    "evening floor wall ground grass dirt cave tunnel ledge deck porch doorway stairs background surrounding horizon "
    "distance foliage fog desert sand kingdom land ruins market square tower ceiling"
)
ANIMATE = words(
    "person people man woman boy girl child character friend creature animal monster penguin bear fox wolf dog cat "
    "bird dinosaur dragon robot beaver rabbit bunny horse reindeer deer snowman monkey mouse lion tiger elephant frog "
    "turtle pig cow sheep goat duck owl princess prince queen king charizard"
)
NOUNS = PARTS | CLOTHING | ACCESSORIES | SCENES | ANIMATE
NO_THINGS = words(  # places in a picture, and ways: nothing that stands in it
    "background front side left right top middle image picture scene distance way lot kind pair"
)
DETERMINERS = words(
    "a an the this that these those his her its their my your our some several many few two three four five one both "
    "all each every another other various"
)
NUMBERS = words("two three four five many several")
POSSESSIVES = words("his her its their")
PRONOUNS = words("he she it they him them himself herself itself themselves something someone everyone")
AUXILIARIES = words("is are was were be been being am do does did will would")
HAVING = words("has have having had")
SEEMING = words("look looks looking looked seem seems appear appears appearing")
WEARING = words("wear wears wearing wore dressed")
CLAUSE_WORDS = words("and while as but which who that where when then")
PREPOSITIONS = words(
    "in on at of to into onto from by with without over under above below behind beside near around through along "
    "across between among against inside outside toward towards up down out off about after before during past for "
    "like"
)
COMPOUND_PREPOSITIONS = (
    ("on", "top", "of"),
    ("in", "front", "of"),
    ("next", "to"),
    ("close", "to"),
    ("out", "of"),
    ("up", "at"),
    ("out", "at"),
    ("over", "to"),
    ("surrounded", "by"),
    ("covered", "in"),
    ("filled", "with"),
    ("lit", "around"),
)
STATES = ("covered in", "filled with", "lit around")  # of the noun before
PLACING = words("in on at")  # a verb keeps no trace of these: "skiing on a mountain" is skiing
ADVERBS = words("together very too also not so still again away together apart there here nearby ready")
VERBS = words(
    "stand sit hold look play walk run fly ride ski skate swim sleep wake read paint cook eat drink sip stir throw "
    "roll jump hide perch wave smile cheer gaze travel hug embrace talk argue fish swing open close point rest kneel "
    "touch go come make do get take give wear have enjoy float dance sing climb build carry chase push pull watch "
    "visit explore discover find fall drive draw write laugh cry lie lean wash pick blow bring share use "
    "clench surround flare propose illuminate gather prepare skip cruise savor taste venture spread marvel shine "
    "capture feel hop twirl spin help show appear seem see try stop start turn move hear listen exercise practice"
)
IRREGULAR = words(
    "stood sat held flew ran rode swam slept woke ate drank threw hid went came made took gave sang built found fell "
    "wrote lay blew brought shone felt saw heard got did had drove drew"
)


def fold(text: str) -> str:
    """Lower case without accents, words parted by single spaces.

    >>> fold(" Adélie  Penguin")
    'adelie penguin'
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(plain.casefold().split())


def tokens(text: str) -> list[str]:
    """Words of a folded text; hyphens part words.

    >>> tokens("brown-hair girl's T-shirt")
    ['brown', 'hair', 'girl', 't', 'shirt']
    """
    return re.findall(r"[a-z0-9]+", re.sub(r"['’]s\b", "", fold(text)))


def singular(word: str) -> str:
    """A noun without the ending of the plural, as far as spelling tells.

    >>> singular("boxes"), singular("bunnies"), singular("gloves"), singular("dress")
    ('box', 'bunny', 'glove', 'dress')
    """
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def is_in(word: str, known: frozenset[str]) -> bool:
    """Whether a noun, in the singular or as it is written, is in a list."""
    return word in known or singular(word) in known


def is_verb(word: str) -> bool:
    """Whether a word is a form of a verb of the list.

    >>> [is_verb(word) for word in ("skiing", "sits", "carried", "skating", "ceiling", "snow")]
    [True, True, True, True, False, False]
    """
    return word in IRREGULAR or any(stem in VERBS for stem in _stems(word))


def _stems(word: str) -> list[str]:
    stems = [word, singular(word)]
    for ending in ("ing", "ed", "es"):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            stem = word[: -len(ending)]
            stems += [stem, stem + "e", stem[:-1] if stem[-2:-1] == stem[-1:] else stem]
            stems += [stem[:-1] + "y"] if stem.endswith("i") else []
    return stems
