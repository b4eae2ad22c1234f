"""The small world's captions name what the scenes hold, in words that the tokenizer knows."""

import random

import torch

from training import scenes
from training.captions import Named, named, read_caption, thinned, vocabulary, worded, world_captions
from training.models import CAPTION_TOKENS, build_tokenizer
from training.world import draw_worlds

WORLDS = draw_worlds(400, torch.Generator().manual_seed(1))


def test_every_wording_reads_as_what_it_was_made_of() -> None:
    draw = random.Random(2)
    contents = [thinned(content, draw) for content in named(WORLDS)]
    assert [read_caption(worded(content, draw)) for content in contents] == contents
    assert [read_caption(text) for text in world_captions(WORLDS)] == named(WORLDS)


def test_plain_caption() -> None:
    content = Named((("red", "ball", "shiny"), ("orange", "cone", None)), "rolling", "grass", "noon", "still")
    assert worded(content) == "a shiny red ball and an orange cone rolling on grass at noon, the camera is still"
    assert read_caption("At night, three owls") == Named(sky="night")


def test_captions_vary_and_leave_out() -> None:
    texts = world_captions(WORLDS, torch.Generator().manual_seed(3))
    assert texts == world_captions(WORLDS, torch.Generator().manual_seed(3))
    contents = [read_caption(text) for text in texts]
    for part in ("motion", "ground", "sky", "camera"):
        assert 0.1 < sum(getattr(content, part) is None for content in contents) / len(contents) < 0.3
    assert 5 < sum(not content.solids for content in contents) < 80, "fragments"
    plain = world_captions(WORLDS)
    assert 40 < sum(text in plain for text in texts) < 300


def test_captions_stay_inside_the_tokenizer() -> None:
    draw, tokenizer = torch.Generator().manual_seed(4), build_tokenizer()
    of_worlds = world_captions(WORLDS, draw) + world_captions(WORLDS)
    of_scenes = scenes.captions(scenes.draw_scenes(400, draw), draw)
    for texts, words in ((of_worlds, vocabulary()), (of_scenes, scenes.vocabulary())):
        assert {word.strip(",") for text in texts for word in text.split()} == set(words)
        batch = tokenizer(texts, padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt").input_ids
        assert batch.shape == (len(texts), CAPTION_TOKENS), "none is longer"
        assert not (batch == tokenizer.unk_token_id).any()
