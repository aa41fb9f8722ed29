"""Overlays and contact sheets: what is drawn, where, how thick, and that inputs stay as they were."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from hrnet_core.errors import DataError
from hrnet_core.overlays import color_line, draw_heatmaps, draw_poses, tile
from hrnet_core.skeleton import COCO17, HEAD, LEFT, RIGHT, Skeleton

BONE = Skeleton("bone", ("left_end", "right_end"), ((0, 1),), (0.1, 0.1), limbs=((0, 1),))
GREY = np.full((300, 600, 3), 90, np.uint8)


def bone(x0: float, x1: float, y: float = 150) -> NDArray[np.float32]:
    return np.array([[[x0, y], [x1, y]]], np.float32)


def drawn_rows(image: NDArray[np.uint8], column: int) -> int:
    return int((image[:, column] != 90).any(axis=1).sum())


def test_a_limb_is_drawn_in_the_colours_of_its_ends() -> None:
    drawn = draw_poses(GREY, bone(100, 500), None, BONE)
    assert (GREY == 90).all()
    assert drawn.dtype == np.uint8
    assert drawn.shape == GREY.shape
    assert drawn[150, 200].tolist() == list(LEFT)  # RGB
    assert drawn[150, 400].tolist() == list(RIGHT)
    assert (drawn[20] == 90).all()
    assert (BONE.palette, COCO17.palette[0]) == ((LEFT, RIGHT), HEAD)


def test_lines_are_as_thick_as_the_person_is_large() -> None:
    small, large = (draw_poses(GREY, bone(300 - half, 300 + half), None, BONE) for half in (40, 280))
    assert drawn_rows(small, 290) < drawn_rows(large, 290)
    # The box tells the size where it is given, also of a person of whom little is seen.
    boxed = draw_poses(GREY, bone(260, 340), None, BONE, boxes_xywh=[[20, 20, 560, 260]])
    assert drawn_rows(boxed[100:200], 290) == drawn_rows(large[100:200], 290)


def test_sub_pixel_places_are_drawn_as_such() -> None:
    whole, between = (draw_poses(GREY, bone(100, 500, y), None, BONE).astype(int) for y in (150, 150.5))
    rows = np.arange(300)
    middles = [
        (np.abs(i[:, 200] - 90).sum(axis=1) * rows).sum() / np.abs(i[:, 200] - 90).sum()
        for i in (whole, between)
    ]
    assert 0.25 < middles[1] - middles[0] < 0.85  # drawing to whole pixels gives 0 or 1


def test_low_scores_missing_and_far_keypoints_are_left_out() -> None:
    for scores, keypoints in (
        ([[0.3, 0.2]], bone(100, 500)),
        (None, np.full((1, 2, 2), np.nan)),
        (None, np.full((1, 2, 2), 1e8)),
        (None, np.full((1, 2, 2), -5000.0)),
        (None, np.zeros((0, 2, 2))),
    ):
        assert (draw_poses(GREY, keypoints, scores, BONE) == GREY).all()
    one = draw_poses(GREY, bone(100, 500), [[0.9, 0.1]], BONE)
    assert (one[150, 100] != 90).any()
    assert (one[150, 120:] == 90).all()  # no limb to a keypoint that is not shown


def test_boxes_are_drawn_where_they_are() -> None:
    drawn = draw_poses(GREY, np.zeros((1, 2, 2)), [[0, 0]], BONE, boxes_xywh=[[50, 60, 200, 100]])
    assert drawn[60, 150].tolist() == [255, 255, 255]
    assert drawn[110, 250].tolist() == [255, 255, 255]
    assert (drawn[100:120, 100:200] == 90).all()


def test_a_box_is_thinner_than_the_thinnest_limb() -> None:
    """In a crowd of small people boxes of 7 px stood beside limbs of 7."""
    picture = np.full((480, 640, 3), 90, np.uint8)
    limb = draw_poses(picture, bone(280, 340, 240), None, BONE)
    box = draw_poses(picture, np.zeros((1, 2, 2)), [[0, 0]], BONE, boxes_xywh=[[280, 200, 60, 80]])
    assert drawn_rows(box[:240], 310) < drawn_rows(limb, 300)
    assert (box[:240, 310] == 255).all(axis=1).sum() == 1


def test_small_people_of_a_wide_picture_are_no_blots() -> None:
    """Of a panorama of 6,000 px limbs were 25 px thick: a person of 100 px was hidden."""
    picture = np.full((300, 6000, 3), 90, np.uint8)
    drawn = draw_poses(picture, bone(3000, 3100), None, BONE, boxes_xywh=[[2990, 100, 120, 100]])
    assert 3 <= drawn_rows(drawn[120:180], 3025) <= 9
    assert drawn_rows(drawn[120:180], 3000) <= 12, "a dot"
    assert drawn_rows(drawn[:120], 3050) <= 8, "the box"
    # Where nothing tells how large a person is, one keypoint alone has to be found in all of the picture.
    alone = draw_poses(picture, bone(3000, 3100), [[1, 0]], BONE)
    assert drawn_rows(alone, 3000) > 20


def test_colours_are_explained_where_they_tell_sides() -> None:
    hand = Skeleton("hand", ("wrist", "thumb"), (), (0.1, 0.1), limbs=((0, 1),))
    own = Skeleton("own", BONE.keypoints, ((0, 1),), (0.1, 0.1), colors=(LEFT, RIGHT))
    assert color_line(COCO17) == color_line(BONE) == "The person's left is green, the right orange."
    assert color_line(hand) == color_line(own) == ""


def test_a_box_that_is_none_leaves_its_person_drawn() -> None:
    """It told how thick the lines are: a NaN was an error of OpenCV's."""
    without = draw_poses(GREY, bone(100, 500), None, BONE)
    for box in ([0, 0, np.nan, 9], [0, 0, np.inf, 9], [0, 0, 1e9, 9]):
        assert (draw_poses(GREY, bone(100, 500), None, BONE, boxes_xywh=[box]) == without).all()


