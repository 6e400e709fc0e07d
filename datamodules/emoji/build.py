"""Builds the embedded emoji set: `python -m datamodules.emoji.build --out DIR [--npm DIR]` (extra `emoji`, npm client).

Origin and licences of the pictures: NOTICE.md. The same inputs give the same bytes.
"""

import argparse
import gzip
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from datamodules.emoji import VENDORS

SIDE = 64
QUALITY = 92  # the best that keeps all shards together below 7.5 MB
SHARD_SAMPLES = 320  # four seen shards a vendor, each far below 1 MB
UNSEEN_ONE_IN = 10
PACKAGES = {
    "noto": ("emoji-datasource-google", "16.0.0"),
    "twemoji": ("emoji-datasource-twitter", "16.0.0"),
    "fluent": ("@lobehub/fluent-emoji-3d", "1.1.0"),
    "openmoji": ("openmoji", "17.0.0"),
    "texts": ("emojibase-data", "17.0.0"),
    "microsoft": ("@iconify-json/fluent-emoji-flat", "1.2.6"),  # only its list of the emoji that Microsoft released
}
PICTURES = {
    "noto": ("package/img/google/64/", ".png"),
    "twemoji": ("package/img/twitter/64/", ".png"),
    "fluent": ("package/assets/", ".webp"),
    "openmoji": ("package/color/svg/", ".svg"),
}
COMPONENT_GROUP = 2
JOINER, GENDERED = "200d", {"1f468", "1f469", "2640", "2642"}  # man, woman, female sign, male sign


class Concept(NamedTuple):
    hexcode: str
    name: str
    tags: list[str]
    group: str
    subgroup: str


