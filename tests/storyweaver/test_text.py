"""Prompts become what CLIP's text encoder makes of them, once; what does not fit is said or kept."""

import pytest
import torch

from mmtrain.config_errors import UserError
from mmtrain.story import Character, Frame
from mmtrain.storyweaver.text import PromptEncoder, TextSettings, content_ids
from tests.storyweaver.tiny import tiny_components

FOX = Character("Eddy", "fox", "this red fox wears grey clothes")
ROBOT = Character("Rody", "robot", "this yellow robot wears grey clothes and a hat of snow")
ALONE = Frame("a red fox in the snow.", (FOX,), "2.5D cartoon style.")
PAIR = Frame("a fox and a robot in the snow.", (FOX, ROBOT), "2.5D cartoon style.")
NOBODY = Frame("a snow storm.", (), "2.5D cartoon style.")
LONG = Frame("a fox and a robot " + "in the snow and " * 12 + "again.", (FOX, ROBOT), "2.5D cartoon style.")


@pytest.fixture(scope="module")
def parts():
    components = tiny_components()
    components.text_encoder.requires_grad_(False)
    return components


@pytest.fixture
def calls(parts):
    """Rows of each call of the text encoder."""
    rows: list[int] = []
    handle = parts.text_encoder.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    yield rows
    handle.remove()


def encoder(parts, long_prompts: str = "warn", **options) -> PromptEncoder:
    return PromptEncoder(parts.tokenizer, parts.text_encoder, TextSettings(long_prompts), **options)


