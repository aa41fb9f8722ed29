"""Boxes and matrices against the published code's numbers, and crops against its crops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hrnet_core.geometry import (
    apply_affine,
    box_to_center_scale,
    compose_affine,
    crop_people,
    cut_around,
    cut_photo,
    invert_affine,
    place_in_image,
    sanitize_boxes,
    three_point_matrix,
    udp_matrix,
)
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.images import decode_image

SIZES = [(192, 256), (288, 384)]
RNG = np.random.default_rng(0)


def close_matrix(ours: NDArray[Any], published: NDArray[Any]) -> bool:
    """reference_vectors.json: 1e-3 on the translation, 1e-5 on the linear part."""
    difference = np.abs(ours - published)
    return bool(difference[..., 2].max() <= 1e-3 and difference[..., :2].max() <= 1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_box_to_matrix_is_the_published_one(reference: dict[str, Any], size: tuple[int, int]) -> None:
    cases = [c for c in reference["official_box_affine"]["cases"] if tuple(c["input_wh"]) == size]
    assert len(cases) == 20
    center, scale = box_to_center_scale([c["box_xywh"] for c in cases], size)
    np.testing.assert_allclose(center, [c["center"] for c in cases], rtol=1e-6)
    np.testing.assert_allclose(scale / 200, [c["scale"] for c in cases], rtol=1e-6)

    rotation = [c["rot"] for c in cases]
    published = np.array([c["trans"] for c in cases])
    for name in ("official", "dark"):
        assert close_matrix(HeatmapCodec(name, size).image_to_crop_matrix(center, scale, rotation), published)
    assert not close_matrix(udp_matrix(center, scale, size, rotation), published)


def test_points_go_there_and_back_as_published(reference: dict[str, Any]) -> None:
    cases = [c for c in reference["official_box_affine"]["cases"] if "points_in_image" in c]
    assert cases
    for case in cases:
        size = tuple(case["input_wh"])
        image_to_crop = three_point_matrix(*box_to_center_scale(case["box_xywh"], size), size)
        moved = apply_affine(image_to_crop, case["points_in_image"])
        np.testing.assert_allclose(moved, case["points_in_input"], atol=1e-3)
        np.testing.assert_allclose(place_in_image(moved, image_to_crop), case["points_in_image"], atol=1e-3)
        # Decoding goes through heatmap cells of exactly 4 crop px.
        heatmap_to_image = compose_affine(invert_affine(image_to_crop), [[4, 0, 0], [0, 4, 0]])
        assert close_matrix(heatmap_to_image, np.array(case["inv_from_heatmap"]))


def test_udp_and_standard_warp_are_mmposes(reference: dict[str, Any]) -> None:
    for case in reference["mmpose_warp"]["cases"]:
        for name, key in (("udp", "udp"), ("official", "standard")):
            ours = HeatmapCodec(name, case["output_wh"]).image_to_crop_matrix(
                case["center"], case["scale_px"], case["rot"]
            )
            assert close_matrix(ours, np.array(case[key])), (name, case)


def test_warp_cases_of_mmposes_own_tests(mmpose_cases: dict[str, Any]) -> None:
    for case in mmpose_cases["warp_matrix"]["cases"]:
        if case.get("fix_aspect_ratio") is False:
            continue  # a box of another aspect is stretched there; ours always has the input's
        center = np.array(case["center"]) + np.array(case.get("shift", [0, 0])) * case["scale"]
        matrix = three_point_matrix(center, case["scale"], case["out"], case["rot"])
        if case.get("inv"):
            matrix = invert_affine(matrix)
        # The published numbers went through float32 points.
        np.testing.assert_allclose(matrix, case["expected"], rtol=1e-6, atol=1e-5)


def test_udp_maps_the_first_and_the_last_pixel_of_the_box_to_those_of_the_crop() -> None:
    """Section 3.2 of the UDP paper: the box spans scale px, the crop W - 1 steps between pixel centres."""
    matrix = udp_matrix([60, 80], [48, 64], (192, 256))
    moved = apply_affine(matrix, [[60 - 24, 80 - 32], [60 + 24, 80 + 32]])
    np.testing.assert_allclose(moved, [[0, 0], [191, 255]], atol=1e-4)


@pytest.mark.parametrize("make", [three_point_matrix, udp_matrix])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_matrix_algebra_is_that_of_3x3_matrices(make: Any, leading: tuple[int, ...]) -> None:
    center, scale = RNG.uniform(50, 400, (*leading, 2)), RNG.uniform(40, 300, (*leading, 2))
    first = make(center, scale, (192, 256), RNG.uniform(-90, 90, leading))
    second = make(center + 7, scale * 1.3, (192, 256), RNG.uniform(-90, 90, leading))
    assert first.shape == (*leading, 2, 3)
    assert first.dtype == np.float64

    def square(matrix: NDArray[Any]) -> NDArray[Any]:
        last_row = np.broadcast_to([0.0, 0.0, 1.0], (*matrix.shape[:-2], 1, 3))
        return np.concatenate([matrix, last_row], axis=-2)

    np.testing.assert_allclose(
        square(invert_affine(first)), np.linalg.inv(square(first)), rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(
        square(compose_affine(second, first)), square(second) @ square(first), rtol=1e-12
    )

    points = RNG.uniform(-50, 500, (*leading, 17, 2)).astype(np.float32)
    before = points.copy()
    moved = apply_affine(first, points)
    assert moved.dtype == np.float32
    homogeneous = np.concatenate([points, np.ones((*leading, 17, 1))], axis=-1)
    np.testing.assert_allclose(moved, np.einsum("...ij,...kj->...ki", first, homogeneous), atol=1e-3)
    np.testing.assert_allclose(place_in_image(moved, first), points, atol=1e-3)
    np.testing.assert_array_equal(points, before)


def test_ground_truth_boxes_are_the_published_ones(
    reference: dict[str, Any], mmpose_cases: dict[str, Any]
) -> None:
    """12 of the fixture's 14 people, as the official loader prepares them."""
    fixture = mmpose_cases["coco_fixture"]
    sizes = {image["id"]: (image["width"], image["height"]) for image in fixture["images"]}
    people = [a for a in fixture["annotations"] if max(a["keypoints"]) > 0]
    width, height = np.transpose([sizes[a["image_id"]] for a in people])
    boxes, keep = sanitize_boxes([a["bbox"] for a in people], width, height)
    assert keep.all()

    center, scale = box_to_center_scale(boxes, (192, 256))
    records = reference["official_gt_boxes_test_coco"]["records"]
    assert [a["image_id"] for a in people] == [r["image_id"] for r in records]
    np.testing.assert_allclose(center, [r["center"] for r in records], atol=1e-3)
    np.testing.assert_allclose(scale / 200, [r["scale"] for r in records], atol=1e-5)


