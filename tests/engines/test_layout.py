"""Prompts of several pictures and of films as the prefix stage reads them; M-RoPE's places against transformers'."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen3VLConfig, Qwen3VLModel

from himap_export.engines.layout import ImageTokens, PromptLayout, count_images, lay_out, rope_places, text_tokens
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import TokenBudget
from himap_export.graphs.spec import IMAGE, INSTRUCTION, PADDING, SYSTEM

WORD, PICTURE, FILM = 5, 30, 31  # ids
TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 1, "intermediate_size": 8}


def model(kind: str, **vision: float) -> torch.nn.Module:
    """On the meta device: only its `get_rope_index` is asked, which has no weights."""
    config, whole = {"2.5": (Qwen2_5_VLConfig, Qwen2_5_VLModel), "3": (Qwen3VLConfig, Qwen3VLModel)}[kind]
    tower = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 8, "out_hidden_size": 16, **vision}
    with torch.device("meta"):
        return whole(config(text_config=TEXT, vision_config=tower, image_token_id=PICTURE, video_token_id=FILM))


MODELS = {"2.5": model("2.5", tokens_per_second=4), "3": model("3", deepstack_visual_indexes=[])}


def hugging_face(kind: str, ids: Sequence[int], **media: torch.Tensor) -> np.ndarray:
    """[S,3] of one prompt."""
    given = torch.tensor([list(ids)])
    types = (given == PICTURE).int() + 2 * (given == FILM).int()
    found, _ = MODELS[kind].get_rope_index(given, mm_token_type_ids=types, **media)  # type: ignore[operator]
    return found[:, 0].numpy().T


def runs(lengths: Sequence[int], tokens: Sequence[int], token: int) -> list[int]:
    """Texts of `lengths` around and between runs of `tokens` image tokens."""
    ids = [WORD] * lengths[0]
    for text, count in zip(lengths[1:], tokens, strict=True):
        ids += [token] * count + [WORD] * text
    return ids


def is_image(ids: Sequence[int]) -> np.ndarray:
    return np.isin(ids, (PICTURE, FILM))


GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 5))


@given(st.sampled_from(sorted(MODELS)), GRIDS, st.lists(st.integers(1, 4), min_size=2, max_size=6))
@example("2.5", (2, 5), [3, 1, 4])
@example("3", (5, 2), [1, 1, 1, 1])
@settings(max_examples=60)
def test_several_pictures_lie_where_transformers_puts_them(kind: str, grid: tuple[int, int], texts: list[int]) -> None:
    """Each in a block of its own, behind the longer side of the one before it; pictures that touch are not drawn."""
    rows, columns = grid
    ids = runs(texts, [rows * columns] * (len(texts) - 1), PICTURE)
    thw = torch.tensor([[1, 2 * rows, 2 * columns]] * (len(texts) - 1))
    np.testing.assert_array_equal(rope_places(is_image(ids), grid), hugging_face(kind, ids, image_grid_thw=thw))


@given(GRIDS, st.integers(1, 6), st.floats(0.05, 40), st.tuples(st.integers(1, 4), st.integers(1, 4)))
@example((2, 3), 4, 0.5, (2, 3))  # 2 s a step
@example((2, 3), 6, 1 / 12, (2, 3))  # several steps at one time
@example((2, 3), 6, 0.3, (2, 3))
@settings(max_examples=60)
def test_a_film_of_qwen2_5_goes_on_by_its_seconds(
    grid: tuple[int, int], steps: int, seconds: float, texts: tuple[int, int]
) -> None:
    """One run of all its steps; time is rounded down as there, in fp32."""
    rows, columns = grid
    ids, second = runs(texts, [steps * rows * columns], FILM), float(np.float32(seconds))
    wanted = hugging_face(
        "2.5", ids, video_grid_thw=torch.tensor([[steps, 2 * rows, 2 * columns]]),
        second_per_grid_ts=torch.tensor([second]),
    )  # fmt: skip
    np.testing.assert_array_equal(rope_places(is_image(ids), grid, 4 * second), wanted)


@given(GRIDS, st.lists(st.integers(1, 4), min_size=2, max_size=6))
@settings(max_examples=40)
def test_each_step_of_qwen3s_film_is_a_picture(grid: tuple[int, int], texts: list[int]) -> None:
    rows, columns = grid
    ids = runs(texts, [rows * columns] * (len(texts) - 1), FILM)
    thw = torch.tensor([[len(texts) - 1, 2 * rows, 2 * columns]])
    np.testing.assert_array_equal(rope_places(is_image(ids), grid), hugging_face("3", ids, video_grid_thw=thw))


# --- a batch ---

TOKENS = ImageTokens(PICTURE)


def laid(*prompts: Sequence[int], images: int, batch: int = 1, cut: bool = False, **more: object) -> PromptLayout:
    """Prompts for pictures of 2 tokens each, and 6 of text."""
    width = max(map(len, prompts))
    ids = np.array([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    mask = np.array([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts])
    visual = (2 * images, images) if cut else (2 * images,)
    budget = TokenBudget(visual, 6, 4, batch, images=images)
    return lay_out(ids, mask, image=TOKENS, vocab=40, budget=budget, **more)  # type: ignore[arg-type]


ONE = [WORD, PICTURE, PICTURE, WORD]
TWO = [WORD, PICTURE, PICTURE, 6, PICTURE, PICTURE, 7, 8]


def test_text_between_pictures_is_no_instruction() -> None:
    found = laid(TWO, images=2)
    assert found.token_type.tolist() == [
        [SYSTEM, IMAGE, IMAGE, SYSTEM, IMAGE, IMAGE, *[INSTRUCTION] * 2, PADDING, PADDING]
    ]
    assert (found.lengths.tolist(), found.images.tolist()) == ([8], [2])
    assert found.input_ids.tolist() == [[WORD, 0, 0, 6, 0, 0, 7, 8, 0, 0]]


def test_where_nothing_is_cut_rows_may_hold_fewer_pictures() -> None:
    """Missing samples repeat the last one."""
    found = laid(TWO, ONE, images=2, batch=3)
    assert (found.images.tolist(), found.lengths.tolist()) == ([2, 1, 1], [8, 4, 4])
    assert found.token_type[1].tolist() == [SYSTEM, IMAGE, IMAGE, INSTRUCTION, *[PADDING] * 6]


def test_places_of_a_batch_go_on_by_each_films_seconds() -> None:
    found = laid([*TWO[:3], PICTURE, PICTURE, 7], ONE, images=2, batch=2, grid=(1, 2), steps=(3.0, 5.0))
    assert found.rope_position_ids[0, :6, 0].tolist() == [0, 1, 1, 4, 4, 3]
    assert found.rope_shift.tolist() == [-1, 0]
    assert found.rope_position_ids[1, :4].tolist() == [[0] * 3, [1, 1, 1], [1, 1, 2], [3] * 3]


@pytest.mark.parametrize(
    ("prompt", "images", "cut", "words"),
    [
        (ONE, 2, True, "holds 2 image tokens, one image: the variant is for 2 images of 2 (give exactly 2 images)"),
        ([*TWO, PICTURE, PICTURE], 2, False, "holds 6 image tokens, 3 images: the variant is for 2 images of 2"),
        ([*ONE, PICTURE], 2, False, "holds 3 image tokens: the variant is for 2 images of 2"),
        (TWO, 1, False, "holds 4 image tokens, 2 images: the variant is for one image of 2 (give exactly one image)"),
        ([WORD], 2, False, "holds no image token"),
        ([*TWO, *[WORD] * 3], 2, True, "has 7 text tokens: the budget is 6"),
    ],
)  # fmt: skip
def test_prompts_that_the_budget_is_not_for(prompt: Sequence[int], images: int, cut: bool, words: str) -> None:
    with pytest.raises(HimapError) as found:
        laid(prompt, images=images, cut=cut)
    assert f"prompt 0 {words}" in str(found.value) and found.value.code == Exit.USAGE


def test_counting_leaves_padding_out() -> None:
    ids = np.array([[*TWO, PICTURE, PICTURE], [*ONE, PICTURE, PICTURE, PICTURE, PICTURE, 0, 0]])
    mask = np.array([[1] * 8 + [0] * 2, [1] * 6 + [0] * 4])
    assert count_images(ids, mask, TOKENS, 2).tolist() == [2, 2]
    assert count_images(ids, None, TOKENS, 2).tolist() == [3, 3]
    assert text_tokens(ids, mask, TOKENS) == 4


def test_films_have_tokens_of_their_own() -> None:
    both = ImageTokens(PICTURE, film=FILM)
    ids = np.array([WORD, PICTURE, FILM, WORD])
    assert (
        both.find(ids).tolist() == [False, True, True, False]
        and TOKENS.find(ids).tolist() == [False, True] + [False] * 2
    )
    assert both.write(2).tolist() == [PICTURE] * 2 and both.write(2, film=True).tolist() == [FILM] * 2
    assert TOKENS.write(2, film=True).tolist() == [PICTURE] * 2  # its frames are pictures
