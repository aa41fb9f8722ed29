"""The random view of a person, by the published training augmentation (official JointsDataset.py:65-108,
145-165, with the values of the published yaml files).

A view is a center, a scale, a rotation and whether it is mirrored, all in px of the photo as it is: the
mirroring comes last and is part of the view's matrix (`view_to_crop`), not of the photo.

Six numbers decide a view (`draw`), always drawn and always in the same order, so that any batched
implementation can repeat it: U half body, N upper or lower, N scale, N rotation, U rotated, U flipped.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hrnet_core.choices import OFFICIAL, Augmentation
from hrnet_core.geometry import Float32, Float64, apply_affine, compose_affine
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.skeleton import Skeleton

HALF_BODY_MORE_THAN = 8
"""Labelled keypoints that a person must exceed."""
UPPER_BELOW = 0.5
"""The upper half is taken where a normal (not uniform) draw is below this: P = 0.69."""
HALF_BODY_PADDING = 1.5
ROTATION_PROBABILITY = 0.6


class View(NamedTuple):
    """How a person is looked at; every field has the leading shape of its input."""

    center: Float32
    """(..., 2) photo px."""
    scale: Float32
    """(..., 2) photo px, padding included."""
    rotation_deg: Float32
    """(...,); which way is the codec's convention."""
    flipped: NDArray[np.bool_]
    """(...,)"""


def plain_view(center: ArrayLike, scale: ArrayLike) -> View:
    """The view of evaluation: upright, as the box says. center, scale (..., 2) in photo px."""
    centers, scales = np.asarray(center, np.float32), np.asarray(scale, np.float32)
    upright = np.zeros(centers.shape[:-1], np.float32)
    return View(centers, scales, upright, upright.astype(bool))


def draw(rng: np.random.Generator) -> Float64:
    """The six numbers of one view, float64 (6,)."""
    half, turned, flipped = rng.random(3)
    upper, scale, rotation = rng.standard_normal(3)
    return np.array([half, upper, scale, rotation, turned, flipped])


def draw_stored(seed: int, ann_ids: Iterable[int], variant: int) -> Float64:
    """The numbers of each person's stored view, float64 (P, 6): from SeedSequence([seed, ann_id, variant])
    alone, whatever is drawn beside it."""
    return _draw_each([seed, ann_id % 2**64, variant] for ann_id in ann_ids)


def draw_fresh(seed: int, epoch: int, ann_ids: Iterable[int]) -> Float64:
    """The numbers of each person's view of an epoch, float64 (P, 6): from SeedSequence([seed, epoch,
    ann_id]) alone."""
    return _draw_each([seed, epoch, ann_id % 2**64] for ann_id in ann_ids)


def _draw_each(entropies: Iterable[list[int]]) -> Float64:
    generators = (np.random.default_rng(np.random.SeedSequence(entropy)) for entropy in entropies)
    return np.array([draw(rng) for rng in generators]).reshape(-1, 6)


def random_view(
    draws: np.random.Generator | ArrayLike,
    center: ArrayLike,
    scale: ArrayLike,
    keypoints: ArrayLike,
    visible: ArrayLike,
    skeleton: Skeleton,
    input_size: tuple[int, int],
    augmentation: Augmentation = OFFICIAL,
) -> View:
    """The training view of people whose plain view is center, scale (..., 2), all in photo px.

    draws: a Generator for one person, or the numbers (..., 6) of many. keypoints (..., K, 2), visible
    (..., K) as annotated; visible 1 and 2 count the same. input_size (width, height) gives the aspect.
    """
    numbers = draw(draws) if isinstance(draws, np.random.Generator) else np.asarray(draws, np.float64)
    half, upper, zoom, rotation, turned, flipped = np.moveaxis(numbers, -1, 0)
    labelled = np.asarray(visible) > 0
    wanted = (labelled.sum(axis=-1) > HALF_BODY_MORE_THAN) & (half < augmentation.half_body_probability)
    half_center, half_scale, possible = half_body(
        np.asarray(keypoints, np.float32), labelled, upper < UPPER_BELOW, skeleton, input_size
    )
    use = (wanted & possible)[..., None]
    spread, turn = augmentation.scale_factor, augmentation.rotation_factor
    factor = np.clip(1 + spread * zoom, 1 - spread, 1 + spread)
    angle = np.clip(turn * rotation, -2 * turn, 2 * turn)
    return View(
        center=np.where(use, half_center, center).astype(np.float32),
        scale=(np.where(use, half_scale, scale) * factor[..., None]).astype(np.float32),
        rotation_deg=np.where(turned <= ROTATION_PROBABILITY, angle, 0).astype(np.float32),
        flipped=np.asarray(flipped <= augmentation.flip_probability),
    )


