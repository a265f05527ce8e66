"""Drawn chests: a patient's anatomy, and the density of tissue seen from the front or from the side.

Nothing here knows of labels. Tissue adds up along a ray, so a picture is a sum of densities and a tone curve
at the end. Coordinates: x to the right and y downwards, the short side of the picture spans -1 to 1; the
patient's left is at positive x in frontal pictures, and the front of the body is at negative x in lateral
ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

# Every field is float32 [H, W]. numpy's types lose that in mixed expressions; `synthetic_render` asserts it.
Field = npt.NDArray[Any]


@dataclass(kw_only=True)
class Anatomy:
    """One patient's body in picture units. Findings may change a copy before it is drawn."""

    cage: float
    """Half width of the rib cage."""
    fat: float
    """Soft tissue outside of the cage."""
    apex: float
    """y of the top of the lungs."""
    domes: list[float]
    """y of the highest point of the diaphragm on the picture's left and right (the liver's side is
    higher)."""
    heart: list[float]
    """Centre x, centre y, half width, half height, tilt in radians."""
    mediastinum: float
    """Half width of the shadow above the heart."""
    rib_gap: float
    """Distance between ribs."""
    rib_phase: float
    """Where the first rib lies, 0 to 1 gaps."""
    bone: float
    """How bright bones are."""
    spine_bend: float
    """Sideways bend of the spine."""
    clavicle: float
    """y of the collar bones at the breast bone."""
    breast: float
    """Density of the breast shadows, 0 for none."""
    vessels: list[float]
    """Phases of the lung vessels' branches."""
    depth: float
    """Half depth of the chest from front to back, seen from the side."""


def draw_anatomy(rng: np.random.Generator, *, sex: str, age: int) -> Anatomy:
    """A patient's anatomy; the same generator state gives the same patient."""
    dome = rng.normal(0.46, 0.05)
    woman = sex == "Female"
    return Anatomy(
        cage=rng.normal(0.78 - 0.03 * woman, 0.04),
        fat=abs(rng.normal(0.10, 0.05)) + 0.03,
        apex=rng.normal(-0.80, 0.03),
        domes=[dome, dome + rng.uniform(0.03, 0.10)],
        heart=[
            rng.normal(0.12, 0.015),
            dome - rng.normal(0.09, 0.015),
            rng.normal(0.315, 0.02),
            rng.normal(0.255, 0.02),
            rng.normal(0.50, 0.12),
        ],
        mediastinum=rng.normal(0.125, 0.012),
        rib_gap=rng.normal(0.145, 0.010),
        rib_phase=rng.uniform(),
        bone=rng.normal(0.115, 0.015) * (1.15 - 0.004 * age),
        spine_bend=rng.normal(0.0, 0.02),
        clavicle=rng.normal(-0.66, 0.03),
        breast=rng.uniform(0.05, 0.14) if woman and age > 14 else 0.0,
        vessels=rng.uniform(0, 2 * np.pi, 8).tolist(),
        depth=rng.normal(0.60, 0.035),
    )


