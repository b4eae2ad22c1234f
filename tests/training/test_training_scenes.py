"""The rendered scenes, their captions, and the judge that reads them."""

from dataclasses import replace

import torch

from training.judge import background_colour, judge
from training.models import build_tokenizer
from training.recipe import SMOKE
from training.scenes import BACKGROUNDS, COLOURS, FORMS, SIZE, Scenes, captions, draw_scenes, positions, render
from training.sources import FADE_FRAMES, sources_of


def scenes_of(number: int, seed: int, objects: int | None = None) -> Scenes:
    return draw_scenes(number, torch.Generator().manual_seed(seed), objects)


def test_render_is_a_function_of_the_seed() -> None:
    first, again, other = (render(scenes_of(3, seed), 5) for seed in (7, 7, 8))
    assert first.shape == (3, 3, 5, SIZE, SIZE)
    assert first.abs().max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_objects_move_and_stay_in_the_frame() -> None:
    scenes = scenes_of(64, 1)
    centres = positions(scenes, 200)
    reach = 1.2 * scenes.radius[:, :, None, None]
    assert (centres >= reach - 1e-3).all()
    assert (centres <= SIZE - reach + 1e-3).all()
    fastest = centres.diff(dim=2).norm(dim=-1).amax(-1)
    assert ((fastest >= 0.999) & (fastest <= 3.001)).all()


def test_a_change_fades_from_one_scene_to_the_other() -> None:
    flat = sources_of(SMOKE)[0]
    before = scenes_of(2, 3)
    after = flat.changed(before, torch.Generator().manual_seed(4))
    clip = flat.render_change(before, after, torch.tensor([4, 6]), 20)
    for row, frame in enumerate((4, 6)):
        assert torch.equal(clip[row, :, :frame], render(before, 20)[row, :, :frame])
        last = frame + FADE_FRAMES - 1
        torch.testing.assert_close(clip[row, :, last:], render(after, 20)[row, :, last:])


def test_first_wording_names_everything() -> None:
    scenes = scenes_of(500, 0, objects=2)
    assert (scenes.colour[:, 0] != scenes.colour[:, 1]).all()
    words = captions(scenes)[0].split()
    assert words[-1] == "background"
    assert words[-2] == list(BACKGROUNDS)[scenes.background[0]]
    assert [word for word in words if word in COLOURS] == [list(COLOURS)[index] for index in scenes.colour[0]]
    assert [word for word in words if word in FORMS] == [list(FORMS)[index] for index in scenes.form[0]]


def test_tokenizer_splits_punctuation_ignores_case_and_marks_other_words() -> None:
    tokenizer = build_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("A Red circle, jumping.").input_ids)
    assert tokens == ["a", "red", "circle", ",", "<unk>", ".", "</s>"]
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]


def test_judge_is_right_on_rendered_clips_and_wrong_on_shuffled_captions() -> None:
    scenes = scenes_of(40, 6)
    clip = render(scenes, 2)
    assert judge(clip, scenes).everything().float().mean() >= 0.99
    verdict = judge(clip.roll(1, 0), scenes)
    assert verdict.everything().float().mean() <= 0.3
    assert verdict.colours.float().mean() <= 0.3


def test_judge_reads_a_form_where_nothing_touches_it() -> None:
    scenes = scenes_of(1, 9, objects=2)
    scenes.velocity.zero_()
    covered = replace(scenes, start=scenes.start[:, :1].expand(-1, 2, -1), radius=scenes.radius[:, :1].expand(-1, 2))
    clip = torch.cat([render(covered, 3), render(scenes, 2)], 2)
    verdict = judge(clip, scenes)
    assert (bool(verdict.forms.all()), bool(verdict.forms_first.all())) == (True, False)


def test_background_colour_ignores_the_objects() -> None:
    scenes = scenes_of(6, 10)
    clip = render(scenes, 2)
    for row, index in enumerate(scenes.background.tolist()):
        expected = torch.tensor(list(BACKGROUNDS.values())[index], dtype=torch.float32)
        assert (background_colour(clip[row]) - expected).abs().max() < 0.5
