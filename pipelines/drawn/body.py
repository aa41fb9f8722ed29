"""A body of human proportions, what it wears, and a pose within joint limits: all of it in 3D.

Lengths are in units of stature, angles in degrees. Body axes: x to the person's own left, y up, z to where
the person looks. looks.py and stances.py sample what is described here, person.py paints it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
"""float32; what NumPy makes of two of them its types do not know."""
# Lengths as fractions of stature, after Drillis and Contini (1966).
LENGTHS = {
    "upper_arm": 0.186,
    "forearm": 0.146,
    "hand": 0.095,
    "thigh": 0.245,
    "shank": 0.246,
    "foot": 0.150,
    "ankle": 0.039,
    "hip_half": 0.062,
    "shoulder_half": 0.112,
    "loin": 0.100,  # hips to waist
    "chest": 0.188,  # waist to the line of the shoulders
    "head": 0.130,  # chin to crown
}
# Degrees a pose may reach, least and most.
LIMITS = {
    "lean": (-20, 75),  # pelvis forward
    "tilt": (-25, 25),  # pelvis sideways
    "bend": (-20, 45),  # chest on pelvis, forward
    "side_bend": (-25, 25),
    "twist": (-40, 40),
    "nod": (-40, 45),
    "look": (-65, 65),
    "head_tilt": (-25, 25),
    "arm": (0, 175),  # upper arm from hanging down
    "arm_plane": (-90, 130),  # in which direction: 0 sideways, 90 forward, below 0 backward
    "arm_turn": (-95, 90),  # about itself, inward positive
    "elbow": (0, 148),
    "thigh": (-25, 120),  # hip flexion
    "spread": (-20, 50),  # hip abduction
    "toe_out": (-25, 40),
    "knee": (0, 145),
    "foot": (-50, 25),  # toes up positive
}
SIDES = ("left", "right")
SIDED = ("arm", "arm_plane", "arm_turn", "elbow", "thigh", "spread", "toe_out", "knee", "foot")
Pose = dict[str, float]
"""Degrees by name; the names in SIDED come twice, as `left_arm` and `right_arm`."""


@dataclass(frozen=True)
class Clothes:
    """What a person wears. Colours are float32 RGB 0..255."""

    sleeves: str
    """long, short, none"""
    lower: str
    """trousers, shorts, skirt, dress"""
    pattern: str
    """plain, hoops, stripes, check, logo (across the chest), badge (left of it), open (a jacket)"""
    top: Array
    second: Array
    bottom: Array
    shoes: Array
    toe_caps: Array
    socks: float
    """Where along the shank they begin; 1 is none"""
    hat: str
    """none is "", else cap, beanie, brim"""
    hat_color: Array
    glasses: str
    watch: bool
    """On the left wrist"""
    backpack: bool


@dataclass(frozen=True)
class Body:
    """Proportions (LENGTHS varied) and build, and what the person looks like."""

    lengths: dict[str, float]
    girth: float
    hips: float
    skin: Array
    hair: Array
    hair_style: str
    beard: bool
    clothes: Clothes


@dataclass(frozen=True)
class Figure:
    """A posed body in 3D, in units of stature: points (3,) and frames (3, 3), columns x, y, z."""

    points: dict[str, Array]
    frames: dict[str, Array]


def turn_x(degrees: float) -> Array:
    """(3, 3) rotation about x, as `turn_y` and `turn_z` about theirs; right-handed."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]], np.float32)


def turn_y(degrees: float) -> Array:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]], np.float32)


def turn_z(degrees: float) -> Array:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], np.float32)


def pose_figure(body: Body, pose: Pose) -> Figure:
    """Forward kinematics. The lowest point of the body stands on y = 0, or `lift` above it where the pose
    says so; the pelvis is above x = z = 0."""
    size = body.lengths
    points: dict[str, Array] = {}
    pelvis = turn_x(pose["lean"]) @ turn_z(pose["tilt"])
    chest = pelvis @ turn_y(pose["twist"]) @ turn_x(pose["bend"]) @ turn_z(pose["side_bend"])
    head = chest @ turn_y(pose["look"]) @ turn_x(pose["nod"]) @ turn_z(pose["head_tilt"])
    frames: dict[str, Array] = {"pelvis": pelvis, "chest": chest, "head": head}
    points["pelvis"] = np.zeros(3, np.float32)
    points["waist"] = pelvis @ np.array([0, size["loin"], 0], np.float32)
    points["neck"] = points["waist"] + chest @ np.array([0, size["chest"] + 0.012, 0], np.float32)
    _place_head(size["head"], points, chest, head)
    for side, sign in zip(SIDES, (1.0, -1.0), strict=True):
        own = {name: pose[f"{side}_{name}"] for name in SIDED}
        for place in (_place_leg, _place_arm):
            joints, axes = place(size, own, points, frames, sign)
            points |= {f"{side}_{name}": point for name, point in joints.items()}
            frames |= {f"{side}_{name}": frame for name, frame in axes.items()}
    floor = min(points[f"{s}_{p}"][1] for s in SIDES for p in ("toe", "heel", "knee"))
    floor = min(floor, points["pelvis"][1] - 0.08)
    lift = np.array([0, pose.get("lift", 0.0) - floor, 0], np.float32)
    return Figure({name: point + lift for name, point in points.items()}, frames)