def half_body(
    keypoints: Float32,
    labelled: NDArray[np.bool_],
    prefer_upper: NDArray[np.bool_],
    skeleton: Skeleton,
    input_size: tuple[int, int],
) -> tuple[Float32, Float32, NDArray[np.bool_]]:
    """center, scale float32 (..., 2) of the labelled keypoints of one half, and whether there is one.

    The upper half needs to be preferred and to have more than two keypoints; else the lower if it has
    more than two, else the upper; at least two in any case. The center is the mean of the keypoints, the
    scale their extent, widened to the aspect and times 1.5: it takes the place of the padded box.
    """
    is_upper = np.isin(np.arange(skeleton.num_keypoints), skeleton.upper_body)
    upper, lower = labelled & is_upper, labelled & ~is_upper
    take_upper = prefer_upper & (upper.sum(axis=-1) > 2) | (lower.sum(axis=-1) <= 2)
    selected = np.where(take_upper[..., None], upper, lower)
    count = selected.sum(axis=-1)
    inside = selected[..., None]
    center = (keypoints * inside).sum(axis=-2) / np.maximum(count, 1)[..., None]
    some = count >= 2
    highest = np.where(inside, keypoints, -np.inf).max(axis=-2)
    lowest = np.where(inside, keypoints, np.inf).min(axis=-2)
    w, h = np.moveaxis(np.where(some[..., None], highest - lowest, 0), -1, 0)
    aspect = input_size[0] / input_size[1]
    scale = np.stack([np.maximum(w, h * aspect), np.maximum(h, w / aspect)], axis=-1) * HALF_BODY_PADDING
    # Two keypoints on one spot have no extent: no crop could be made of them.
    return center.astype(np.float32), scale.astype(np.float32), some & (scale > 0).all(axis=-1)


def view_to_crop(view: View, codec: HeatmapCodec, image_width: ArrayLike) -> Float64:
    """image_to_crop of views, float64 (..., 2, 3): of the photo as it is to the crop as it is stored.

    The published code mirrors the photo (x -> W - 1 - x) and the center, keeps the angle, and then crops;
    both steps are one matrix here. Keypoints taken through it still have to change places in their pairs
    where `view.flipped` (`keypoints_in_view`). image_width W: scalar or (...,).
    """
    last = np.asarray(image_width, np.float64) - 1
    mirrored = np.array(view.center, np.float64)
    mirrored[..., 0] = np.where(view.flipped, last - mirrored[..., 0], mirrored[..., 0])
    crop = codec.image_to_crop_matrix(mirrored, view.scale, view.rotation_deg)
    mirror = np.zeros_like(crop)
    mirror[..., 0, 0] = np.where(view.flipped, -1, 1)
    mirror[..., 0, 2] = np.where(view.flipped, last, 0)
    mirror[..., 1, 1] = 1
    return compose_affine(crop, mirror)


def keypoints_in_view(
    image_to_crop: ArrayLike, flipped: ArrayLike, keypoints: ArrayLike, visible: ArrayLike, skeleton: Skeleton
) -> tuple[Float32, NDArray[Any]]:
    """keypoints (..., K, 2) in photo px and visible (..., K) -> both as the crop shows them, in crop px,
    with left and right changed over where the view is mirrored."""
    order = np.where(np.asarray(flipped)[..., None], skeleton.flip_order, np.arange(skeleton.num_keypoints))
    crop = apply_affine(image_to_crop, keypoints)
    swapped = np.take_along_axis(crop, order[..., None], axis=-2)
    return swapped, np.take_along_axis(np.asarray(visible), order, axis=-1)


def place_views(
    draws: Float64 | None,
    center: ArrayLike,
    scale: ArrayLike,
    keypoints: ArrayLike,
    image_width: ArrayLike,
    codec: HeatmapCodec,
    skeleton: Skeleton,
    augmentation: Augmentation = OFFICIAL,
) -> tuple[View, Float64]:
    """From people to their views and image_to_crop (P, 2, 3): the one way for stored and for fresh ones.

    draws (P, 6): the numbers that decide each view, None for the plain ones. center, scale (P, 2) of the
    plain view and keypoints (P, K, 3) with v, in px of the photo, whose width is image_width (P,).
    """
    view = plain_view(center, scale)
    if draws is not None:
        triples = np.asarray(keypoints)
        people = view.center, view.scale, triples[..., :2], triples[..., 2]
        view = random_view(draws, *people, skeleton, codec.input_size, augmentation)
    return view, view_to_crop(view, codec, image_width)


def view_targets(
    image_to_crop: ArrayLike,
    flipped: ArrayLike,
    keypoints: ArrayLike,
    codec: HeatmapCodec,
    skeleton: Skeleton,
) -> tuple[Float32, Float32, Float32]:
    """What a network is to find in placed views: heatmap factors (P, K, H) and (P, K, W), weights (P, K).

    image_to_crop (P, 2, 3) and flipped (P,) of the views; keypoints (P, K, 3) with v, in photo px.
    """
    triples = np.asarray(keypoints)
    places, visible = triples[..., :2], triples[..., 2]
    return codec.factors(*keypoints_in_view(image_to_crop, flipped, places, visible, skeleton))
