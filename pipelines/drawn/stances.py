"""What drawn people do: families of everyday poses, sampled within the limits of the joints."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from pipelines.drawn.body import SIDED, SIDES, Pose, clamp_pose
from pipelines.drawn.chance import pick


def _neutral() -> Pose:
    pose = dict.fromkeys(("lean", "tilt", "bend", "side_bend", "twist", "nod", "look", "head_tilt"), 0.0)
    for side in SIDES:
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
    for side in SIDES:
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
        for side in SIDES:
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
    for side in SIDES:
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
    for side in SIDES:
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
    for side in SIDES:
        _set(pose, side, arm=raised, arm_plane=rng.uniform(0, 45), arm_turn=-20, elbow=fold)


def _jump(rng: np.random.Generator, pose: Pose) -> None:
    pose["lift"] = rng.uniform(0.06, 0.22)
    star = rng.random() < 0.5
    for side in SIDES:
        if star:
            _set(pose, side, spread=rng.uniform(18, 34), knee=rng.uniform(0, 20), foot=-25)
        else:
            _set(pose, side, thigh=rng.uniform(10, 70), knee=rng.uniform(40, 100), foot=-25)
        _set(pose, side, arm=rng.uniform(90, 155), arm_plane=rng.uniform(0, 60), elbow=rng.uniform(0, 40))


def _bend(rng: np.random.Generator, pose: Pose) -> None:
    pose["lean"], pose["bend"] = rng.uniform(18, 48), rng.uniform(10, 32)
    pose["nod"] = -rng.uniform(5, 30)
    for side in SIDES:
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
