"""What each finding does to a drawn chest: one entry of a table a finding.

A finding may change the anatomy before it is drawn (`shape`: a larger heart) and the picture afterwards
(`frontal`, `lateral`). Each has a place of its own, so that a network can learn it and a person sees why.
Another task is another
table: `synthetic_render.render` takes whichever it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scaletransfer.synthetic_anatomy import Anatomy, Canvas, Field, soft, wall

Shape = Callable[[Anatomy, float], None]
Draw = Callable[[Canvas, np.random.Generator, float], "Field | None"]


@dataclass(frozen=True)
class Effect:
    """How a finding changes a picture; strength runs from 0 (nothing) to about 1.

    `frontal` and `lateral` change the canvas; what they return, if anything, moves ribs (in gaps between
    ribs).
    """

    shape: Shape | None = None
    frontal: Draw | None = None
    lateral: Draw | None = None


def _enlarge_heart(body: Anatomy, strength: float) -> None:
    cx, cy, rx, ry, tilt = body.heart
    body.heart = [
        cx + 0.06 * strength,
        cy - 0.02 * strength,
        rx * (1 + 0.42 * strength),
        ry * (1 + 0.30 * strength),
    ]
    body.heart.append(tilt * (1 - 0.4 * strength))


def _widen_mediastinum(body: Anatomy, strength: float) -> None:
    body.mediastinum *= 1 + 0.95 * strength


def _wide_arch(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    canvas.density += 0.10 * strength * canvas.blob(0.0, -0.32, 0.22, 0.20)


def _side(rng: np.random.Generator) -> int:
    return int(rng.integers(2))


def _opacity(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    """A wide veil over the outer middle of one lung."""
    side = _side(rng)
    x = (0.46 + 0.04 * rng.standard_normal()) * (2 * side - 1)
    veil = canvas.blob(x, rng.normal(-0.08, 0.04), 0.17, 0.20)
    canvas.density += strength * 0.30 * veil * canvas.lungs[side]


def _opacity_lateral(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    canvas.density += strength * 0.22 * canvas.blob(0.22, rng.normal(-0.10, 0.04), 0.17, 0.17) * canvas.lungs[0]


def _lesion(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    """One to three round nodules with sharp borders in the upper half of the lungs."""
    for _ in range(int(rng.integers(1, 4))):
        side = _side(rng)
        x, y = rng.uniform(0.28, 0.50) * (2 * side - 1), rng.uniform(-0.45, -0.12)
        radius = rng.uniform(0.060, 0.095)
        inside = canvas.disc(x, y, radius)
        canvas.density += strength * (0.24 + 0.10 * np.clip(1 - inside, 0, 1)) * soft(1 - inside, 0.15)


def _lesion_lateral(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    for _ in range(int(rng.integers(1, 4))):
        x, y = rng.uniform(-0.25, 0.30), rng.uniform(-0.42, -0.15)
        canvas.density += strength * 0.26 * soft(1 - canvas.disc(x, y, rng.uniform(0.06, 0.09)), 0.15)


def _edema(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    """Haze around both roots ("bat wings"), more vessels, short lines at the sides of the bases."""
    haze = 1 + 0.35 * canvas.clouds(rng, 14)
    for index, sign in enumerate((-1, 1)):
        wing = canvas.blob(sign * 0.30, 0.02, 0.15, 0.24) * canvas.lungs[index]
        canvas.density += strength * 0.26 * wing * haze
        lines = soft(np.abs(np.sin(62 * canvas.y)) - 0.6, 0.3) * soft(0.12 - canvas.rim[index], 0.03)
        canvas.density += strength * 0.06 * lines * canvas.lungs[index] * soft(canvas.y - 0.1, 0.1)
    canvas.texture *= 1 + 0.8 * strength


def _edema_lateral(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    haze = 1 + 0.35 * canvas.clouds(rng, 14)
    canvas.density += strength * 0.22 * canvas.blob(0.03, -0.03, 0.22, 0.20) * haze * canvas.lungs[0]
    canvas.texture *= 1 + 0.8 * strength


def _consolidation(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    """An upper lobe that is white down to the fissure, with dark airways in it."""
    side = _side(rng)
    sign = 2 * side - 1
    fissure = canvas.body.apex + 0.40 + 0.10 * (canvas.x * sign) + rng.normal(0, 0.02)
    lobe = soft(fissure - canvas.y, 0.02) * canvas.lungs[side]
    airways = canvas.tube([(0.14 * sign, -0.12), (0.30 * sign, -0.42), (0.42 * sign, -0.58)], 0.016)
    airways = np.maximum(airways, canvas.tube([(0.22 * sign, -0.28), (0.46 * sign, -0.40)], 0.014))
    canvas.density += strength * (0.34 + 0.03 * canvas.clouds(rng, 18) - 0.20 * airways) * lobe
    canvas.texture *= 1 - 0.8 * lobe


def _consolidation_lateral(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    fissure = canvas.body.apex + 0.42 + 0.15 * canvas.x
    lobe = soft(fissure - canvas.y, 0.02) * soft(canvas.x + 0.45, 0.2) * canvas.lungs[0]
    canvas.density += strength * (0.26 + 0.03 * canvas.clouds(rng, 18)) * lobe


def _pneumonia(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    """Fluffy patches in the inner lower part of one lung."""
    side = _side(rng)
    sign = 2 * side - 1
    patch = np.zeros_like(canvas.x)
    for _ in range(7):
        x, y = sign * (0.27 + 0.20 * side + rng.uniform(-0.08, 0.12)), rng.uniform(0.12, 0.36)
        patch += canvas.blob(x, y, rng.uniform(0.03, 0.065))
    fluff = np.clip(1 + 0.5 * canvas.clouds(rng, 22), 0, None)
    canvas.density += strength * 0.27 * np.clip(patch, 0, 1.2) * fluff * canvas.lungs[side]


def _pneumonia_lateral(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    patch = np.zeros_like(canvas.x)
    for _ in range(7):
        patch += canvas.blob(rng.uniform(0.12, 0.36), rng.uniform(0.15, 0.38), rng.uniform(0.04, 0.07))
    canvas.density += strength * 0.24 * np.clip(patch, 0, 1.2) * canvas.lungs[0]


def _lose_volume(body: Anatomy, strength: float) -> None:
    body.domes = [dome - 0.09 * strength for dome in body.domes]


def _plates(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    """Plate-like bands just above a diaphragm that has risen."""
    for index, sign in enumerate((-1, 1)):
        for number in range(3):
            height = 0.07 + 0.075 * number + 0.02 * rng.standard_normal()
            tilt = rng.uniform(-0.12, 0.12)
            band = soft(0.016 - np.abs(canvas.floor[index] - height - tilt * canvas.x), 0.014)
            reach = soft(0.20 - np.abs(sign * canvas.x - 0.45), 0.05)
            canvas.density += strength * 0.24 * band * reach * canvas.lungs[index]


def _plates_lateral(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    for number in range(3):
        height = 0.07 + 0.075 * number + 0.02 * rng.standard_normal()
        band = soft(0.016 - np.abs(canvas.floor[0] - height), 0.014) * soft(0.28 - np.abs(canvas.x), 0.05)
        canvas.density += strength * 0.22 * band * canvas.lungs[0]


def _pneumothorax(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    """Air outside of the lung: a black rim without vessels, widest at the top, behind a fine white line."""
    side = _side(rng)
    height = np.clip((canvas.y - canvas.body.apex) / 1.2, 0, 1)
    width = (0.14 + 0.13 * strength) * (1 - 0.75 * height) + 0.03
    depth = np.minimum(canvas.rim[side], (canvas.y - canvas.body.apex) * 1.3)
    air = soft(width - depth, 0.012) * canvas.lungs[side]
    canvas.density -= (0.06 + 0.09 * strength) * air
    line = np.exp(-(((depth - width) / 0.010) ** 2)) * canvas.lungs[side]
    canvas.density += 0.13 * strength * line
    rest = canvas.lungs[side] * (1 - air)
    canvas.density += 0.05 * strength * rest
    canvas.texture *= 1 - air


def _pneumothorax_lateral(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    width = 0.10 + 0.08 * strength
    air = soft(width - canvas.rim[0], 0.012) * canvas.lungs[0]
    canvas.density -= (0.05 + 0.08 * strength) * air
    canvas.density += 0.12 * strength * np.exp(-(((canvas.rim[0] - width) / 0.010) ** 2)) * canvas.lungs[0]
    canvas.texture *= 1 - air


def _effusion(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    """Fluid in the lower corner; its level rises towards the chest wall (the meniscus)."""
    first = _side(rng)
    sides = (0, 1) if rng.uniform() < 0.35 else (first,)
    for side in sides:
        level = canvas.body.domes[side] + 0.06 - (0.07 + 0.17 * strength)
        climb = 0.20 * np.exp(-np.clip(canvas.rim[side], 0, None) / 0.09)
        fluid = soft(canvas.y - level + climb, 0.025) * canvas.lungs[side]
        canvas.density += 0.42 * fluid
        canvas.texture *= 1 - fluid


def _effusion_lateral(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    behind = np.clip(canvas.body.depth - canvas.x, 0, None)
    level = min(canvas.body.domes) + 0.16 - (0.07 + 0.17 * strength)
    fluid = soft(canvas.y - level + 0.22 * np.exp(-behind / 0.12), 0.025) * canvas.lungs[0]
    fluid = fluid * soft(canvas.x + 0.05, 0.12)
    canvas.density += 0.32 * fluid
    canvas.texture *= 1 - fluid


def _thick_pleura(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    """A thick, knobbly lining along the chest wall, with bright plaques."""
    side = _side(rng)
    knobs = 1 + 0.5 * np.sin(canvas.y * 21 + rng.uniform(0, 6))
    lining = soft(0.055 * knobs - canvas.rim[side], 0.02) * canvas.lungs[side]
    reach = soft(0.38 - np.abs(canvas.y + 0.02), 0.08)
    canvas.density += strength * 0.38 * lining * reach


def _thick_pleura_lateral(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    knobs = 1 + 0.5 * np.sin(canvas.y * 21 + rng.uniform(0, 6))
    canvas.density += strength * 0.30 * soft(0.06 * knobs - canvas.rim[0], 0.02) * canvas.lungs[0]


def _fracture(canvas: Canvas, rng: np.random.Generator, strength: float) -> Field:
    """Ribs of the lower side wall broken and shifted, with bright callus at the break."""
    sign = 2 * _side(rng) - 1
    line = sign * canvas.x - (wall(canvas.body, canvas.y) - 0.13)
    centre = rng.uniform(0.08, 0.16)
    near = soft(0.24 - np.abs(canvas.y - centre), 0.05)
    canvas.bones *= 1 - 0.95 * np.exp(-((line / 0.040) ** 2)) * near
    for number in range(3):
        y = centre + (number - 1) * canvas.body.rib_gap * 1.1
        x = sign * (float(wall(canvas.body, np.array(y, np.float32))) - 0.13)
        canvas.density += strength * 0.38 * canvas.knot(x + 0.055 * sign, y)
    return soft(line, 0.01) * near * np.float32(0.45 * strength)


def _fracture_lateral(canvas: Canvas, rng: np.random.Generator, strength: float) -> Field:
    y = rng.uniform(0.05, 0.2)
    near = canvas.blob(0.22, y, 0.10, 0.14)
    canvas.density += strength * 0.32 * (canvas.knot(0.20, y - 0.08) + canvas.knot(0.25, y + 0.08))
    return soft(canvas.x - 0.22, 0.01) * near * np.float32(0.45 * strength)


def _devices(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    """A pacemaker with its lead, a breathing tube with a central line, or electrodes with cables; often two
    kinds."""
    kinds = rng.permutation(3)[: int(rng.integers(1, 3))]
    if 0 in kinds:
        box = np.maximum(np.abs(canvas.x - 0.50) / 0.115, np.abs(canvas.y + 0.46) / 0.085)
        canvas.density += 0.75 * soft(1 - box, 0.10)
        lead = [(0.44, -0.42), (0.25, -0.60), (-0.05, -0.50), (-0.09, -0.10), (0.02, 0.22), (0.20, 0.36)]
        canvas.density += 0.40 * canvas.tube(lead, 0.013)
    if 1 in kinds:
        canvas.density += 0.40 * canvas.tube([(0.0, -1.5), (0.01, -0.75), (0.0, -0.34)], 0.017)
        canvas.density += 0.38 * canvas.tube([(-0.60, -0.95), (-0.32, -0.62), (-0.10, -0.42), (-0.10, 0.02)], 0.013)
    if 2 in kinds:
        spots = [(-0.56, -0.42), (0.58, -0.34), (0.52, 0.34)]
        for x, y in spots:
            x, y = x + 0.03 * rng.standard_normal(), y + 0.03 * rng.standard_normal()
            canvas.density += 0.55 * soft(1 - canvas.disc(x, y, 0.050), 0.2)
            canvas.density += 0.30 * canvas.tube([(x, y), (0.7 * x, y + 0.35), (0.25, 1.5)], 0.011)


def _devices_lateral(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    kinds = rng.permutation(3)[: int(rng.integers(1, 3))]
    if 0 in kinds:
        canvas.density += 0.65 * soft(1 - canvas.disc(-0.42, -0.45, 0.045, 0.11), 0.15)
        canvas.density += 0.36 * canvas.tube([(-0.40, -0.40), (-0.05, -0.55), (0.0, -0.1), (-0.2, 0.3)], 0.013)
    if 1 in kinds:
        canvas.density += 0.40 * canvas.tube([(-0.05, -1.5), (-0.04, -0.8), (0.04, -0.34)], 0.017)
    if 2 in kinds:
        for x, y in ((-0.50, -0.1), (-0.45, 0.35)):
            canvas.density += 0.50 * soft(1 - canvas.disc(x, y, 0.03, 0.06), 0.2)
            canvas.density += 0.30 * canvas.tube([(x, y), (-0.2, y + 0.3), (0.1, 1.5)], 0.011)


CHEXPERT_EFFECTS: dict[str, Effect] = {
    "Atelectasis": Effect(_lose_volume, _plates, _plates_lateral),
    "Cardiomegaly": Effect(_enlarge_heart),
    "Consolidation": Effect(None, _consolidation, _consolidation_lateral),
    "Edema": Effect(None, _edema, _edema_lateral),
    "Enlarged Cardiomediastinum": Effect(_widen_mediastinum, _wide_arch, _wide_arch),
    "Fracture": Effect(None, _fracture, _fracture_lateral),
    "Lung Lesion": Effect(None, _lesion, _lesion_lateral),
    "Lung Opacity": Effect(None, _opacity, _opacity_lateral),
    "Pleural Effusion": Effect(None, _effusion, _effusion_lateral),
    "Pleural Other": Effect(None, _thick_pleura, _thick_pleura_lateral),
    "Pneumonia": Effect(None, _pneumonia, _pneumonia_lateral),
    "Pneumothorax": Effect(None, _pneumothorax, _pneumothorax_lateral),
    "Support Devices": Effect(None, _devices, _devices_lateral),
}