@dataclass
class Canvas:
    """The fields of one picture while it is drawn; all [H, W] float32 of the same shape."""

    x: Field
    y: Field
    body: Anatomy
    density: Field = field(init=False)
    """Sum of what has been drawn."""
    lungs: list[Field] = field(default_factory=list)
    """Masks, 0 to 1: the picture's left and right lung; in a lateral picture the same mask twice."""
    rim: list[Field] = field(default_factory=list)
    """Distance to the chest wall inside each lung (lateral: to the lung's border at the front and the
    top)."""
    floor: list[Field] = field(default_factory=list)
    """Height above the diaphragm on each side."""
    texture: Field = field(init=False)
    """Factor on the vessels that are drawn last: 0 where there is no lung tissue."""
    bones: Field = field(init=False)
    """Factor on the ribs that are drawn last."""

    def __post_init__(self) -> None:
        self.density = np.zeros_like(self.x)
        self.texture = np.ones_like(self.x)
        self.bones = np.ones_like(self.x)

    def disc(self, x: float, y: float, rx: float, ry: float | None = None) -> Field:
        """Distance from (x, y) in units of the half axes: 1 on the ellipse."""
        return np.sqrt(((self.x - x) / rx) ** 2 + ((self.y - y) / (ry or rx)) ** 2)

    def blob(self, x: float, y: float, rx: float, ry: float | None = None) -> Field:
        """A soft blob, 1 in the middle (a Gaussian)."""
        return np.exp(-0.5 * (((self.x - x) / rx) ** 2 + ((self.y - y) / (ry or rx)) ** 2))

    def knot(self, x: float, y: float) -> Field:
        """A small bright knot at (x, y)."""
        return self.blob(x, y, 0.034)

    def tube(self, points: list[tuple[float, float]], width: float) -> Field:
        """A thin line through `points`, 1 on it; width is its half width."""
        nearest = np.full_like(self.x, np.inf)
        for (ax, ay), (bx, by) in pairwise(points):
            dx, dy = bx - ax, by - ay
            along = np.clip(((self.x - ax) * dx + (self.y - ay) * dy) / max(dx * dx + dy * dy, 1e-9), 0, 1)
            np.minimum(nearest, (self.x - ax - along * dx) ** 2 + (self.y - ay - along * dy) ** 2, out=nearest)
        return soft(width - np.sqrt(nearest), width * 0.7)

    def clouds(self, rng: np.random.Generator, cells: int) -> Field:
        """Smooth noise of about unit variance with `cells` bumps across the short side."""
        height, width = self.x.shape
        short = min(height, width)
        grid = rng.standard_normal((-(-cells * height // short) + 2, -(-cells * width // short) + 2))
        return 1.5 * resize(grid.astype(np.float32), (height, width))


def soft(distance: Field, width: float) -> Field:
    """A step from 0 (distance <= -width) to 1 (distance >= width) without kinks."""
    t = distance * np.float32(0.5 / width)
    t += np.float32(0.5)
    np.minimum(np.maximum(t, np.float32(0), out=t), np.float32(1), out=t)
    u = t * np.float32(-2)
    u += np.float32(3)
    u *= t
    u *= t
    return u


def resize(values: Field, shape: tuple[int, int]) -> Field:
    """Bicubic resampling of a float32 field to [H, W] = shape."""
    image = Image.fromarray(values).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32)


def wall(body: Anatomy, y: Field) -> Field:
    """Half width of the chest's inside at height y."""
    return np.float32(body.cage) * np.sqrt(np.clip(1 - ((y - 0.30) / (0.34 - body.apex)) ** 2, 0.0, 1))


def draw_frontal(canvas: Canvas) -> None:
    """Soft tissue, lungs, heart, diaphragm; ribs and vessels come last, see `finish_frontal`."""
    body, x, y = canvas.body, canvas.x, canvas.y
    side = np.abs(x)
    inside = wall(body, y)
    # The trunk: the cage and what covers it, wider at the armpits; shoulders slope down from the neck.
    outer = np.float32(body.cage) + body.fat + 0.55 * soft(-0.18 - y, 0.45) - 0.04 * soft(y - 0.4, 0.5)
    beyond = np.clip(side - 0.50, 0, None)
    shoulder = y - (-0.93 + 0.10 * side + 0.75 * beyond * beyond)
    flare = np.clip(y + 1.12, 0, None)
    neck = 0.75 * soft(0.27 + 1.6 * flare * flare - side, 0.08)
    trunk = np.maximum(soft(shoulder, 0.06), neck) * soft(outer - side, 0.025)
    thick = trunk * (0.34 + 0.46 * np.sqrt(np.clip(1 - (side / outer) ** 2, 0, 1)))
    canvas.density += thick
    for index, sign in enumerate((-1.0, 1.0)):
        sx = x * np.float32(sign)
        dome = body.domes[index] + np.where(sx > 0.36, 1.9, 0.7).astype(np.float32) * (sx - 0.36) ** 2
        rim = inside - 0.02 - sx
        medial = sx - (0.09 + 0.05 * soft(y + 0.1, 0.5))
        top = y - (body.apex + 1.1 * (sx - 0.27) ** 2)
        floor = dome - y
        lung = soft(np.minimum(np.minimum(rim, medial), np.minimum(top, floor)), 0.022)
        canvas.lungs.append(lung)
        canvas.rim.append(rim)
        canvas.floor.append(floor)
        canvas.density -= (0.60 * thick + 0.02) * lung
        canvas.density += 0.13 * soft(-floor, 0.03) * soft(rim + 0.06, 0.06) * (sx > 0) * soft(y, 0.3)
        if body.breast:
            breast = canvas.disc(sign * 0.46, 0.34, 0.37, 0.30)
            canvas.density += body.breast * soft(1 - breast, 0.10) * soft(y - 0.1, 0.35)
    spine_x = x - body.spine_bend * np.sin(2.2 * y).astype(np.float32)
    discs = 0.8 + 0.2 * np.cos(2 * np.pi / 0.16 * y)
    canvas.density += 0.085 * soft(0.095 - np.abs(spine_x), 0.045) * discs
    # The shadow of the great vessels, with the aortic knob on the patient's left.
    width = body.mediastinum * (1 + 0.35 * soft(y + 0.1, 0.4) + 0.25 * soft(-0.55 - y, 0.3))
    canvas.density += 0.20 * soft(width - np.abs(x - 0.015), 0.03) * soft(0.45 - y, 0.25) * soft(y + 1.0, 0.3)
    canvas.density += 0.12 * soft(1 - canvas.disc(body.mediastinum * 0.85, -0.34, 0.085, 0.10), 0.25)
    cx, cy, rx, ry, tilt = body.heart
    cos, sin = float(np.cos(tilt)), float(np.sin(tilt))
    u, v = (x - cx) * cos + (y - cy) * sin, (y - cy) * cos - (x - cx) * sin
    away = np.sqrt((u / rx) ** 2 + (v / ry) ** 2)
    # Beside the spine and below the diaphragm there is tissue already: the heart adds little there.
    alone = 0.30 + 0.70 * (canvas.lungs[0] + canvas.lungs[1])
    canvas.density += soft(1 - away, 0.07) * (0.21 + 0.11 * np.clip(1 - away * away, 0, 1)) * alone
    for index, sign in enumerate((-1.0, 1.0)):  # the roots of the lungs
        canvas.density += 0.10 * canvas.blob(sign * 0.19, -0.03 - 0.03 * index, 0.055, 0.11)
    windpipe = soft(0.042 - np.abs(x + 0.012), 0.02) * soft(-0.22 - y, 0.1) * soft(y + 1.05, 0.1)
    canvas.density -= 0.11 * windpipe
    canvas.density -= 0.16 * soft(1 - canvas.disc(0.42, body.domes[1] + 0.17, 0.15, 0.07), 0.3)  # stomach


def finish_frontal(canvas: Canvas, slip: Field | None = None) -> None:
    """Vessels in the lungs and the bones over everything. `slip` moves the ribs by so many gaps."""
    body, x, y = canvas.body, canvas.x, canvas.y
    side = np.abs(x)
    inside = wall(body, y)
    for index, sign in enumerate((-1.0, 1.0)):
        dx, dy = sign * x - 0.16, y + 0.02
        angle, away = np.arctan2(dy, dx), np.sqrt(dx * dx + dy * dy)
        branches = np.zeros_like(x)
        for k in range(4):
            bend = body.vessels[2 * index + k] + (2.4 - 1.7 * k) * away
            branches += _thin(np.cos((4 + 2 * k) * angle + bend))
        fade = np.exp(away * np.float32(-1 / 0.30)) * soft(away - 0.06, 0.06)
        canvas.density += (0.12 * branches * fade + 0.012) * canvas.lungs[index] * canvas.texture
    # Ribs at the back fall towards the side; the fainter ones in front fall towards the middle.
    far = side * np.float32(1 / body.cage)
    fall = 0.42 * far * far * np.sqrt(far) - 0.05 * np.sin(np.clip(side, 0, 0.55) * 5.7)
    phase = (y - fall) / np.float32(body.rib_gap) + np.float32(body.rib_phase)
    if slip is not None:
        phase = phase + slip
    edge = np.abs(phase - np.round(phase))
    back = soft(0.20 - edge, 0.07) * 0.65 + 0.75 * np.exp(-(((edge - 0.19) / 0.055) ** 2))
    caged = soft(inside + 0.045 - side, 0.03) * soft(side - 0.06, 0.03) * soft(0.92 - y, 0.3)
    canvas.density += body.bone * back * caged * canvas.bones
    phase = (y - 0.5 * (body.cage - side)) / np.float32(body.rib_gap) + np.float32(body.rib_phase + 0.4)
    front = soft(0.17 - np.abs(phase - np.round(phase)), 0.07) * soft(side - 0.3, 0.12) * soft(y + 0.5, 0.2)
    canvas.density += 0.30 * body.bone * front * caged * canvas.bones
    rise = body.clavicle - 0.12 * (side - 0.07) + 0.045 * np.sin(8.0 * side)
    collar = soft(0.036 - np.abs(y - rise), 0.016) * soft(0.80 - side, 0.05) * soft(side - 0.06, 0.03)
    canvas.density += 1.35 * body.bone * collar
    blade = soft(0.05 - np.abs(side - 0.80 - 0.25 * (y + 0.3)), 0.06) * soft(0.28 - np.abs(y + 0.38), 0.08)
    canvas.density += 0.5 * body.bone * blade


def _thin(wave: Field) -> Field:
    """The crests of a wave: max(wave, 0) to the sixth power."""
    crest = np.clip(wave, 0, 1)
    crest *= crest
    cube: Field = crest * crest * crest
    return cube


def draw_lateral(canvas: Canvas) -> None:
    """The chest from the side: breast bone in front (negative x), spine behind, the heart low in front."""
    body, x, y = canvas.body, canvas.x, canvas.y
    bow = np.sqrt(np.clip(1 - ((y - 0.25) / 1.35) ** 2, 0.05, 1))
    front, back = -body.depth * bow + 0.10 * soft(-0.3 - y, 0.5), body.depth * (0.72 + 0.28 * bow)
    skin = body.fat + 0.05
    upper = 0.22 * soft(-0.62 - y, 0.25)
    trunk = soft(np.minimum(x - front + skin - upper * 0.4, back + skin + 0.10 - x), 0.03)
    middle, half = (front + back) / 2, (back - front) / 2 + skin
    thick = trunk * (0.40 + 0.38 * np.sqrt(np.clip(1 - ((x - middle) / (half + 0.08)) ** 2, 0, 1)))
    canvas.density += thick
    dome = min(body.domes) - 0.02 + 0.75 * (x + 0.12) ** 2 + 0.22 * soft(x - 0.15, 0.4)
    floor = dome - y
    rim = np.minimum(x - front - 0.03 - 0.20 * soft(-0.35 - y, 0.45), y - (body.apex + 0.9 * (x - 0.12) ** 2))
    behind = back - 0.02 - x
    lung = soft(np.minimum(np.minimum(rim, behind), floor), 0.025)
    canvas.lungs += [lung, lung]
    canvas.rim += [rim, rim]
    canvas.floor += [floor, floor]
    canvas.density -= 0.52 * thick * lung
    canvas.density += 0.10 * soft(-floor, 0.03) * soft(np.minimum(x - front, back - x), 0.05)
    other = max(body.domes) - 0.02 + 0.75 * (x + 0.12) ** 2 + 0.22 * soft(x - 0.15, 0.4)
    canvas.density += 0.09 * soft(y - other, 0.02) * lung
    _, cy, rx, ry, _ = body.heart
    u, v = x + 0.95 * body.depth - 1.06 * rx, y - cy - 0.02
    u, v = 0.87 * u + 0.50 * v, 0.87 * v - 0.50 * u  # it leans backwards on the diaphragm
    heart = np.sqrt((u / (0.92 * rx)) ** 2 + (v / (1.22 * ry)) ** 2)
    alone = 0.20 + 0.80 * lung
    canvas.density += soft(1 - heart, 0.12) * (0.15 + 0.11 * np.clip(1 - heart * heart, 0, 1)) * alone
    # The great vessels rise from the heart and bend backwards.
    arch = np.abs(canvas.disc(0.06, -0.22, 0.20, 0.26) - 1)
    canvas.density += 0.13 * soft(body.mediastinum - arch * 0.22, 0.06) * soft(0.12 - y, 0.1)
    canvas.density += 0.12 * canvas.blob(0.03, -0.04, 0.09, 0.09)
    canvas.density -= 0.12 * soft(0.04 - np.abs(x - 0.03 - 0.14 * (y + 0.6)), 0.02) * soft(-0.15 - y, 0.1)
    arm = soft(-0.72 - y + 0.25 * (x - 0.1), 0.10) * trunk
    canvas.density += 0.14 * arm


def finish_lateral(canvas: Canvas, slip: Field | None = None) -> None:
    """Vessels, ribs, breast bone and the vertebrae over everything."""
    body, x, y = canvas.body, canvas.x, canvas.y
    dx, dy = x - 0.03, y + 0.03
    angle, away = np.arctan2(dy, dx), np.sqrt(dx * dx + dy * dy)
    branches = np.zeros_like(x)
    for k in range(4):
        branches += _thin(np.cos((3 + 2 * k) * angle + body.vessels[k] + (2.4 - 1.7 * k) * away))
    fade = np.exp(away * np.float32(-1 / 0.30)) * soft(away - 0.06, 0.06)
    canvas.density += 0.055 * branches * fade * canvas.lungs[0] * canvas.texture
    phase = (y + 0.75 * x - 0.35 * x * x) / np.float32(body.rib_gap * 1.1) + np.float32(body.rib_phase)
    if slip is not None:
        phase = phase + slip
    edge = np.abs(phase - np.round(phase))
    inside = soft(np.minimum(canvas.rim[0] + 0.03, body.depth - x), 0.05) * soft(0.9 - y, 0.3)
    canvas.density += 0.55 * body.bone * soft(0.17 - edge, 0.07) * inside * canvas.bones
    bow = np.sqrt(np.clip(1 - ((y - 0.25) / 1.35) ** 2, 0.05, 1))
    front = -body.depth * bow + 0.10 * soft(-0.3 - y, 0.5)
    canvas.density += (
        1.3 * body.bone * soft(0.028 - np.abs(x - front + 0.01), 0.02) * soft(0.42 - np.abs(y + 0.12), 0.1)
    )
    line = x - body.depth * (0.66 + 0.26 * bow) + body.spine_bend
    discs = 0.55 + 0.45 * soft(0.37 - np.abs(y / 0.17 - np.round(y / 0.17)), 0.10)
    canvas.density += 1.3 * body.bone * soft(0.085 - np.abs(line), 0.025) * discs