def _place_head(tall: float, points: dict[str, Array], chest: Array, head: Array) -> None:
    base = points["neck"] + chest @ np.array([0, 0.03, 0.004], np.float32)
    skull = base + head @ np.array([0, 0.62 * tall, 0.11 * tall], np.float32)
    points["skull"] = skull
    for name, offset in (
        ("nose", (0, -0.15, 0.45)),
        ("left_eye", (0.15, -0.01, 0.36)),
        ("right_eye", (-0.15, -0.01, 0.36)),
        ("left_ear", (0.345, -0.07, -0.02)),
        ("right_ear", (-0.345, -0.07, -0.02)),
    ):
        points[name] = skull + head @ (tall * np.array(offset, np.float32))


Parts = tuple[dict[str, Array], dict[str, Array]]
"""Points and frames of one limb, named without its side."""


def _place_leg(
    size: dict[str, float], own: Pose, points: dict[str, Array], frames: dict[str, Array], sign: float
) -> Parts:
    """The leg of one side below the pelvis. own: the pose's angles of that side; sign: 1 for the left."""
    thigh = (
        frames["pelvis"]
        @ turn_x(-own["thigh"])
        @ turn_z(sign * own["spread"])
        @ turn_y(sign * own["toe_out"])
    )
    shank = thigh @ turn_x(own["knee"])
    foot = shank @ turn_x(-own["foot"])
    hip = points["pelvis"] + frames["pelvis"] @ np.array([sign * size["hip_half"], 0, 0], np.float32)
    knee = hip - size["thigh"] * thigh[:, 1]
    ankle = knee - size["shank"] * shank[:, 1]
    sole = ankle - size["ankle"] * foot[:, 1]
    heel, toe = sole - 0.25 * size["foot"] * foot[:, 2], sole + 0.75 * size["foot"] * foot[:, 2]
    joints: dict[str, Array] = {"hip": hip, "knee": knee, "ankle": ankle, "heel": heel, "toe": toe}
    return joints, {"thigh": thigh, "shank": shank, "foot": foot}


def _place_arm(
    size: dict[str, float], own: Pose, points: dict[str, Array], frames: dict[str, Array], sign: float
) -> Parts:
    """The arm of one side beside the chest, as `_place_leg`."""
    chest = frames["chest"]
    # The shoulder itself rises with the arm.
    shrug = 0.035 * max(0.0, own["arm"] - 60) / 115
    shoulder = points["waist"] + chest @ np.array(
        [sign * (size["shoulder_half"] - 0.4 * shrug), size["chest"] - 0.012 + shrug, 0], np.float32
    )
    # Swing to the wanted direction by the shortest way, then turn about the arm itself.
    heading = turn_y(-sign * own["arm_plane"])
    swing = heading @ turn_z(sign * own["arm"]) @ heading.T
    upper = chest @ swing @ turn_y(-sign * own["arm_turn"])
    fore = upper @ turn_x(-own["elbow"])
    elbow = shoulder - size["upper_arm"] * upper[:, 1]
    wrist = elbow - size["forearm"] * fore[:, 1]
    fingers = wrist - size["hand"] * fore[:, 1]
    joints: dict[str, Array] = {"shoulder": shoulder, "elbow": elbow, "wrist": wrist, "fingers": fingers}
    return joints, {"upper_arm": upper, "forearm": fore}


def clamp_pose(pose: Pose) -> Pose:
    """The pose with every angle inside LIMITS; an arm behind the back is raised at most 60 degrees."""
    limited = dict(pose)
    for name, degrees in pose.items():
        low, high = LIMITS.get(name.removeprefix("left_").removeprefix("right_"), (-math.inf, math.inf))
        limited[name] = min(max(degrees, low), high)
    for side in SIDES:
        if limited[f"{side}_arm_plane"] < -20:
            limited[f"{side}_arm"] = min(limited[f"{side}_arm"], 60.0)
    return limited