def test_sanitized_boxes_by_hand() -> None:
    boxes = {
        "inside, one pixel less": ([10, 20, 30, 40], [10, 20, 29, 39], True),
        "sticks out at the top left: cut there, its size kept": ([-5, -3, 30, 40], [0, 0, 29, 39], True),
        "sticks out at the bottom right": ([90, 70, 30, 40], [90, 70, 9, 9], True),
        "one pixel wide": ([10, 20, 1, 40], [10, 20, 0, 39], True),
        "one pixel, no crop can be made": ([10, 20, 1, 1], None, False),
        "right of the image": ([100, 20, 30, 40], None, False),
        "below the image": ([10, 80, 30, 40], None, False),
        "negative size": ([10, 20, -4, -4], None, False),
        "not a number": ([10, np.nan, 30, 40], None, False),
    }
    given = np.array([box for box, _, _ in boxes.values()])
    before = given.copy()
    cleaned, keep = sanitize_boxes(given, 100, 80)
    assert cleaned.dtype == np.float32
    assert cleaned.shape == given.shape
    np.testing.assert_array_equal(given, before)
    for row, (name, (_, expected, kept)) in enumerate(boxes.items()):
        assert keep[row] == kept, name
        if expected is not None:
            np.testing.assert_array_equal(cleaned[row], expected, err_msg=name)


def test_the_shorter_side_is_widened_and_both_are_padded() -> None:
    center, scale = box_to_center_scale([[10, 20, 90, 40], [10, 20, 30, 400]], (192, 256), padding=1.5)
    np.testing.assert_allclose(center, [[55, 40], [25, 220]])
    np.testing.assert_allclose(scale, [[135, 180], [450, 600]])
    assert center.dtype == scale.dtype == np.float32


def test_a_crop_of_the_cameras_own_scale_is_a_slice() -> None:
    image = RNG.integers(0, 256, (60, 90, 3), dtype=np.uint8)
    before = image.copy()
    matrices = np.array([[[1, 0, -20], [0, 1, -10]], [[1, 0, 5], [0, 1, 3]], [[0, 1, 0], [1, 0, 0]]])
    crops = crop_people(image, matrices, (32, 40))
    assert crops.shape == (3, 40, 32, 3)
    assert crops.dtype == np.uint8
    np.testing.assert_array_equal(crops[0], image[10:50, 20:52])
    np.testing.assert_array_equal(crops[1, 3:, 5:], image[:37, :27])
    assert crops[1, :3].max() == 0, "black outside the image"
    assert crops[1, :, :5].max() == 0, "black outside the image"
    np.testing.assert_array_equal(crops[2], image.transpose(1, 0, 2)[:40, :32])
    np.testing.assert_array_equal(image, before)
    assert crop_people(image, np.empty((0, 2, 3)), (32, 40)).shape == (0, 40, 32, 3)