def test_what_cannot_be_drawn_is_refused() -> None:
    """A grey or a float picture came back as such, drawn into; of two people with one box one was drawn."""
    two = np.concatenate([bone(100, 300), bone(400, 500)])
    for image in (GREY[..., 0], GREY / 255.0, GREY[..., :2]):
        with pytest.raises(DataError, match=r"image must be a uint8 array \(H, W, 3\), RGB"):
            draw_poses(image, two, None, BONE)
        with pytest.raises(DataError, match=r"crop must be a uint8 array \(H, W, 3\), RGB"):
            draw_heatmaps(image, np.zeros((2, 8, 6)))
    with pytest.raises(ValueError, match="one a person: 1 boxes, 2 people"):
        draw_poses(GREY, two, None, BONE, boxes_xywh=[[50, 60, 200, 100]])
    with pytest.raises(ValueError, match=r"keypoints must be \(P, 2, 2\), x and y of .*, got \(2, 2, 3\)"):
        draw_poses(GREY, np.dstack([two, np.ones((2, 2))]), None, BONE)
    with pytest.raises(ValueError, match=r"heatmaps must be \(K, H, W\) of one person, got \(1, 2, 8, 6\)"):
        draw_heatmaps(GREY, np.zeros((1, 2, 8, 6)))
    assert (draw_poses(GREY, [], [], BONE, boxes_xywh=[]) == GREY).all()


@pytest.mark.parametrize(("column", "row"), [(0, 0), (12, 20), (47, 63)])
def test_a_heatmap_cell_lies_on_its_crop_pixel(column: int, row: int) -> None:
    crop = np.zeros((256, 192, 3), np.uint8)
    heatmaps = np.zeros((17, 64, 48), np.float32)
    heatmaps[3, row, column] = 1
    drawn = draw_heatmaps(crop, heatmaps)
    assert (crop == 0).all()
    # Turbo's end is dark red; opacity .85 on black.
    peak = drawn[4 * row, 4 * column].astype(int)
    assert peak[0] > 80
    assert peak[1:].max() < 10
    changed = np.argwhere(drawn.any(axis=2))
    assert np.abs(changed - [4 * row, 4 * column]).max() < 4


def test_no_heat_leaves_the_crop() -> None:
    crop = np.random.default_rng(0).integers(0, 256, (128, 96, 3), dtype=np.uint8)
    assert (draw_heatmaps(crop, np.full((17, 32, 24), -0.1)) == crop).all()


def test_a_sheet_holds_each_picture_whole_and_in_order() -> None:
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 200, (h, w, 3), dtype=np.uint8) for h, w in ((60, 80), (40, 80), (60, 50), (30, 30))
    ]
    labels = ["one", "two", "three", "a label that is far too long for it"]
    sheet = tile(images, 3, labels)
    found = []
    for image in images:
        starts = np.argwhere((sheet == image[0, 0]).all(axis=2)).tolist()
        h, w = image.shape[:2]
        (place,) = [[y, x] for y, x in starts if np.array_equal(sheet[y : y + h, x : x + w], image)]
        found.append(place)
    assert found[0][0] < found[3][0]
    assert found[0][1] < found[1][1] < found[2][1]
    assert found[0][1] < found[3][1] < found[1][1]  # second row, first column, in its middle
    under = sheet[found[0][0] + 60 + 2 : found[0][0] + 60 + 20, found[0][1] : found[0][1] + 80]
    assert under.min() < 100  # ink
    assert tile(images, 3).shape[0] < sheet.shape[0]
    assert tile(images[:1], 3).shape[1] < 100  # no empty columns
    told = tile(images, 3, labels, "What is seen here, in more words than a line of this sheet has room for.")
    above = told.shape[0] - sheet.shape[0]
    assert above > 2 * 11, "two lines at least"
    np.testing.assert_array_equal(told[above + 4 :], sheet[4:])
    assert (told[4:above] < 100).any()
    assert (told[:, -4:] == told[0, 0]).all(), "nothing is cut off at the right"


def test_a_sheet_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        tile([], 3)
    with pytest.raises(ValueError, match="a label for each"):
        tile([GREY, GREY], 3, ["only one"])