def test_features_are_those_of_clip(parts) -> None:
    frames = [ALONE, PAIR, NOBODY, LONG]
    encoded = encoder(parts).encode(frames)
    given = parts.tokenizer(
        [f.prompt for f in frames], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = parts.text_encoder(given.input_ids).last_hidden_state
    torch.testing.assert_close(encoded.context, expected, atol=1e-6, rtol=0)
    last = parts.text_encoder.final_layer_norm  # features are normed ones
    unnormed = (encoded.context - last.bias) / last.weight
    torch.testing.assert_close(unnormed.mean(-1), torch.zeros(4, 77), atol=1e-5, rtol=0)
    assert encoded.counts == [1, 2, 0, 2] and [len(s) for s in encoded.spans] == [1, 2, 0, 2]


def test_descriptions_are_pooled_at_the_first_end_token(parts, monkeypatch) -> None:
    given = parts.tokenizer([FOX.description], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        output = parts.text_encoder(given)
    end = given[0].tolist().index(parts.tokenizer.eos_token_id)
    pooled = encoder(parts).pooled([FOX.description])
    torch.testing.assert_close(pooled[0], output.last_hidden_state[0, end], atol=1e-6, rtol=0)
    torch.testing.assert_close(pooled, output.pooler_output, atol=1e-6, rtol=0)  # its rule is right for this config
    monkeypatch.setattr(parts.text_encoder, "eos_token_id", 999_999)  # as where a config does not know the tokenizer
    with torch.no_grad():
        assert not torch.allclose(parts.text_encoder(given).pooler_output, pooled)
    assert torch.equal(encoder(parts).pooled([FOX.description]), pooled)
    described = encoder(parts).encode([ALONE, PAIR, NOBODY]).descriptions
    assert described.shape == (3, 2, 32)
    assert torch.equal(described[0, 0], pooled[0]) and torch.equal(described[1, 0], pooled[0])
    assert not described[0, 1].any() and not described[2].any() and described[1, 1].any()
    assert encoder(parts).encode([NOBODY]).descriptions.shape == (1, 0, 32)


def test_each_prompt_is_encoded_once_and_alone(parts, calls) -> None:
    prompts = encoder(parts)
    with torch.inference_mode():  # a validation first
        prompts.encode([ALONE, PAIR, ALONE])
    assert calls == [1, 1]
    encoded = prompts.encode([PAIR, ALONE])
    assert calls == [1, 1]  # nor were descriptions computed
    assert not encoded.context.is_inference() and not encoded.context.requires_grad
    weight = torch.ones(32, requires_grad=True)
    (encoded.context * weight).sum().backward()  # a training step can use it
    assert encoded.descriptions is encoded.descriptions and calls == [1, 1, 1, 1]
    assert torch.equal(encoder(parts).encode([PAIR]).context[0], encoded.context[0])  # to the bit
    prompts.clear()
    prompts.encode([PAIR])
    assert len(calls) == 6


def test_the_cache_is_bounded(parts, calls) -> None:
    row = 77 * 32 * 4
    prompts = encoder(parts, cache_bytes=2 * row)
    first = prompts.encode([ALONE, PAIR, NOBODY]).context
    assert prompts._features.bytes == 2 * row
    assert torch.equal(prompts.encode([ALONE, PAIR, NOBODY]).context, first)
    prompts.encode([NOBODY])
    assert calls == [1] * 4


def test_a_trained_text_encoder_gets_gradients(parts) -> None:
    prompts = encoder(parts, cache=False)
    weight = parts.text_encoder.encoder.layers[0].mlp.fc1.weight.requires_grad_(True)
    try:
        encoded = prompts.encode([ALONE, PAIR])
        encoded.context.sum().backward()
        assert weight.grad.abs().max() > 0
        weight.grad = None
        encoded.descriptions.pow(2).sum().backward()
        assert weight.grad.abs().max() > 0
        before = encoded.context.detach()
        with torch.no_grad():
            weight.mul_(1.5)
        assert not torch.allclose(prompts.encode([ALONE, PAIR]).context, before)  # nothing was kept
    finally:
        with torch.no_grad():
            weight.div_(1.5)
        weight.requires_grad_(False).grad = None


def test_what_does_not_fit_is_said_once(parts, capsys) -> None:
    prompts = encoder(parts)
    prompts.encode([LONG, PAIR, LONG])
    prompts.encode([LONG])
    said = capsys.readouterr().err
    assert said.count("the text encoder takes 77; lost") == 1
    assert "lost, of the description of " in said and "Rody: '" in said and "a hat of snow'. " in said
    assert "text.long_prompts: chunk" in said
    ids = content_ids(parts.tokenizer, LONG.prompt)
    assert f"{len(ids) + 2} tokens" in said
    encoder(parts, "chunk").encode([LONG])
    assert not capsys.readouterr().err


def test_chunks_keep_all_and_spans_follow(parts) -> None:
    prompts, tokenizer = encoder(parts, "chunk"), parts.tokenizer
    encoded = prompts.encode([LONG, ALONE])
    number = prompts.chunks(LONG.prompt)
    assert number > 1 and encoded.context.shape == (2, 77 * number, 32)
    alone, empty = prompts.encode([ALONE]), prompts.encode_texts([""])
    assert torch.equal(encoded.context[1, :77], alone.context[0])
    assert torch.equal(encoded.context[1, 77:], empty[0].repeat(number - 1, 1))  # filled up with nothing
    pieces = prompts._pieces(LONG.prompt)
    ids = [token for piece in pieces for token in piece]
    inside = [t for piece in pieces for t in piece if t not in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    assert inside == content_ids(tokenizer, LONG.prompt)
    for character, spans in zip(LONG.characters, encoded.spans[0], strict=True):
        told = [ids[i] for start, end in spans.description_spans for i in range(start, end)]
        assert told == content_ids(tokenizer, character.description)
        start, end = spans.class_spans[0]
        assert ids[start:end] == content_ids(tokenizer, character.coarse_class)
    piece = torch.tensor(pieces[1:2])
    with torch.no_grad():
        torch.testing.assert_close(encoded.context[0, 77:154], parts.text_encoder(piece).last_hidden_state[0])


def test_the_empty_prompt_is_as_long_as_what_it_stands_beside(parts) -> None:
    prompts = encoder(parts, "chunk")
    empty, snow = prompts.encode_texts(["", "snow"])
    null = prompts.null(3, 154)
    assert null.shape == (3, 154, 32) and torch.equal(null[1], torch.cat([empty, empty]))
    assert torch.equal(prompts.null(1, 154, "snow")[0], torch.cat([snow, empty]))
    with pytest.raises(UserError, match="100 tokens, must be a multiple of 77"):
        prompts.null(1, 100)


def test_batches_are_chosen_repeated_and_dropped(parts, calls) -> None:
    prompts = encoder(parts)
    encoded, null = prompts.encode([PAIR, ALONE]), prompts.null(1, 77)
    calls.clear()
    one = encoded.select([1]).to("cpu")
    assert one.counts == [1] and len(one) == 1 and torch.equal(one.context[0], encoded.context[1])
    twice = encoded.repeat(2)
    assert twice.counts == [2, 1, 2, 1] and torch.equal(twice.context[2:], encoded.context)
    dropped = encoded.with_dropped(torch.tensor([True, False]), null)
    assert torch.equal(dropped.context[0], null[0]) and torch.equal(dropped.context[1], encoded.context[1])
    assert [s.class_spans + s.description_spans for s in dropped.spans[0]] == [(), ()]
    assert dropped.spans[1] == encoded.spans[1] and dropped.counts == [2, 1]
    assert not calls
    assert one.descriptions.shape == (1, 1, 32)  # as if it had been encoded alone
    assert torch.equal(one.descriptions, prompts.encode([ALONE]).descriptions)
    assert torch.equal(twice.descriptions[2:], encoded.descriptions)


def test_mistakes_are_named(parts) -> None:
    with pytest.raises(UserError, match=r"text.long_prompts: 'cut', must be one of warn, chunk"):
        TextSettings("cut")
    with pytest.raises(UserError, match=r"text.span_rule: released, does not work on chunks"):
        TextSettings("chunk", "released")
    with pytest.raises(UserError, match="nothing to encode"):
        encoder(parts).encode([])
    longer = type("Longer", (), {"model_max_length": 10**30})()
    with pytest.raises(UserError, match="the text encoder takes 77: set the tokenizer's model_max_length to 77"):
        PromptEncoder(longer, parts.text_encoder)
