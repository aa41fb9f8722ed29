"""The random view against the published rule: its odd probabilities, its arithmetic, its mirror image.

Expected shares follow from the normal distribution: P(N < 0.5) = 0.6915, P(|N| > 1) = 0.3173,
P(|N| > 2) = 0.0455. With 40,000 draws a share's standard error is at most 0.0025; bounds are 4 of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hrnet_core.augment import (
    Augmentation,
    View,
    draw,
    draw_fresh,
    draw_stored,
    keypoints_in_view,
    plain_view,
    random_view,
    view_to_crop,
)
from hrnet_core.geometry import apply_affine
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.skeleton import COCO17, Skeleton

SIZE = (192, 256)
MANY = 40_000
CENTER, SCALE = np.float32([300, 200]), np.float32([150, 200])
# Upper body (0-10) around x = 100, lower body around x = 500: which half was taken can be told.
PLACES = np.stack([np.where(np.arange(17) < 11, 100, 500), np.arange(17) * 10], axis=-1).astype(np.float32)
HALF, UPPER, ZOOM, TURN, TURNED, FLIPPED = range(6)


@pytest.fixture(scope="module")
def views() -> View:
    """A stored view of 40,000 people with all keypoints labelled, drawn as preprocess draws them: whether
    neighbouring ids give independent numbers is part of the question."""
    numbers = draw_stored(5, range(MANY), 1)
    everyone = np.broadcast_to(PLACES, (MANY, 17, 2))
    return random_view(numbers, CENTER, SCALE, everyone, np.full((MANY, 17), 2), COCO17, SIZE)


def numbers(**given: float) -> NDArray[np.float64]:
    """Draws that leave the view plain, but for those given."""
    plain = {"half": 1.0, "upper": 0.0, "zoom": 0.0, "turn": 0.0, "turned": 1.0, "flipped": 1.0}
    return np.array(list({**plain, **given}.values()))


def one(visible: Any = 2, places: Any = PLACES, **given: float) -> View:
    labels = np.broadcast_to(visible, 17)
    return random_view(numbers(**given), CENTER, SCALE, places, labels, COCO17, SIZE)


def near(share: Any, expected: float, of: int = MANY) -> bool:
    return abs(float(np.mean(share)) - expected) < 4 * np.sqrt(expected * (1 - expected) / of)


# ---------------------------------------------------------------------------------- distributions


def test_half_body_is_taken_in_three_of_ten_and_the_upper_half_in_69_of_100(views: View) -> None:
    """Trap 7: the reference compares a normal draw with 0.5, so it is not one half."""
    upper, lower = views.center[:, 0] == 100, views.center[:, 0] == 500
    plain = (views.center == CENTER).all(axis=1)
    assert (upper | lower | plain).all()
    assert near(~plain, 0.3)
    halves = int((~plain).sum())
    assert near(upper[~plain], 0.69146, of=halves)


def test_scale_is_a_clipped_normal(views: View) -> None:
    plain = (views.center == CENTER).all(axis=1)
    factor = views.scale[plain, 0] / SCALE[0]
    np.testing.assert_allclose(views.scale[plain, 1] / SCALE[1], factor, rtol=1e-6)
    assert factor.min() == pytest.approx(0.65)
    assert factor.max() == pytest.approx(1.35)
    ends = np.isclose(factor, 0.65) | np.isclose(factor, 1.35)
    assert near(ends, 0.31731, of=len(factor))
    # Inside it is N(1, 0.35): P(|N| < 0.5) = 0.3829.
    assert near(np.abs(factor - 1) < 0.175, 0.38292, of=len(factor))
    assert factor.mean() == pytest.approx(1, abs=0.01)


def test_rotation_is_gated_and_reaches_90_degrees(views: View) -> None:
    angle = views.rotation_deg
    turned = angle != 0
    assert near(turned, 0.6)
    assert np.abs(angle).max() == 90
    assert near(np.abs(angle[turned]) == 90, 0.0455, of=int(turned.sum()))
    assert near(np.abs(angle[turned]) < 45, 0.68269, of=int(turned.sum()))
    assert near(angle[turned] > 0, 0.5, of=int(turned.sum()))


def test_flip_is_even_and_independent_of_the_rest(views: View) -> None:
    assert near(views.flipped, 0.5)
    plain = (views.center == CENTER).all(axis=1)
    parts = np.stack([views.flipped, plain, views.rotation_deg != 0, views.rotation_deg, views.scale[:, 0]])
    correlation = np.corrcoef(parts.astype(float))
    correlation[1, 4] = correlation[4, 1] = 0  # the half body has another scale
    assert np.abs(correlation - np.eye(5)).max() < 0.02


# ---------------------------------------------------------------------------------- arithmetic


def test_a_person_needs_more_than_eight_labels() -> None:
    eight = np.arange(17) < 8
    nine = np.arange(17) < 9
    assert (one(visible=eight, half=0.0).center == CENTER).all()
    assert one(visible=nine, half=0.0).center[0] == 100
    assert (one(visible=nine, half=0.3).center == CENTER).all()


def test_half_body_box_by_hand() -> None:
    """Lower half: x 500, y 110 ... 160. Mean y 135; extent 0 x 50, widened to 37.5 x 50, times 1.5."""
    view = one(half=0.0, upper=0.5)
    assert view.center.tolist() == [500, 135]
    assert view.scale.tolist() == [56.25, 75]
    # Upper half: y 0 ... 100, mean 50; 75 x 100 times 1.5, then scaled by 1 + 0.35.
    view = one(half=0.0, upper=0.49, zoom=1.0)
    assert view.center.tolist() == [100, 50]
    np.testing.assert_allclose(view.scale, [112.5 * 1.35, 150 * 1.35], rtol=1e-6)


def test_half_body_takes_the_other_half_where_one_is_too_small() -> None:
    lower_two = np.isin(np.arange(17), [*range(11), 11, 12])
    assert one(visible=lower_two, half=0.0, upper=2.0).center[0] == 100  # lower has no more than 2
    upper_two = np.isin(np.arange(17), [0, 1, *range(11, 17)])
    none = one(visible=upper_two, half=0.0, upper=-2.0)
    assert (none.center == CENTER).all()  # eight labels: not at all
    custom = Skeleton("two-heads", COCO17.keypoints, (), COCO17.oks_sigmas, upper_body=(0, 1))
    view = random_view(numbers(half=0.0, upper=-2.0), CENTER, SCALE, PLACES, np.ones(17), custom, SIZE)
    assert view.center[1] == pytest.approx(np.mean(np.arange(2, 17) * 10))  # 2 upper: the lower 15


def test_half_body_without_extent_is_not_taken() -> None:
    assert (one(places=np.full((17, 2), 7.0), half=0.0).center == CENTER).all()


def test_scale_and_rotation_by_hand() -> None:
    view = one(zoom=-3.0, turn=1.0, turned=0.6, flipped=0.5)
    np.testing.assert_allclose(view.scale, SCALE * 0.65, rtol=1e-6)
    assert (view.rotation_deg, bool(view.flipped)) == (45, True)
    assert one(turn=-3.0, turned=0.0).rotation_deg == -90
    assert one(turn=1.0, turned=0.61).rotation_deg == 0


def test_batched_equals_one_by_one_and_the_generator_form() -> None:
    rng = np.random.default_rng(3)
    places = rng.uniform(0, 300, (50, 17, 2)).astype(np.float32)
    visible = rng.integers(0, 3, (50, 17))
    center, scale = rng.uniform(50, 90, (2, 50, 2)).astype(np.float32)
    draws = draw_stored(7, range(50), 1)
    together = random_view(draws, center, scale, places, visible, COCO17, SIZE)
    for i in range(50):
        generator = np.random.default_rng(np.random.SeedSequence([7, i, 1]))
        alone = random_view(generator, center[i], scale[i], places[i], visible[i], COCO17, SIZE)
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_array_equal(a[i], b)


def test_a_stored_view_depends_on_seed_person_and_variant_alone() -> None:
    some = draw_stored(7, [5, 9], 2)
    np.testing.assert_array_equal(draw_stored(7, [1, 9, 5], 2)[[2, 1]], some)
    for other in (draw_stored(8, [5, 9], 2), draw_stored(7, [5, 9], 1), draw_stored(7, [9, 5], 2)):
        assert (other != some).all()


def test_a_fresh_view_depends_on_seed_epoch_and_person_alone() -> None:
    some = draw_fresh(7, 3, [5, 9])
    np.testing.assert_array_equal(draw_fresh(7, 3, [1, 9, 5])[[2, 1]], some)
    np.testing.assert_array_equal(some[1], draw(np.random.default_rng(np.random.SeedSequence([7, 3, 9]))))
    for other in (draw_fresh(8, 3, [5, 9]), draw_fresh(7, 4, [5, 9]), draw_fresh(7, 3, [9, 5])):
        assert (other != some).all()


# ---------------------------------------------------------------------------------- the mirror


def test_mirrored_keypoints_are_the_references(reference: dict[str, Any]) -> None:
    """Trap 9: the reference also zeroes what is not visible; a place that is not labelled is not read."""
    case = reference["official_fliplr_joints"]
    joints, vis = np.array(case["joints_in"])[:, :2], np.array(case["vis_in"])[:, 0]
    mirror = np.array([[-1.0, 0, case["width"] - 1], [0, 1, 0]])
    places, visible = keypoints_in_view(mirror, True, joints, vis, COCO17)
    np.testing.assert_array_equal(visible, np.array(case["vis_out"])[:, 0])
    np.testing.assert_allclose(places * visible[:, None], np.array(case["joints_out"])[:, :2])
    same, _ = keypoints_in_view(mirror * [[-1], [1]], False, joints, vis, COCO17)
    np.testing.assert_allclose(same[:, 1], joints[:, 1])


@pytest.mark.parametrize("name", ["official", "dark", "udp"])
def test_the_views_matrix_is_mirror_then_crop(name: Any) -> None:
    """The published order: mirror the photo and the center, keep the angle, crop."""
    codec, width = HeatmapCodec(name, SIZE), 640
    center, scale, angle = np.float32([120, 90]), np.float32([150, 200]), np.float32(30)
    places = np.float32([[10, 20], [130, 80], [600, 300]])
    upright = View(center, scale, angle, np.asarray(False))
    np.testing.assert_array_equal(
        view_to_crop(upright, codec, width), codec.image_to_crop_matrix(center, scale, angle)
    )
    mirrored_center = np.float32([width - 1 - 120, 90])
    mirrored_places = np.stack([width - 1 - places[:, 0], places[:, 1]], axis=-1)
    expected = apply_affine(codec.image_to_crop_matrix(mirrored_center, scale, angle), mirrored_places)
    matrices = view_to_crop(upright._replace(flipped=np.asarray(True)), codec, width)
    np.testing.assert_allclose(apply_affine(matrices, places), expected, atol=1e-3)


def test_the_plain_view_is_upright() -> None:
    view = plain_view(np.zeros((3, 2)), np.ones((3, 2)))
    assert (view.rotation_deg == 0).all()
    assert not view.flipped.any()
    assert view.center.dtype == view.scale.dtype == np.float32


def test_the_spread_of_views_is_a_setting() -> None:
    """No scale, no rotation, no half body, always mirrored: the plain view in a mirror."""
    numbers = np.array([draw(np.random.default_rng(i)) for i in range(50)])
    keypoints = np.tile(np.linspace([60, 40], [150, 300], 17), (50, 1, 1))
    how = Augmentation(scale_factor=0, rotation_factor=0, half_body_probability=0, flip_probability=1)
    center, scale = np.full((50, 2), 100.0), np.full((50, 2), (150.0, 200.0))
    view = random_view(numbers, center, scale, keypoints, np.full((50, 17), 2), COCO17, (192, 256), how)
    np.testing.assert_array_equal(view.center, center)
    np.testing.assert_array_equal(view.scale, scale)
    assert not view.rotation_deg.any()
    assert view.flipped.all()
