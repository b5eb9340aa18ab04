"""Answers about pictures, scored by hand-worked numbers."""

import pytest

from erniekit.rewards.picture_answers import (
    anls,
    answer_score,
    box_score,
    edit_distance,
    iou,
    kind_of_reference,
    option_of,
    picture_scores,
    read_boxes,
)

CUP = '[{"bbox_2d": [100, 100, 300, 300], "label": "cup"}]'


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        (CUP, "boxes"),
        ('{"bbox_2d": [100, 100, 300, 300]}', "boxes"),
        ("[{'bbox_2d': [100, 100, 300, 300], 'label': 'cup'}]", "boxes"),
        ("[100, 100.5, 300, 300]", "boxes"),
        ("[1, 2, 3, 4], [5, 6, 7, 8]", "boxes"),
        ("The cup is at [1, 2, 3, 4].", "text"),
        ('{"city": "Bonn"}', "text"),
        ("[3, 2, 1, 4]", "text"),
        ("B", "option"),
        (" (C). ", "option"),
        ("b", "text"),
        ("A cup", "text"),
        ("I", "text"),
        ("", "text"),
    ],
)
def test_the_form_of_the_reference_says_how_an_answer_is_measured(reference: str, kind: str):
    assert kind_of_reference(reference) == kind


class TestBoxes:
    @pytest.mark.parametrize(
        "text",
        [
            "[100, 250, 400.0, 9e2]",
            "[[100,250,400,900]]",
            '{"bbox_2d": [100, 250, 400, 900]}',
            '[{"bbox_2d": [100, 250, 400, 900], "label": "cup"}]',
            '```json\n[{"bbox_2d": [100, 250, 400, 900]}]\n```',
            'It is here: {"bbox_2d": [100, 250, 400, 900]}, on the left.',
        ],
    )
    def test_forms(self, text: str):
        assert read_boxes(text).boxes == ((100, 250, 400, 900),)

    def test_labels_in_single_quotes_are_read(self):
        assert read_boxes("[{'bbox_2d': [1, 2, 3, 4], 'label': 'Cup'}]").labels == ("cup",)

    def test_beyond_the_picture_is_clamped_and_counted(self):
        found = read_boxes("[[-5, 10, 20, 30], [10, 20, 1200.5, 1000], [0, 0, 1000, 1000]]")
        assert found.boxes == ((0, 10, 20, 30), (10, 20, 1000, 1000), (0, 0, 1000, 1000))
        assert (found.overshoots, found.refused) == (2, 0)

    def test_swapped_corners_are_refused(self):
        found = read_boxes("[[300, 100, 100, 300], [100, 300, 300, 100], [1, 2, 3, 4]]")
        assert found.boxes == ((1, 2, 3, 4),)
        assert found.refused == 2

    @pytest.mark.parametrize("text", ["", "none", "[1, 2, 3]", "[1, 2, 3, true]", "[1, 2, 3, NaN]", "[1e999, 2, 3, 4]"])
    def test_what_is_no_box(self, text: str):
        assert read_boxes(text).boxes == ()

    def test_intersection_over_union(self):
        assert iou((0, 0, 100, 100), (0, 0, 100, 100)) == 1
        assert iou((0, 0, 100, 100), (50, 0, 150, 100)) == pytest.approx(5000 / 15000)
        assert iou((0, 0, 100, 100), (100, 0, 200, 100)) == 0
        assert iou((5, 5, 5, 5), (5, 5, 5, 5)) == 0

    def test_one_box_is_right_from_an_overlap_of_a_half_on(self):
        reference = "[0, 0, 100, 100]"
        assert box_score("[0, 0, 100, 50]", reference) == 1  # IoU 0.5
        assert box_score("[0, 0, 100, 49]", reference) == 0
        assert box_score("nowhere", reference) == 0

    def test_several_boxes(self):
        reference = "[[0, 0, 100, 100], [200, 0, 300, 100]]"
        assert box_score("[[200, 0, 300, 100], [0, 0, 100, 100]]", reference) == 1
        assert box_score("[0, 0, 100, 100]", reference) == pytest.approx(2 * 1 / 3)
        assert box_score("[[0, 0, 100, 100], [0, 0, 100, 100]]", reference) == pytest.approx(2 * 1 / 4)
        assert box_score("[[0, 0, 100, 100], [300, 0, 200, 100]]", reference) == pytest.approx(2 * 1 / 4)

    def test_labels_that_both_sides_have_must_agree(self):
        box = CUP.partition(', "label"')[0]
        assert box_score(CUP.replace("cup", "Cup "), CUP) == 1
        assert box_score(CUP.replace("cup", "dog"), CUP) == 0
        assert box_score(box + "}]", CUP) == 1


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("**D**", "D"),
        ("B. a red cup", "B"),
        ("B: a red cup", "B"),
        ("The answer is (C), not A.", "C"),
        ("Option A is wrong, so the answer is D", "D"),
        ("At first the answer is A. No, the answer is B.", "B"),
        ("答案是B", "B"),
        ("应选 C。", "C"),
        ("\\boxed{D}", "D"),
        ("Only D fits here", "D"),
        ("It is option A here", "A"),
        ("b", "B"),
        (" (c).", "C"),
        ("b. 4", "B"),
        ("b) a red cup", "B"),
        ("**(b)** a red cup", "B"),
        ("Option (c) is correct.", "C"),
        ("Option (a) is wrong, so the answer is D", "D"),
        ("Option (a) or option (b)", None),
        ("So it is $\\boxed{b}$", "B"),
        ("e.g. a cup", None),
        ("a.m. or p.m.", None),
        ("The answer is not B.", None),
        ("The answer is not (B) but C", "C"),
        ("Neither A nor B, so option D", "D"),
        ("答案不是B", None),
        ("不选A，选C", "C"),
        ("a cup", None),
        ("A cup stands there", None),
        ("B or C fits", None),
        ("Either A or B", None),
        ("B is wrong.", None),
        ("Option B is clearly incorrect.", None),
        ("选项B错误", None),
        ("B12 is a vitamin", None),
        ("B and C are wrong.", None),
        ("B is not correct; D is.", "D"),
        ("A项错误，B项正确", "B"),
        ("The answer is B, A is wrong.", "B"),
        ("B is right. A and C are wrong.", "B"),
        ("答案是B，A、C都错", "B"),
        ("answer: b", "B"),
        ("the answer is a cup", None),
        ("", None),
        ("none", None),
    ],
)
def test_the_letter_that_an_answer_chooses(answer: str, letter: str | None):
    assert option_of(answer) == letter


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("", "", 0), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_edit_distance(a: str, b: str, distance: int):
    assert edit_distance(a, b) == distance


