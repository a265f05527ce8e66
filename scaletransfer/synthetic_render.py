"""One drawn chest from seeds, view and findings: anatomy, findings, position, exposure."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from scaletransfer.synthetic_anatomy import (
    Anatomy,
    Canvas,
    Field,
    draw_anatomy,
    draw_frontal,
    draw_lateral,
    finish_frontal,
    finish_lateral,
    resize,
)
from scaletransfer.synthetic_findings import Effect


def render(
    *,
    effects: Mapping[str, Effect],
    findings: Mapping[str, float],
    view: str,
    sex: str,
    age: int,
    size: tuple[int, int],
    patient_seed: tuple[int, ...],
    study_seed: tuple[int, ...],
    image_seed: tuple[int, ...],
) -> npt.NDArray[np.uint8]:
    """One picture, uint8 [H, W] with (H, W) = size.

    findings: name in `effects` -> strength (above 0, about 1). view: "PA", "AP" or another, which is drawn
    from the side. Anatomy depends on `patient_seed`, a finding's place on `study_seed` and its name, position
    and exposure on `image_seed`; each is a tuple of integers >= 0.
    """
    frontal = view in ("PA", "AP")
    rng = np.random.default_rng(image_seed)
    body = draw_anatomy(np.random.default_rng(patient_seed), sex=sex, age=age)
    if view == "AP":  # nearer to the film and lying: a larger heart and shallower breath
        body.heart = [body.heart[0], body.heart[1], body.heart[2] * 1.06, body.heart[3] * 1.04, body.heart[4]]
        body.domes = [dome - 0.03 for dome in body.domes]
    for name, strength in findings.items():
        shape = effects[name].shape
        if shape is not None:
            shape(body, strength)
    canvas = _canvas(body, size, rng)
    (draw_frontal if frontal else draw_lateral)(canvas)
    slip: Field | None = None
    for name, strength in findings.items():
        draw = effects[name].frontal if frontal else effects[name].lateral
        if draw is not None:
            moved = draw(canvas, np.random.default_rng((*study_seed, zlib.crc32(name.encode()))), strength)
            slip = moved if slip is None else slip if moved is None else slip + moved
    (finish_frontal if frontal else finish_lateral)(canvas, slip)
    return _expose(canvas, size, rng)


def _canvas(body: Anatomy, size: tuple[int, int], rng: np.random.Generator) -> Canvas:
    """Coordinates for a picture of `size`, with the patient a little shifted, turned and scaled. Fields have
    45 % of its resolution: tissue has no finer detail, and it takes a fifth of the time."""
    height, width = (max(48, round(0.45 * side)) for side in size)
    short = min(height, width)
    turn, zoom = rng.normal(0, 0.03), rng.normal(1.02, 0.04)
    x = ((np.arange(width, dtype=np.float32) + 0.5) * 2 - width) / short * zoom + rng.normal(0, 0.035)
    y = ((np.arange(height, dtype=np.float32) + 0.5) * 2 - height) / short * zoom + rng.normal(0, 0.035)
    grid_x = (x[None, :] - np.float32(turn) * y[:, None]).astype(np.float32)
    return Canvas(grid_x, (y[:, None] + np.float32(turn) * x[None, :]).astype(np.float32), body)


def _expose(canvas: Canvas, size: tuple[int, int], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """The tone curve, uneven exposure and grain."""
    density = canvas.density + 0.012 * canvas.clouds(rng, 7) + 0.008 * canvas.clouds(rng, 40)
    assert density.dtype == np.float32, "a double somewhere doubles the time"
    gain, gamma = np.float32(rng.normal(1.0, 0.07)), float(np.clip(rng.normal(1.15, 0.10), 0.85, 1.45))
    level = 1 - np.exp(np.float32(-1.45) * gain * np.maximum(density, np.float32(0)) ** np.float32(gamma))
    level = np.float32(rng.uniform(4, 14)) + np.float32(rng.normal(276, 8)) * level
    picture = resize(level.astype(np.float32), size).copy()
    # Grain: two random bytes a pixel, whose sum has a triangular distribution; its deviation is 104.5.
    first, second = np.frombuffer(rng.bytes(2 * picture.size), np.uint8).reshape(2, *size)
    picture += (first.astype(np.float32) + second - 255) * np.float32(rng.uniform(1.5, 4.5) / 104.5)
    return np.clip(picture, 0, 255).astype(np.uint8)
