"""A text tower of open_clip's layout gives the same features as a CLIPTextModel."""

import open_clip
import pytest
import torch

from mmtrain.config_errors import UserError
from mmtrain.storyweaver.clip_text import text_encoder_of_clip, text_tower
from mmtrain.storyweaver.tokenizer import clip_tokenizer

SIZES = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


@pytest.mark.parametrize("prefix", ["", "network."])
def test_features_are_those_of_open_clip(prefix: str) -> None:
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None}
    clip = open_clip.CLIP(16, vision, SIZES, quick_gelu=True).eval()
    state = {prefix + name: value for name, value in clip.state_dict().items()}
    model = text_encoder_of_clip(state, heads=2).eval()
    tokenizer = clip_tokenizer(model_max_length=24)
    text = "this blue fox wears red clothes."
    tokens = tokenizer(text, padding="max_length", return_tensors="pt").input_ids
    end = int((tokens[0] == tokenizer.eos_token_id).nonzero()[0])
    seen = []
    handle = clip.ln_final.register_forward_hook(lambda *words: seen.append(words[-1]))
    with torch.no_grad():
        clip.encode_text(open_clip.tokenize([text], context_length=24))
        handle.remove()
        ours = model(tokens)
    # after the end open_clip pads with another token
    torch.testing.assert_close(ours.last_hidden_state[0, : end + 1], seen[0][0, : end + 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.pooler_output[0], seen[0][0, end], atol=1e-5, rtol=0)


def test_what_is_no_clip_is_refused() -> None:
    with pytest.raises(UserError, match=r"file\.ckpt: holds no text tower"):
        text_tower({"conv.weight": torch.zeros(1)}, "file.ckpt")
    state = {"token_embedding.weight": torch.zeros(9, 6), "positional_embedding": torch.zeros(4, 6)}
    state["transformer.resblocks.0.mlp.c_fc.weight"] = torch.zeros(24, 6)
    with pytest.raises(UserError, match="width is 6, which 4 heads do not divide"):
        text_encoder_of_clip(state, heads=4, where="file.ckpt")
