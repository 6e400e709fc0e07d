"""RankCLIP's comparison at laptop scale: four methods on the embedded emoji, judged by the paper's claims.

Training sees the seen concepts of three vendors. Unseen concepts in the known styles stand for Table 1's zero-shot
columns, seen concepts in the held-out style for retrieval and the distribution shifts of Table 2, the probe on
subgroups for Table 3. Figure 5 has no numbers, and which direction of uniformity it calls better is not known: values
only.
"""

from mmtrain.plans import Claim, Plan

RIVALS = ("CLIP", "CyCLIP", "ALIP")

PLAN = Plan(
    paper="rankclip",
    own_method="RankCLIP",
    methods={name: f"{name.lower()}_emoji" for name in ("CLIP", "CyCLIP", "ALIP", "RankCLIP")},
    words=("--data.split", "concept", "--vars.checkpoint_steps", "50"),
    epochs=(30, 2),
    seeds=(3, 2),
    claims=(
        Claim("better zero-shot top-1", "Table 1", "test/unseen_concepts/zero_shot_top1", RIVALS),
        Claim("better zero-shot top-5", "Table 1", "test/unseen_concepts/zero_shot_top5", RIVALS),
        Claim("better image-to-text retrieval", "Table 1", "test/twemoji_style/i2t_r1", RIVALS),
        Claim("better text-to-image retrieval", "Table 1", "test/twemoji_style/t2i_r1", RIVALS),
        Claim("better under distribution shift, top-1", "Table 2", "test/twemoji_style/zero_shot_top1", RIVALS),
        Claim("better under distribution shift, top-5", "Table 2", "test/twemoji_style/zero_shot_top5", RIVALS),
        Claim("better linear probe", "Table 3", "test/subgroups/linear_probe", RIVALS),
        Claim("smaller modality gap", "Figure 6", "test/twemoji_style/modality_gap", ("CLIP",), "lower"),
    ),
    shown=(
        "test/unseen_twemoji/zero_shot_top1",
        "test/unseen_twemoji/i2t_r1",
        "test/unseen_twemoji/t2i_r1",
        "test/twemoji_style/alignment_cosine",
        "test/twemoji_style/uniformity_cosine",
        "test/twemoji_style/alignment_distance",
        "test/twemoji_style/uniformity_distance",
    ),
)
