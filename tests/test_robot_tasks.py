"""What a policy sees and sends, and that names and combinations which make no sense are refused."""

import pytest

from mmtrain.config_errors import UserError
from mmtrain.robot_observations import stored_width
from mmtrain.robot_tasks import policy_spec


@pytest.mark.parametrize(
    ("arguments", "width", "touch_dim", "relative"),
    [
        (("peel", "force", "rdp"), 4, 6, True),
        (("wipe", "gelsight", "rdp"), 10, 15, True),
        (("lift", "gelsight_mctac", "rdp"), 8, 30, False),
        (("lift", "normal_force", "rdp"), 8, 2, False),
        (("wipe", "gelsight", "dp"), 10, 0, False),
    ],
)
def test_a_policy_has_the_released_widths_and_rates(arguments, width, touch_dim, relative):
    spec = policy_spec(*arguments)
    assert (spec.action_dim, spec.touch_dim, spec.relative) == (width, touch_dim, relative)
    assert (spec.now, spec.observation_stride, spec.horizon * spec.frames_per_step) == (
        (3, 2, 32) if spec.method == "rdp" else (1, 2, 32)
    )
    # every frame of an episode is "now" of one window at its rate, the last included
    assert (spec.pad_before, spec.pad_after) == (spec.now, spec.horizon - 1 - spec.now)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wiping", "force", "rdp"), r"task: wiping is not known, did you mean wipe\?"),
        (("wipe", "gelsigth", "rdp"), r"touch: gelsigth is not known, did you mean gelsight\?"),
        (("wipe", "force", "ldp"), "method: ldp is not known"),
        (("wipe", "image", "rdp"), "touch: image is for method dp only"),
        (("lift", "gelsight", "rdp"), "touch: gelsight .* task lift; lift has gelsight_mctac"),
        (("peel", "gelsight_mctac", "dp"), "touch: gelsight_mctac .* task peel"),
    ],
)
def test_what_makes_no_policy_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        policy_spec(*arguments)


def test_a_stream_that_the_layout_does_not_have_has_no_width():
    assert stored_width("right_gripper1_marker_offset_emb") == 15
    with pytest.raises(KeyError, match="left_robot_joints"):
        stored_width("left_robot_joints")
