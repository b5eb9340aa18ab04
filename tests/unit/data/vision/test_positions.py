"""Token counts and positions of sequences with images and videos."""

import numpy as np
import pytest

from erniekit.data.vision.positions import in_order, num_tokens, token_positions


def kinds(*runs: tuple[int, int]) -> np.ndarray:
    """(kind, number of tokens) one behind the other."""
    return np.concatenate([np.full(count, kind) for kind, count in runs])


def test_counts_of_images_and_videos():
    # 1920 x 1080 as patches, a 28 x 28 picture, six frames, and one frame that was repeated.
    grid = np.array([[1, 78, 138], [1, 2, 2], [6, 4, 4], [2, 2, 6]])
    assert num_tokens(grid).tolist() == [2691, 1, 12, 3]


def test_text_continues_behind_an_image_at_one_plus_its_largest_position():
    # Two tokens of text, the start token, 2 x 2 cells, the end token, text.
    positions = token_positions(kinds((0, 3), (1, 4), (0, 2)), np.array([[1, 4, 4]]))
    assert positions[:3].tolist() == [[0] * 3, [1] * 3, [2] * 3]
    assert positions[3:7].tolist() == [[3, 3, 3], [3, 3, 4], [3, 4, 3], [3, 4, 4]]
    assert positions[7:].tolist() == [[5] * 3, [6] * 3]


@pytest.mark.parametrize(("rule", "behind"), [("training", 5), ("transformers", 4)])
def test_the_rules_differ_where_a_video_is_longer_than_its_sides(rule, behind):
    """Six frames are three time steps, of 2 x 2 cells."""
    positions = token_positions(kinds((0, 2), (2, 12), (0, 1)), np.array([[6, 4, 4]]), rule=rule)
    assert positions[2:14, 0].tolist() == [2] * 4 + [3] * 4 + [4] * 4
    assert positions[-1].tolist() == [behind] * 3


@pytest.mark.parametrize("rule", ["training", "transformers"])
def test_the_rules_agree_on_a_wide_image(rule):
    positions = token_positions(kinds((1, 5), (0, 1)), np.array([[1, 2, 10]]), rule=rule)
    assert positions[-1].tolist() == [5, 5, 5]


def test_documents_start_at_zero_and_padding_has_no_position():
    segments = np.array([1, 1, 1, 2, 2, 2, 2, 0, 0])
    positions = token_positions(
        kinds((0, 1), (1, 1), (0, 2), (1, 2), (0, 3)), np.array([[1, 2, 2], [1, 2, 4]]), segments
    )
    assert positions[:, 2].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 0]
    assert positions[:, 0].tolist() == [0, 1, 2, 0, 1, 1, 3, 0, 0]


def test_text_alone_counts():
    assert token_positions(np.zeros(4, int), np.zeros((0, 3), int)).tolist() == [[i] * 3 for i in range(4)]
    assert token_positions(np.zeros(0, int), np.zeros((0, 3), int)).shape == (0, 3)


def test_two_pictures_without_a_token_between_them_stay_apart():
    grid = np.array([[1, 2, 4], [1, 2, 2]])
    positions = token_positions(kinds((1, 3), (0, 1)), grid)
    assert positions.tolist() == [[0, 0, 0], [0, 0, 1], [2, 2, 2], [3, 3, 3]]


def test_images_and_videos_of_two_tables_come_in_the_order_of_the_text():
    order = in_order(
        kinds((2, 2), (0, 1), (1, 1), (2, 1), (1, 2)),
        np.array([[1, 2, 2], [1, 2, 4]]),
        np.array([[2, 2, 4], [2, 2, 2]]),
    )
    assert order.tolist() == [2, 0, 3, 1]


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ([[1, 3, 4]], "3 x 4 patches: rows and columns must be multiples of 2"),
        ([[3, 4, 4]], "3 frames.*an even number"),
        ([[1, 4, 4], [0, 4, 4]], "picture 1: 0 frames"),
    ],
)
def test_sizes_that_do_not_merge_are_named(grid, words):
    with pytest.raises(ValueError, match=words):
        num_tokens(np.array(grid))


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (((0, 2), (1, 3)), "3 placeholders for 1 images and videos of 4 tokens.*was cut"),
        (((1, 2), (0, 1), (1, 2)), "picture 0: its 4 placeholders do not stand together"),
    ],
)
def test_placeholders_that_are_not_a_whole_picture_are_named(runs, words):
    with pytest.raises(ValueError, match=words):
        token_positions(kinds(*runs), np.array([[1, 4, 4]]))


def test_a_picture_across_two_documents_is_refused():
    with pytest.raises(ValueError, match="do not stand together"):
        token_positions(kinds((1, 4)), np.array([[1, 4, 4]]), np.array([1, 1, 2, 2]))