def test_similarity_by_edit_distance():
    assert anls("EXIT ", "exit") == 1
    assert anls("exits", "exit") == pytest.approx(1 - 1 / 5)
    assert anls("ex  it", "ex it") == 1
    assert anls("ab", "ac") == 0  # half of the characters differ
    assert anls("", "") == 1
    assert anls("", "exit") == 0


def test_each_kind_is_averaged_over_its_own_answers():
    scores = picture_scores(
        ["[0, 0, 100, 1100]", "no", "B", "exits", "dog"],
        ["[0, 0, 100, 1000]", "[0, 0, 10, 10]", "B", "exit", "exit"],
    )
    assert scores == {
        "num_box_answers": 2,
        "box_iou50": 0.5,
        "box_mean_iou": 0.5,
        "num_boxes_overshooting": 1,
        "num_boxes_refused": 0,
        "num_option_answers": 1,
        "option_accuracy": 1.0,
        "num_text_answers": 2,
        "anls": pytest.approx((1 - 1 / 5 + 0) / 2),
    }
    assert picture_scores([], []) == {}
    assert picture_scores(["B"], ["C"]) == {"num_option_answers": 1, "option_accuracy": 0.0}


def test_a_single_answer():
    assert answer_score("It says exits", "exit") == ("text", 0.0)
    assert answer_score("The answer is B", "B") == ("option", 1.0)
    assert answer_score(CUP, CUP) == ("boxes", 1.0)