def fetch(source: str, folder: Path) -> Path:
    """Path of a package's archive in `folder`, packed by npm where it is not there yet."""
    name, version = PACKAGES[source]
    archive = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        command = ["npm", "pack", f"{name}@{version}", "--silent", "--pack-destination", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return archive


def members(archive: Path, prefix: str, suffix: str = "") -> dict[str, bytes]:
    """Contents of the files of one folder of an archive, by file name."""
    with tarfile.open(archive, "r:gz") as tar:
        return {
            Path(member.name).name: tar.extractfile(member).read()
            for member in tar
            if member.isfile() and member.name.startswith(prefix) and member.name.endswith(suffix)
        }


def normalise(hexcode: str) -> str:
    """One spelling for the four vendors: lowercase, four digits at least, no variation selector.

    >>> normalise("23-FE0F-20E3")
    '0023-20e3'
    """
    return "-".join(part.zfill(4) for part in hexcode.lower().split("-") if part != "fe0f")


def is_base(hexcode: str) -> bool:
    """False for a sequence that only makes another emoji a man or a woman.

    >>> is_base("1f9d1-200d-1f373"), is_base("1f468-200d-1f373"), is_base("1f3c3-200d-2640")
    (True, False, False)
    """
    parts = hexcode.split("-")
    return JOINER not in parts or not GENDERED.intersection(parts)


def read_pictures(vendor: str, folder: Path) -> dict[str, bytes]:
    files = members(fetch(vendor, folder), *PICTURES[vendor])
    return {normalise(Path(name).stem): files[name] for name in sorted(files)}


def read_concepts(folder: Path) -> list[Concept]:
    """Base emoji without components in emojibase order."""
    archive = fetch("texts", folder)
    records = json.loads(members(archive, "package/en/data.json")["data.json"])
    names = json.loads(members(archive, "package/meta/groups.json")["groups.json"])
    records = [record for record in records if record.get("group", COMPONENT_GROUP) != COMPONENT_GROUP]
    return [
        Concept(
            normalise(record["hexcode"]),
            record["label"],
            record.get("tags", []),
            names["groups"][str(record["group"])],
            names["subgroups"][str(record["subgroup"])],
        )
        for record in sorted(records, key=lambda record: record["order"])
        if is_base(normalise(record["hexcode"]))
    ]


def released_by_microsoft(folder: Path) -> set[str]:
    """The Fluent package fills Microsoft's gaps (country flags, couples) with pictures of unknown origin: not these."""
    characters = members(fetch("microsoft", folder), "package/chars.json")["chars.json"]
    return {normalise(hexcode) for hexcode in json.loads(characters)}


def rasterise(picture: bytes, suffix: str) -> Image.Image:
    if suffix == ".svg":
        import resvg_py  # only this script needs it

        picture = bytes(resvg_py.svg_to_bytes(svg_string=picture.decode(), width=4 * SIDE, height=4 * SIDE))
    return Image.open(io.BytesIO(picture)).convert("RGBA")


def on_white(picture: Image.Image) -> Image.Image:
    """Centred on a white square, then resized: in this order no dark fringe appears at transparent edges."""
    side = max(picture.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def encode(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY, method=6)
    return buffer.getvalue()


def shared_pictures(pictures: dict[str, bytes]) -> set[str]:
    """Hexcodes whose picture is also that of another concept: such a pair has no right answer."""
    counts = Counter(pictures.values())
    return {hexcode for hexcode, picture in pictures.items() if counts[picture] > 1}


def read_set(folder: Path) -> tuple[list[Concept], dict[str, dict[str, bytes]]]:
    """Concepts that every vendor draws, and each vendor's encoded pictures by hexcode."""
    sources = {vendor: read_pictures(vendor, folder) for vendor in VENDORS}
    drawn = released_by_microsoft(folder).intersection(*sources.values())
    concepts = [concept for concept in read_concepts(folder) if concept.hexcode in drawn]
    pictures = {
        vendor: {c.hexcode: encode(on_white(rasterise(source[c.hexcode], PICTURES[vendor][1]))) for c in concepts}
        for vendor, source in sources.items()
    }
    shared = set().union(*map(shared_pictures, pictures.values()))
    concepts = [concept for concept in concepts if concept.hexcode not in shared]
    repeated = [name for name, count in Counter(concept.name for concept in concepts).items() if count > 1]
    if repeated:
        raise ValueError(f"names of classes must be unique, repeated: {', '.join(repeated)}")
    return concepts, pictures


def caption(name: str) -> str:
    """
    >>> caption("keycap: 5")
    'keycap 5'
    """
    return name.replace(": ", " ")


def is_unseen(hexcode: str) -> bool:
    return zlib.crc32(hexcode.encode()) % UNSEEN_ONE_IN == 0


def sample(vendor: str, label: int, concept: Concept, picture: bytes) -> Iterator[tuple[str, bytes]]:
    """Member names and contents of one sample."""
    fields: dict[str, Any] = concept._asdict()
    fields |= {"vendor": vendor, "label": label, "keywords": ", ".join(concept.tags)}
    key = f"{vendor}_{concept.hexcode}"
    yield f"{key}.webp", picture
    yield f"{key}.txt", caption(concept.name).encode()
    yield f"{key}.json", json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


def write_shard(path: Path, contents: Iterable[tuple[str, bytes]]) -> None:
    """The same contents give the same bytes: no times, no owners."""
    with (
        path.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=file, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, content in contents:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_vendor(out: Path, vendor: str, concepts: list[Concept], pictures: dict[str, bytes]) -> None:
    labelled = list(enumerate(concepts))
    labelled.sort(key=lambda pair: hashlib.sha256(f"{vendor}_{pair[1].hexcode}".encode()).digest())  # mixes the groups
    for split, unseen in (("seen", False), ("unseen", True)):
        chosen = [pair for pair in labelled if is_unseen(pair[1].hexcode) == unseen]
        for number, start in enumerate(range(0, len(chosen), SHARD_SAMPLES)):
            part = chosen[start : start + SHARD_SAMPLES]
            contents = (item for label, c in part for item in sample(vendor, label, c, pictures[c.hexcode]))
            write_shard(out / f"{vendor}-{split}-{number:05d}.tar.gz", contents)


def write_classes(out: Path, concepts: list[Concept]) -> None:
    """One class a line, in the order of the class index."""
    fields = ("hexcode", "name", "group", "subgroup")
    rows = [json.dumps({field: getattr(c, field) for field in fields}, ensure_ascii=False) for c in concepts]
    groups, subgroups = (json.dumps(list(dict.fromkeys(getattr(c, field) for c in concepts))) for field in fields[2:])
    text = '{"classes": [\n' + ",\n".join(rows) + f'\n],\n"groups": {groups},\n"subgroups": {subgroups}}}\n'
    (out / "classes.json").write_text(text, encoding="utf-8")


def build(out: Path, folder: Path) -> None:
    concepts, pictures = read_set(folder)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.tar.gz"):
        old.unlink()  # a smaller set must not leave shards of a larger one
    for vendor in VENDORS:
        write_vendor(out, vendor, concepts, pictures[vendor])
    write_classes(out, concepts)
    sizes = [path.stat().st_size for path in out.glob("*.tar.gz")]
    print(f"{len(concepts)} concepts, {len(sizes)} shards, {sum(sizes):,} bytes, largest {max(sizes):,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards and classes.json")
    parser.add_argument("--npm", type=Path, help="folder with packages already packed by npm; fetched when missing")
    arguments = parser.parse_args()
    if arguments.npm:
        return build(arguments.out, arguments.npm)
    with tempfile.TemporaryDirectory() as folder:
        build(arguments.out, Path(folder))


if __name__ == "__main__":
    main()
