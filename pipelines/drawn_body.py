"""A body of human proportions, what it wears, and a pose within joint limits: all of it in 3D.

Lengths are in units of stature, angles in degrees. Body axes: x to the person's own left, y up, z to
where the person looks. pipelines/drawn_people.py paints what is posed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

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
SIDED = ("arm", "arm_plane", "arm_turn", "elbow", "thigh", "spread", "toe_out", "knee", "foot")
Pose = dict[str, float]
"""Degrees by name; the names in SIDED come twice, as `left_arm` and `right_arm`."""


def pick(rng: np.random.Generator, options: Sequence[str], shares: Sequence[float] | None = None) -> str:
    """One of the options, by share (default: equal). Many times faster than rng.choice."""
    if shares is None:
        return options[int(rng.random() * len(options))]
    mark, total = rng.random() * sum(shares), 0.0
    for option, share in zip(options, shares, strict=True):
        total += share
        if mark < total:
            return option
    return options[-1]


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
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]], np.float32)


def turn_y(degrees: float) -> Array:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]], np.float32)


def turn_z(degrees: float) -> Array:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], np.float32)


def pose_figure(body: Body, pose: Pose) -> Figure:
    """Forward kinematics. The lowest point of the body stands on y = 0, the pelvis above x = z = 0."""
    size = body.lengths
    points: dict[str, Array] = {}
    pelvis = turn_x(pose["lean"]) @ turn_z(pose["tilt"])
    chest = pelvis @ turn_y(pose["twist"]) @ turn_x(pose["bend"]) @ turn_z(pose["side_bend"])
    head = chest @ turn_y(pose["look"]) @ turn_x(pose["nod"]) @ turn_z(pose["head_tilt"])
    frames = {"pelvis": pelvis, "chest": chest, "head": head}
    points["pelvis"] = np.zeros(3, np.float32)
    points["waist"] = pelvis @ np.array([0, size["loin"], 0], np.float32)
    points["neck"] = points["waist"] + chest @ np.array([0, size["chest"] + 0.012, 0], np.float32)
    _place_head(size["head"], points, chest, head)
    for side, sign in (("left", 1.0), ("right", -1.0)):
        _place_leg(size, pose, points, frames, side, sign)
        _place_arm(size, pose, points, frames, side, sign)
    floor = min(points[f"{s}_{p}"][1] for s in ("left", "right") for p in ("toe", "heel", "knee"))
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


def _place_leg(
    size: dict[str, float],
    pose: Pose,
    points: dict[str, Array],
    frames: dict[str, Array],
    side: str,
    sign: float,
) -> None:
    thigh = (
        frames["pelvis"]
        @ turn_x(-pose[f"{side}_thigh"])
        @ turn_z(sign * pose[f"{side}_spread"])
        @ turn_y(sign * pose[f"{side}_toe_out"])
    )
    shank = thigh @ turn_x(pose[f"{side}_knee"])
    foot = shank @ turn_x(-pose[f"{side}_foot"])
    hip = points["pelvis"] + frames["pelvis"] @ np.array([sign * size["hip_half"], 0, 0], np.float32)
    knee = hip - size["thigh"] * thigh[:, 1]
    ankle = knee - size["shank"] * shank[:, 1]
    sole = ankle - size["ankle"] * foot[:, 1]
    points[f"{side}_hip"], points[f"{side}_knee"], points[f"{side}_ankle"] = hip, knee, ankle
    points[f"{side}_heel"] = sole - 0.25 * size["foot"] * foot[:, 2]
    points[f"{side}_toe"] = sole + 0.75 * size["foot"] * foot[:, 2]
    frames[f"{side}_thigh"], frames[f"{side}_shank"], frames[f"{side}_foot"] = thigh, shank, foot


def _place_arm(
    size: dict[str, float],
    pose: Pose,
    points: dict[str, Array],
    frames: dict[str, Array],
    side: str,
    sign: float,
) -> None:
    chest = frames["chest"]
    raised, plane = pose[f"{side}_arm"], pose[f"{side}_arm_plane"]
    # The shoulder itself rises with the arm.
    shrug = 0.035 * max(0.0, raised - 60) / 115
    shoulder = points["waist"] + chest @ np.array(
        [sign * (size["shoulder_half"] - 0.4 * shrug), size["chest"] - 0.012 + shrug, 0], np.float32
    )
    # Swing to the wanted direction by the shortest way, then turn about the arm itself.
    heading = turn_y(-sign * plane)
    swing = heading @ turn_z(sign * raised) @ heading.T
    upper = chest @ swing @ turn_y(-sign * pose[f"{side}_arm_turn"])
    fore = upper @ turn_x(-pose[f"{side}_elbow"])
    elbow = shoulder - size["upper_arm"] * upper[:, 1]
    wrist = elbow - size["forearm"] * fore[:, 1]
    points[f"{side}_shoulder"], points[f"{side}_elbow"], points[f"{side}_wrist"] = shoulder, elbow, wrist
    points[f"{side}_fingers"] = wrist - size["hand"] * fore[:, 1]
    frames[f"{side}_upper_arm"], frames[f"{side}_forearm"] = upper, fore


def clamp_pose(pose: Pose) -> Pose:
    """The pose with every angle inside LIMITS; an arm behind the back is raised at most 60 degrees."""
    limited = dict(pose)
    for name, degrees in pose.items():
        low, high = LIMITS.get(name.removeprefix("left_").removeprefix("right_"), (-math.inf, math.inf))
        limited[name] = min(max(degrees, low), high)
    for side in ("left", "right"):
        if limited[f"{side}_arm_plane"] < -20:
            limited[f"{side}_arm"] = min(limited[f"{side}_arm"], 60.0)
    return limited


def _neutral() -> Pose:
    pose = dict.fromkeys(("lean", "tilt", "bend", "side_bend", "twist", "nod", "look", "head_tilt"), 0.0)
    for side in ("left", "right"):
        pose |= {f"{side}_{name}": 0.0 for name in SIDED}
        pose |= {f"{side}_arm": 8.0, f"{side}_elbow": 12.0, f"{side}_spread": 5.0, f"{side}_toe_out": 8.0}
    return pose


def sample_pose(rng: np.random.Generator, family: str) -> Pose:
    """A pose of one of FAMILIES, with noise on every angle, inside LIMITS. `lift`: feet off the ground."""
    pose = _neutral()
    FAMILIES[family][1](rng, pose)
    lift = pose.pop("lift", 0.0)
    for name, noise in zip(pose, rng.normal(0, 3.0, len(pose)).tolist(), strict=True):
        pose[name] += noise
    pose["look"] += rng.normal(0, 14)
    pose["nod"] += rng.normal(0, 6)
    return clamp_pose({**pose, "lift": lift})


def _set(pose: Pose, side: str, **angles: float) -> None:
    pose.update({f"{side}_{name}": value for name, value in angles.items()})


def _either(rng: np.random.Generator) -> tuple[str, str]:
    return ("left", "right") if rng.random() < 0.5 else ("right", "left")


def _arms_hang(rng: np.random.Generator, pose: Pose) -> None:
    for side in ("left", "right"):
        _set(pose, side, arm=rng.uniform(4, 16), arm_plane=rng.uniform(-10, 40), elbow=rng.uniform(4, 30))


def _arm_daily(rng: np.random.Generator, pose: Pose, side: str) -> None:
    """One arm does something of everyday life."""
    habit = pick(rng, ("hip", "phone", "forward", "point", "wave", "belly", "head"))
    if habit == "hip":
        _set(pose, side, arm=rng.uniform(38, 48), arm_plane=-18, arm_turn=58, elbow=rng.uniform(88, 102))
    elif habit == "phone":
        _set(pose, side, arm=18, arm_plane=70, arm_turn=25, elbow=rng.uniform(95, 125))
    elif habit == "forward":
        _set(pose, side, arm=rng.uniform(20, 50), arm_plane=80, arm_turn=10, elbow=rng.uniform(30, 80))
    elif habit == "point":
        _set(pose, side, arm=rng.uniform(75, 105), arm_plane=rng.uniform(0, 80), elbow=rng.uniform(0, 25))
    elif habit == "wave":
        _set(pose, side, arm=rng.uniform(65, 100), arm_plane=15, arm_turn=-80, elbow=rng.uniform(65, 105))
    elif habit == "belly":
        _set(pose, side, arm=15, arm_plane=50, arm_turn=60, elbow=rng.uniform(75, 95))
    else:
        _set(pose, side, arm=rng.uniform(100, 130), arm_plane=45, arm_turn=-35, elbow=rng.uniform(105, 130))


def _stand(rng: np.random.Generator, pose: Pose) -> None:
    _arms_hang(rng, pose)
    relaxed, bearing = _either(rng)
    if rng.random() < 0.5:  # weight on one leg
        pose["tilt"] = rng.uniform(2, 6) * (1 if bearing == "left" else -1)
        pose["side_bend"] = -1.3 * pose["tilt"]
        _set(pose, relaxed, thigh=rng.uniform(6, 16), knee=rng.uniform(10, 28), spread=9, foot=-4)
    else:
        width = rng.uniform(3, 13)
        for side in ("left", "right"):
            _set(pose, side, spread=width)
    for side, chance in ((relaxed, 0.55), (bearing, 0.25)):
        if rng.random() < chance:
            _arm_daily(rng, pose, side)


def _step(
    rng: np.random.Generator, pose: Pose, stride: float, lift: float, elbow: float, lean: float
) -> None:
    """One moment of a gait: thigh swings by `stride`, the knee of the leg that comes forward folds."""
    phase = rng.uniform(0, 2 * math.pi)
    pose["lean"] = lean
    for side, shift in (("left", 0.0), ("right", math.pi)):
        swing = math.sin(phase + shift)
        folds = max(0.0, math.cos(phase + shift - 0.4)) ** 1.5
        thigh = stride * (swing + 0.25 + 0.25 * folds)
        _set(pose, side, thigh=thigh, knee=6 + 0.12 * stride + lift * folds, spread=2, toe_out=4)
        # The toes leave the ground last.
        _set(pose, side, foot=-14 * max(0.0, -swing) + 10 * max(0.0, swing))
        back = stride * -swing
        forward = 1.1 * back * (0.6 + 0.4 * (back > 0))
        _set(pose, side, arm=abs(forward) + 4, arm_plane=88 if forward > 0 else -84, elbow=elbow)
        _set(pose, side, arm_turn=14)
        pose["twist"] += 0.12 * stride * swing * (1 if side == "left" else -1) * -1


def _walk(rng: np.random.Generator, pose: Pose) -> None:
    _step(rng, pose, rng.uniform(14, 27), rng.uniform(25, 50), rng.uniform(10, 35), rng.uniform(0, 5))
    if rng.random() < 0.25:
        _arm_daily(rng, pose, _either(rng)[0])


def _run(rng: np.random.Generator, pose: Pose) -> None:
    _step(rng, pose, rng.uniform(32, 48), rng.uniform(60, 100), rng.uniform(75, 105), rng.uniform(6, 16))
    pose["lift"] = rng.uniform(0, 0.05)


def _sit(rng: np.random.Generator, pose: Pose) -> None:
    pose["lean"] = rng.uniform(-14, 12)
    pose["bend"] = rng.uniform(0, 18)
    apart = rng.uniform(0, 18)
    for side in ("left", "right"):
        thigh = rng.uniform(76, 92) + pose["lean"]
        _set(pose, side, thigh=thigh, knee=rng.uniform(70, 98), spread=apart, toe_out=4)
        if rng.random() < 0.7:  # hands in the lap, on the thighs
            _set(
                pose, side, arm=rng.uniform(22, 40), arm_plane=rng.uniform(55, 80), elbow=rng.uniform(50, 85)
            )
            _set(pose, side, arm_turn=rng.uniform(15, 45))
        else:
            _arm_daily(rng, pose, side)


def _squat(rng: np.random.Generator, pose: Pose) -> None:
    deep = rng.uniform(0.55, 1.0)
    pose["lean"] = 38 * deep
    for side in ("left", "right"):
        _set(pose, side, thigh=115 * deep, knee=118 * deep, spread=rng.uniform(8, 24), toe_out=16, foot=22)
        _set(pose, side, arm=rng.uniform(35, 75), arm_plane=rng.uniform(65, 90), elbow=rng.uniform(10, 90))


def _reach(rng: np.random.Generator, pose: Pose) -> None:
    _stand(rng, pose)
    side = _either(rng)[0]
    _set(pose, side, arm=rng.uniform(60, 160), arm_plane=rng.uniform(0, 95), arm_turn=0)
    _set(pose, side, elbow=rng.uniform(0, 40))
    pose["side_bend"] += rng.uniform(0, 10) * (1 if side == "right" else -1)
    pose["bend"] = rng.uniform(0, 14)


def _arms_up(rng: np.random.Generator, pose: Pose) -> None:
    _stand(rng, pose)
    raised, fold = rng.uniform(110, 165), rng.uniform(0, 60)
    for side in ("left", "right"):
        _set(pose, side, arm=raised, arm_plane=rng.uniform(0, 45), arm_turn=-20, elbow=fold)


def _jump(rng: np.random.Generator, pose: Pose) -> None:
    pose["lift"] = rng.uniform(0.06, 0.22)
    star = rng.random() < 0.5
    for side in ("left", "right"):
        if star:
            _set(pose, side, spread=rng.uniform(18, 34), knee=rng.uniform(0, 20), foot=-25)
        else:
            _set(pose, side, thigh=rng.uniform(10, 70), knee=rng.uniform(40, 100), foot=-25)
        _set(pose, side, arm=rng.uniform(90, 155), arm_plane=rng.uniform(0, 60), elbow=rng.uniform(0, 40))


def _bend(rng: np.random.Generator, pose: Pose) -> None:
    pose["lean"], pose["bend"] = rng.uniform(18, 48), rng.uniform(10, 32)
    pose["nod"] = -rng.uniform(5, 30)
    for side in ("left", "right"):
        _set(pose, side, thigh=pose["lean"] + rng.uniform(0, 14), knee=rng.uniform(5, 32))
        reach = pose["lean"] + pose["bend"]
        _set(pose, side, arm=rng.uniform(0.5, 1.1) * reach, arm_plane=88, elbow=rng.uniform(5, 40))


def _throw(rng: np.random.Generator, pose: Pose) -> None:
    """Throwing, serving, kicking: one arm far out, legs apart."""
    acting, other = _either(rng)
    sign = 1 if acting == "left" else -1
    pose["twist"] = -sign * rng.uniform(5, 30)
    pose["lean"] = rng.uniform(-4, 12)
    _set(pose, acting, arm=rng.uniform(80, 140), arm_plane=rng.uniform(-10, 50), elbow=rng.uniform(20, 100))
    _set(pose, acting, arm_turn=rng.uniform(-80, -20))
    _set(pose, other, arm=rng.uniform(25, 95), arm_plane=rng.uniform(10, 90), elbow=rng.uniform(5, 60))
    _set(pose, other, thigh=rng.uniform(15, 45), knee=rng.uniform(10, 40), spread=8)
    _set(pose, acting, thigh=-rng.uniform(2, 20), knee=rng.uniform(5, 35), spread=10, foot=-12)


FAMILIES: dict[str, tuple[float, Callable[[np.random.Generator, Pose], None]]] = {
    "stand": (0.30, _stand),
    "walk": (0.20, _walk),
    "run": (0.10, _run),
    "reach": (0.11, _reach),
    "arms_up": (0.06, _arms_up),
    "sit": (0.09, _sit),
    "bend": (0.04, _bend),
    "squat": (0.03, _squat),
    "jump": (0.03, _jump),
    "throw": (0.04, _throw),
}
"""Share of people and sampler by name."""

SKINS = np.array(
    [(250, 216, 188), (241, 194, 158), (224, 172, 126), (198, 134, 92), (150, 98, 64), (104, 66, 44)],
    np.float32,
)
HAIRS = np.array(
    [
        (28, 24, 24),
        (52, 34, 22),
        (92, 58, 32),
        (140, 96, 52),
        (206, 168, 104),
        (150, 62, 30),
        (165, 165, 165),
    ],
    np.float32,
)
CLOTH = np.array(
    [
        (235, 235, 232), (40, 42, 48), (196, 40, 44), (38, 70, 160), (34, 120, 76), (236, 190, 52),
        (224, 118, 38), (120, 66, 140), (92, 160, 206), (228, 140, 166), (128, 128, 132), (146, 108, 72),
        (22, 96, 110), (170, 196, 92),
    ],
    np.float32,
)  # fmt: skip
TROUSERS = np.array(
    [(44, 58, 96), (72, 96, 140), (34, 34, 40), (108, 92, 70), (186, 168, 132), (92, 96, 100), (62, 74, 52)],
    np.float32,
)


def sample_body(rng: np.random.Generator) -> Body:
    """A grown-up, or one in seven times a child: bigger head, shorter limbs."""
    child, woman = rng.random() < 0.14, rng.random() < 0.5
    varied = 1 + np.clip(rng.normal(0, 0.025, len(LENGTHS)), -0.06, 0.06)
    lengths = dict(zip(LENGTHS, (varied * list(LENGTHS.values())).tolist(), strict=True))
    lengths["head"] = LENGTHS["head"] * (rng.uniform(1.25, 1.45) if child else rng.uniform(1.08, 1.2))
    if child:
        for name in ("thigh", "shank", "upper_arm", "forearm", "shoulder_half"):
            lengths[name] *= 0.93
    lengths["shoulder_half"] *= 0.96 if woman else 1.06
    skin = SKINS[rng.integers(len(SKINS))] * np.float32(rng.uniform(0.93, 1.04))
    # Hair that stands out from the skin, so that a head shows which way it looks.
    hairs = HAIRS[np.abs(HAIRS - skin).sum(axis=1) > 130]
    hair = hairs[rng.integers(len(hairs))]
    styles = ("short", "bob", "long", "bun", "tail") if woman else ("short", "short", "crop", "bald", "afro")
    return Body(
        lengths=lengths,
        girth=float(np.clip(rng.normal(1.0, 0.11), 0.82, 1.35)),
        hips=1.0 if woman else 0.93,
        skin=np.minimum(skin, 255).astype(np.float32),
        hair=hair,
        hair_style=pick(rng, styles),
        beard=bool(not woman and not child and rng.random() < 0.25),
        clothes=_sample_clothes(rng, woman),
    )


def _tone(rng: np.random.Generator, table: Array) -> Array:
    tone = table[rng.integers(len(table))] * np.float32(rng.uniform(0.85, 1.12))
    return np.minimum(np.maximum(tone, 10), 250)


def _sample_clothes(rng: np.random.Generator, woman: bool) -> Clothes:
    shares = (0.5, 0.22, 0.16, 0.12) if woman else (0.7, 0.3, 0.0, 0.0)
    lower = pick(rng, ("trousers", "shorts", "skirt", "dress"), shares)
    patterns = ("plain", "hoops", "stripes", "check", "logo", "badge", "open")
    top = _tone(rng, CLOTH)
    return Clothes(
        sleeves=pick(rng, ("long", "short", "none"), (0.42, 0.46, 0.12)),
        lower=lower,
        pattern=pick(rng, patterns, (0.28, 0.16, 0.08, 0.06, 0.16, 0.14, 0.12)),
        top=top,
        second=_tone(rng, CLOTH),
        bottom=top if lower == "dress" else _tone(rng, TROUSERS if rng.random() < 0.75 else CLOTH),
        shoes=(shoes := _tone(rng, CLOTH)),
        toe_caps=shoes * np.float32(0.6) if shoes.mean() > 140 else shoes * 0.4 + np.float32(140),
        socks=float(pick(rng, ("1.0", "0.72", "0.9"))),
        hat=pick(rng, ("", "cap", "beanie", "brim"), (0.78, 0.11, 0.06, 0.05)),
        hat_color=_tone(rng, CLOTH),
        glasses=pick(rng, ("", "sun", "clear"), (0.84, 0.07, 0.09)),
        watch=rng.random() < 0.3,
        backpack=rng.random() < 0.08,
    )
