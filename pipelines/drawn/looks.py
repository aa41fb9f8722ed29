"""How drawn people look: build, skin, hair and clothes, sampled."""

from __future__ import annotations

import numpy as np

from pipelines.drawn.body import LENGTHS, Array, Body, Clothes
from pipelines.drawn.chance import pick

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
