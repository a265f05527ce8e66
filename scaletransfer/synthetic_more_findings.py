"""Findings that CheXpert's table (`synthetic_findings`) has not: other shapes in other places, for a second task."""

from __future__ import annotations

import numpy as np

from scaletransfer.synthetic_anatomy import Anatomy, Canvas, soft
from scaletransfer.synthetic_findings import Effect


def _cavities(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    """One or two holes with a wall, close to the top of the lungs."""
    for _ in range(int(rng.integers(1, 3))):
        sign = 2 * int(rng.integers(2)) - 1
        x, y, radius = sign * rng.uniform(0.26, 0.40), rng.uniform(-0.58, -0.46), rng.uniform(0.11, 0.15)
        away = canvas.disc(x, y, radius, radius * rng.uniform(0.8, 1.0))
        hole = soft(0.75 - away, 0.15)
        canvas.density += strength * (0.32 * soft(0.24 - np.abs(away - 0.85), 0.12) - 0.08 * hole)
        canvas.texture *= 1 - hole


def _inflate(body: Anatomy, strength: float) -> None:
    """Too much air: a low diaphragm, a narrow heart that hangs straight down, ribs further apart."""
    body.domes = [dome + 0.12 * strength for dome in body.domes]
    x, y, rx, ry, tilt = body.heart
    body.heart = [x * (1 - 0.3 * strength), y + 0.06 * strength, rx * (1 - 0.22 * strength), ry * (1 + 0.1 * strength)]
    body.heart.append(tilt * (1 + 0.4 * strength))
    body.rib_gap *= 1 + 0.15 * strength


def _dark_lungs(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    """Lungs that hold more air and fewer vessels."""
    for lung in canvas.lungs:
        canvas.density -= 0.07 * strength * lung
    canvas.texture *= 1 - 0.6 * strength


def _seeds(canvas: Canvas, rng: np.random.Generator, strength: float) -> None:
    """Nodules as small as millet seeds all over both lungs."""
    seeds = np.zeros_like(canvas.x)
    for x, y in zip(rng.uniform(-0.7, 0.7, 260), rng.uniform(-0.75, 0.5, 260), strict=True):
        np.maximum(seeds, canvas.blob(x, y, 0.014), out=seeds)
    canvas.density += 0.22 * strength * seeds * (canvas.lungs[0] + canvas.lungs[1])


def _raise_one_dome(body: Anatomy, strength: float) -> None:
    """One half of the diaphragm far above the other, as where its nerve is paralysed."""
    side = int(body.vessels[0] > np.pi)  # an even chance that stays the patient's own
    body.domes[side] -= 0.16 + 0.14 * strength


MORE_EFFECTS: dict[str, Effect] = {
    "cavity": Effect(None, _cavities),
    "emphysema": Effect(_inflate, _dark_lungs),
    "miliary": Effect(None, _seeds),
    "raised_diaphragm": Effect(_raise_one_dome),
}