def test_crops_are_bilinear() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    image[:, 2:] = 200
    half_a_pixel = crop_people(image, [[[1, 0, -0.5], [0, 1, 0]]], (3, 4))[0]
    np.testing.assert_array_equal(half_a_pixel[0, :, 0], [0, 100, 200])


def test_pictures_wider_than_opencvs_short_integers() -> None:
    image = np.zeros((8, 40_000, 3), np.uint8)
    image[:, 39_000:39_010] = 255
    crop = crop_people(image, [[[1, 0, -39_000], [0, 1, 0]]], (16, 8))[0]
    np.testing.assert_array_equal(crop[:, :10], 255)
    np.testing.assert_array_equal(crop[:, 10:], 0)


def test_real_photographs_are_cropped_as_published(reference: dict[str, Any], real_data: Path) -> None:
    """Four photographs, twelve people: picture statistics, a keypoint and the targets of each."""
    folder = real_data / "evaluator" / "mmpose_test_coco"
    fixture = json.loads((folder / "test_coco.json").read_text())
    names = {image["id"]: image["file_name"] for image in fixture["images"]}
    people = [a for a in fixture["annotations"] if max(a["keypoints"]) > 0]
    samples = reference["official_val_samples_test_images"]["samples"]
    assert [a["image_id"] for a in people] == [s["image_id"] for s in samples]
    codec = HeatmapCodec("official")
    for person, sample in zip(people, samples, strict=True):
        image = decode_image((folder / names[person["image_id"]]).read_bytes(), apply_exif=False)
        box, _ = sanitize_boxes(person["bbox"], image.shape[1], image.shape[0])
        image_to_crop = codec.image_to_crop_matrix(*box_to_center_scale(box, codec.input_size))
        crop = crop_people(image, image_to_crop[None], codec.input_size)[0]
        np.testing.assert_allclose(crop.mean(axis=(0, 1)), sample["crop_mean_rgb"], atol=0.2)
        np.testing.assert_allclose(crop.std(axis=(0, 1)), sample["crop_std_rgb"], atol=0.2)
        assert (crop == 0).all(axis=-1).mean() == pytest.approx(sample["black_fraction"], abs=2e-3)

        keypoints = np.array(person["keypoints"], np.float64).reshape(17, 3)
        in_crop = apply_affine(image_to_crop, keypoints[:, :2])
        if keypoints[0, 2] > 0:  # the reference leaves unlabelled joints at (0, 0)
            np.testing.assert_allclose(in_crop[0], sample["nose_input_xy"], atol=1e-2)
        heatmaps, weights = codec.encode(in_crop, keypoints[:, 2])
        assert heatmaps.sum() == pytest.approx(sample["target_sum"], abs=1e-2)
        assert weights.sum() == sample["weight_sum"]


def test_a_cut_is_whole_pixels_as_far_as_the_photo_reaches() -> None:
    """By hand: 20 px around (50.5, 10) in a photo of 100 x 60 are columns 40 to 61 and rows 0 to 20."""
    cuts = cut_around([[50.5, 10], [99, 59], [0, 0]], [20, 1, 1000], [100, 60], 1000)
    assert cuts.box.tolist() == [[40, 0, 62, 21], [98, 58, 100, 60], [0, 0, 100, 60]]
    assert cuts.size.tolist() == [[22, 21], [2, 2], [100, 60]]
    np.testing.assert_array_equal(cuts.image_to_picture[0], [[1, 0, -40], [0, 1, 0]])
    photo = RNG.integers(0, 256, (60, 100, 3), np.uint8)
    np.testing.assert_array_equal(cut_photo(photo, cuts.box[0], cuts.size[0]), photo[0:21, 40:62])


def test_a_cut_that_is_too_large_is_made_smaller_around_its_edges() -> None:
    """100 x 60 into at most 25 px: four pixels become one, whose centre lies between the second and the
    third of them."""
    cuts = cut_around([30.0, 20.0], 1000, [100, 60], 25)
    assert cuts.size.tolist() == [25, 15]
    np.testing.assert_allclose(
        apply_affine(cuts.image_to_picture, [[1.5, 1.5], [97.5, 57.5]]), [[0, 0], [24, 14]]
    )
    ramp = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None], (60, 100, 3))
    small = cut_photo(ramp, cuts.box, cuts.size)
    np.testing.assert_allclose(small[7, :, 0], 4 * np.arange(25) + 1.5, atol=0.51)
