"""Attack animations of Wesnoth, on a made tree of the game's layout."""

import wave
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.wesnoth import KINDS, Wesnoth, split_of
from datamodules.wesnoth_units import expand, names_of, parse, read_macros, timed
from mmtrain.config_errors import UserError

MACROS = """
#define MISS
miss.wav #enddef

#define SOUND:HIT_AND_MISS HIT MISSED TIME
    # hit and miss sounds
    attack_sound_start_time={TIME}
    [if]
        hits=yes
        [attack_sound_frame]
            sound={HIT}
        [/attack_sound_frame]
    [/if]
    [else]
        hits=no
        [attack_sound_frame]
            sound={MISSED}
        [/attack_sound_frame]
    [/else]
#enddef
"""
UNIT = """
[unit_type]
    id=NAME
    {UNKNOWN_MACRO 3}
    [attack]
        name=sword
        description=_"sword"
        type=KIND
    [/attack]
    [attack_anim]
        [filter_attack]
            name=sword
        [/filter_attack]
        start_time=-200
        [if]
            direction=s,se
            [frame]
                image="a-[1~2].png:[100,150]"   # two sprites
            [/frame]
        [/if]
        [else]
            [frame]
                image="missing.png:50"
            [/frame]
        [/else]
        {SOUND:HIT_AND_MISS hit.wav {MISS} -100}
    [/attack_anim]
    [attack_anim]
        [filter_attack]
            name=bow
        [/filter_attack]
    [/attack_anim]
[/unit_type]
"""


@pytest.fixture
def core(tmp_path: Path) -> Path:
    for folder in ("macros", "units/people", "images", "sounds"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "macros/sound.cfg").write_text(MACROS)
    for number in range(40):
        text = UNIT.replace("NAME", f"Unit {number}").replace("KIND", KINDS[number % 6])
        (tmp_path / f"units/people/{number:02d}.cfg").write_text(text)
    (tmp_path / "units/broken.cfg").write_text("[unit_type]\n[attack]\n[/unit_type]\n")
    for name, colour in (("a-1.png", (255, 0, 0, 255)), ("a-2.png", (0, 0, 255, 255))):
        Image.new("RGBA", (72, 72), colour).save(tmp_path / "images" / name)
    for name in ("hit.wav", "miss.wav"):
        with wave.open(str(tmp_path / "sounds" / name), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes((8000 * np.ones(800)).astype("<i2").tobytes())
    return tmp_path


def test_animations_are_read_and_the_rest_is_counted(core: Path) -> None:
    world = Wesnoth(core)
    animations = [animation for part in world.animations.values() for animation in part]
    assert len(animations) == 40
    assert animations[0].sprites == (("a-1.png", -200, -100), ("a-2.png", -100, 50))
    assert animations[0].sounds == ((("hit.wav",), -100),)
    assert world.skipped["file cannot be read"] == 1 and world.skipped["attack is not known"] == 40


def test_units_are_divided_and_not_shared(core: Path) -> None:
    world = Wesnoth(core)
    units = {split: {animation.unit for animation in part} for split, part in world.animations.items()}
    assert all(units.values()) and sum(map(len, units.values())) == 40
    assert all(split_of(unit) == split for split, names in units.items() for unit in names)
    assert world.sizes() == {split: len(units[split]) * number for split, number in world.repeats.items()}


def test_sound_and_picture_change_at_the_authored_times(core: Path) -> None:
    world = Wesnoth(core)
    clip = world.clip("train", 1)
    assert clip.frames.shape == (40, 3, 64, 64) and clip.audio.shape == (80000,)
    assert world.class_names[clip.label] == world.animations["train"][1].kind
    assert len(clip.onsets) >= 2
    for time in clip.onsets:
        place = round(time * 16000)
        assert np.abs(clip.audio[place - 50 : place]).max() < 1e-3 < 0.2 < clip.audio[place + 5]
    blue = clip.frames[:, 2, 32, 32] > 200  # second sprite: from the onset on, for 150 ms
    times = np.arange(40) / 8
    expected = np.any([(times >= time - 1e-9) & (times < time + 0.15 - 1e-9) for time in clip.onsets], axis=0)
    assert np.array_equal(blue, expected)


def test_clips_are_reproducible(core: Path) -> None:
    one, two = Wesnoth(core), Wesnoth(core)
    assert one.describe() == two.describe() != Wesnoth(core, seed=1).describe()
    assert np.array_equal(one.clip("test", 0).audio, two.clip("test", 0).audio)
    assert np.array_equal(one.clip("test", 0).frames, two.clip("test", 0).frames)
    assert one.clip("test", 0).onsets != Wesnoth(core, seed=1).clip("test", 0).onsets


def test_lists_of_the_markup() -> None:
    assert names_of("b-[1~3].ogg,c.ogg") == ["b-1.ogg", "b-2.ogg", "b-3.ogg", "c.ogg"]
    assert timed("a[02~03,1].png:[75*2,40],z.png:9") == [("a02.png", 75), ("a03.png", 75), ("a1.png", 40), ("z.png", 9)]
    with pytest.raises(ValueError, match="2 pictures and 3 durations"):
        timed("a[1~2].png:[1,2,3]")
    unknown: Counter[str] = Counter()
    macros = read_macros(["#define TWO A B\n{A}={B}\n#enddef\n"])
    assert expand("{TWO x (1 2)} {NO}", macros, unknown).strip() == "x=1 2" and unknown == {"NO": 1}
    with pytest.raises(ValueError, match="left open"):
        parse("[a]\n")


def test_wrong_requests_are_refused(core: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no folder units"):
        Wesnoth(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"repeats\.valid"):
        Wesnoth(core, repeats={"valid": 1})
    with pytest.raises(UserError, match="split: valid"):
        Wesnoth(core).clip("valid", 0)
    (core / "sounds/hit.wav").write_bytes(b"no sound")
    with pytest.raises(UserError, match=r"hit\.wav: cannot be read"):
        Wesnoth(core).clip("test", 0)
