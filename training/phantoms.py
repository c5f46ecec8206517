"""Anthropomorphic phantoms: a chest CT, a T2-weighted brain and an FDG body, drawn from shapes.

They hold no patient's data, are repeatable by seed, and stand in for real series in the demo, in
tests and in smoke training. Arrays are float32 [slice, row, column], axial, in DICOM's order: the
patient's right is on the left of the image, anterior is up, and the first slice is the uppermost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Volume = npt.NDArray[np.float32]
Point = tuple[float, float, float]

SLICE_MM = 5.0


@dataclass(frozen=True)
class Phantom:
    """A phantom's intensities and its geometry."""

    volume: Volume
    """[slice, row, column] in HU, arbitrary units or SUV."""
    spacing_mm: Point
    """Slice, row and column distance."""


def chest_ct(slices: int = 24, size: int = 256, seed: int = 0) -> Phantom:
    """A contrast-enhanced chest at full dose in HU, about the level of the heart."""
    body = _Canvas.of(slices, size, 380.0, level_mm=0.0, background=-1000.0, seed=seed)
    _chest_wall(body)
    _lungs(body)
    _mediastinum(body)
    _thoracic_bones(body)
    noise = _filtered(body.rng.standard_normal(body.volume.shape), 0.7)
    return body.finish(body.volume + 9.0 * noise / noise.std())


def brain_t2(slices: int = 20, size: int = 256, seed: int = 0) -> Phantom:
    """A T2-weighted head in arbitrary units, about the level of the lateral ventricles."""
    head = _Canvas.of(slices, size, 230.0, level_mm=0.0, background=0.0, seed=seed)
    _head_shell(head)
    _cortex(head)
    _deep_brain(head)
    y, x = head.y / 115, head.x / 115
    shading = 1 + 0.06 * x - 0.05 * y
    real, imaginary = 9.0 * head.rng.standard_normal((2, *head.volume.shape))
    return head.finish(np.hypot(_filtered(head.volume * shading, 0.45) + real, imaginary))


def body_pet(slices: int = 40, size: int = 128, seed: int = 0) -> Phantom:
    """An 18F-FDG body in SUV: from brain to bladder, or the slices about the liver's dome.

    190 slices hold the whole of it, fewer are centred between heart and kidneys.
    """
    body = _Canvas.of(slices, size, 500.0, level_mm=-5.0, background=0.0, seed=seed)
    _fdg_trunk(body)
    _fdg_head(body)
    _fdg_organs(body)
    _fdg_lesions(body)
    image = _filtered(body.volume, 6.5 / 2.355 / body.pixel_mm)
    noise = _filtered(body.rng.standard_normal(image.shape), 0.9)
    spread = 0.09 * np.sqrt(np.maximum(image, 0) * (image + 0.3))
    return body.finish(np.maximum(image + spread * noise / noise.std(), 0))


@dataclass
class _Canvas:
    """A volume that shapes are painted on, with open grids of millimetres from its centre."""

    volume: npt.NDArray[np.float64]
    z: npt.NDArray[np.float64]
    """Towards the feet."""
    y: npt.NDArray[np.float64]
    """Towards the back."""
    x: npt.NDArray[np.float64]
    """Towards the patient's left."""
    pixel_mm: float
    rng: np.random.Generator

    @classmethod
    def of(
        cls,
        slices: int,
        size: int,
        width_mm: float,
        *,
        level_mm: float,
        background: float,
        seed: int,
    ) -> _Canvas:
        if slices < 1 or size < 16:
            raise ValueError(f"A phantom needs a slice of 16 x 16, not {slices} of {size}.")
        pixel = width_mm / size
        z = _centred(slices) * SLICE_MM + level_mm
        line = _centred(size) * pixel
        volume = np.full((slices, size, size), background)
        rng = np.random.default_rng([seed, size])
        return cls(volume, z[:, None, None], line[:, None], line[None, :], pixel, rng)

    def finish(self, volume: npt.NDArray[np.float64]) -> Phantom:
        spacing = (SLICE_MM, self.pixel_mm, self.pixel_mm)
        return Phantom(np.ascontiguousarray(volume, dtype=np.float32), spacing)

    def paint(
        self, weight: npt.NDArray[np.float64], value: float | npt.NDArray[np.float64]
    ) -> None:
        """Cover with a value where the weight is 1, blend where it is between 0 and 1."""
        self.volume += weight * (value - self.volume)

    def inside(
        self,
        centre: tuple[float | npt.NDArray[np.float64], float | npt.NDArray[np.float64]],
        radii: tuple[float | npt.NDArray[np.float64], float | npt.NDArray[np.float64]],
        *,
        angle: float = 0.0,
        power: float = 2.0,
    ) -> npt.NDArray[np.float64]:
        """Weight of a (super-)ellipse (x, y) whose centre and radii may change with z."""
        dx, dy = self.x - centre[0], self.y - centre[1]
        cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        across, along = dx * cosine + dy * sine, dy * cosine - dx * sine
        wide, high = (np.maximum(radius, 1e-3) for radius in radii)
        level = (np.abs(across / wide) ** power + np.abs(along / high) ** power) ** (1 / power)
        narrow = np.minimum(wide, high)
        return self.edge((level - 1) * narrow) * (narrow > 0.3)

    def ball(self, centre: Point, radii: float | Point) -> npt.NDArray[np.float64]:
        """Weight of an ellipsoid given as (x, y, z)."""
        a, b, c = (radii,) * 3 if isinstance(radii, float | int) else radii
        x, y, z = centre
        level = np.sqrt(((self.x - x) / a) ** 2 + ((self.y - y) / b) ** 2 + ((self.z - z) / c) ** 2)
        return self.edge((level - 1) * min(a, b))

    def edge(self, distance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """1 inside, 0 outside, a pixel of blur between, from a signed distance in mm."""
        weight = np.clip(0.5 - distance / self.pixel_mm, 0, 1)
        return np.broadcast_to(weight, self.volume.shape)

    def texture(self, scale_mm: float) -> npt.NDArray[np.float64]:
        """A unit Gaussian field with details of about this size."""
        in_plane = scale_mm / self.pixel_mm / 2
        sigma = (scale_mm / SLICE_MM / 2, in_plane, in_plane)
        field = _filtered(self.rng.standard_normal(self.volume.shape), sigma)
        return np.asarray((field - field.mean()) / field.std())


def _centred(count: int) -> npt.NDArray[np.float64]:
    return np.arange(count, dtype=np.float64) - (count - 1) / 2


def _filtered(
    volume: npt.NDArray[np.float64], sigma: float | Sequence[float]
) -> npt.NDArray[np.float64]:
    """Gaussian blur in pixels: in the slice, or along each axis. Edges wrap around."""
    sigmas = (0.0, sigma, sigma) if isinstance(sigma, float | int) else tuple(sigma)
    axes = [axis for axis in range(3) if sigmas[axis] > 0]
    spectrum = np.fft.rfftn(volume, axes=axes)
    for axis in axes:
        size = volume.shape[axis]
        frequency = np.fft.rfftfreq(size) if axis == axes[-1] else np.fft.fftfreq(size)
        response = np.exp(-2 * (np.pi * sigmas[axis] * frequency) ** 2)
        spectrum *= response.reshape([-1 if axis == i else 1 for i in range(3)])
    return np.asarray(np.fft.irfftn(spectrum, [volume.shape[axis] for axis in axes], axes))


def _chest_wall(body: _Canvas) -> None:
    wobble = 1 + 0.02 * body.texture(90)
    body.paint(body.inside((0, 0), (168 * wobble, 112 * wobble), power=2.4), 15.0)  # skin
    body.paint(body.inside((0, 0), (165 * wobble, 109 * wobble), power=2.4), -105.0)  # fat
    body.paint(body.inside((0, 1), (148, 96), power=2.3), 55 + 6 * body.texture(8))  # muscle
    for side in (-1, 1):
        body.paint(body.inside((side * 78, -83), (52, 7), angle=side * 17), -95.0)
        body.paint(body.inside((side * 132, 34), (5, 38), angle=-side * 14), -95.0)
        body.paint(body.inside((side * 62, 88), (48, 4), angle=-side * 14), -90.0)
    table = body.inside((0, 20), (240, 119)) - body.inside((0, 14), (240, 119))
    body.paint(table * (body.y > 105) * (np.abs(body.x) < 175), -180.0)
    shell = body.inside((0, 21), (240, 119)) - body.inside((0, 19.5), (240, 119))
    body.paint(shell * (body.y > 105) * (np.abs(body.x) < 175), 60.0)


def _lungs(body: _Canvas) -> None:
    taper = 1 - 0.0016 * np.maximum(-body.z - 10, 0)
    air = -865 + 18 * body.texture(10) + 25 * body.y / 80
    for side in (-1, 1):
        lung = body.inside((side * 66, 2), (59 * taper, 78 * taper), angle=side * 6, power=2.3)
        body.paint(lung, air)
        body.paint(lung * body.edge(np.abs(body.y - side * 12 + 0.28 * body.z + 4) - 0.7), -760.0)
        for start, end, radius in _vessel_tree((side * 26.0, 4.0, 0.0), side, body.rng):
            _vessel(body, lung, start, end, radius)
    body.paint(body.ball((-84, 30, 5), 7.0), 40.0)  # nodule
    body.paint(body.ball((92, -18, -12), 3.5), 30.0)
    dome = body.ball((-62, 2, 88), (66, 74, 56))
    body.paint(dome, 112 + 5 * body.texture(6))  # liver


def _vessel_tree(
    root: Point, side: int, rng: np.random.Generator
) -> list[tuple[Point, Point, float]]:
    """Branches (start, end, radius) that fan out of the hilum and thin by each division."""
    branches: list[tuple[Point, Point, float]] = []
    tips = [
        (np.array(root), np.array([side * 1.0, spread, rise]), 5.0)
        for spread, rise in rng.uniform((-1.3, -0.9), (1.3, 0.9), (12, 2))
    ]
    while tips:
        start, direction, radius = tips.pop()
        unit = direction / np.linalg.norm(direction)
        end = start + unit * rng.uniform(9, 17) * (0.6 + radius / 6)
        branches.append(((start[0], start[1], start[2]), (end[0], end[1], end[2]), radius))
        if radius > 1.1:
            tips.append((end, unit + rng.normal(0, 0.42, 3), radius * 0.86))
            tips.append((end, unit + rng.normal(0, 0.42, 3), radius * 0.62))
    return branches


def _vessel(
    body: _Canvas,
    lung: npt.NDArray[np.float64],
    start: Point,
    end: Point,
    radius: float,
) -> None:
    """Paint a tube in the slices and rows that it crosses."""
    (x0, y0, z0), (x1, y1, z1) = start, end
    part = (
        _span(body.z, z0, z1, radius + 2),
        _span(body.y, y0, y1, radius + 2),
        _span(body.x, x0, x1, radius + 2),
    )
    if body.volume[part].size == 0:
        return
    z, y, x = body.z[part[0]], body.y[part[1]], body.x[:, part[2]]
    length = (x1 - x0) ** 2 + (y1 - y0) ** 2 + (z1 - z0) ** 2
    along = ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0) + (z - z0) * (z1 - z0)) / length
    along = np.clip(along, 0, 1)
    gap = np.sqrt(
        (x - x0 - along * (x1 - x0)) ** 2
        + (y - y0 - along * (y1 - y0)) ** 2
        + (z - z0 - along * (z1 - z0)) ** 2
    )
    weight = np.clip(0.5 - (gap - radius) / max(body.pixel_mm, 1.2), 0, 1) * lung[part]
    body.volume[part] += weight * np.maximum(60 - body.volume[part], 0)


def _span(axis: npt.NDArray[np.float64], start: float, end: float, margin: float) -> slice:
    """The samples of a rising axis between two points, and a margin around them."""
    low, high = min(start, end) - margin, max(start, end) + margin
    first, last = np.searchsorted(axis.ravel(), (low, high))
    return slice(int(first), int(last))


def _mediastinum(body: _Canvas) -> None:
    z = body.z
    low = np.clip((z + 25) / 40, 0, 1)  # 0 above the heart, 1 at its middle
    body.paint(body.inside((0, 18), (24, 74), power=2.6), -85.0)
    heart = body.inside((14 + 6 * low, -24), (24 + 36 * low, 30 + 18 * low), angle=28)
    body.paint(heart, -80.0)
    muscle = body.inside((15 + 6 * low, -23), (20 + 34 * low, 26 + 17 * low), angle=28)
    body.paint(muscle, 95.0)
    body.paint(body.inside((40, -16), (20 * low, 15 * low), angle=35), 210.0)  # left ventricle
    body.paint(body.inside((6, -46), (25 * low, 13 * low), angle=30), 190.0)  # right ventricle
    body.paint(body.inside((-18, -20), (13 * low, 19 * low)), 185.0)  # right atrium
    body.paint(body.inside((14, 10), (25 * low, 12 * low)), 205.0)  # left atrium
    high = 1 - low
    body.paint(body.inside((-6, -24), (17 * high + 5, 17 * high + 5)), 230.0)  # ascending aorta
    body.paint(body.inside((24, -20), (12 * high, 15 * high), angle=20), 225.0)  # pulmonary trunk
    body.paint(body.inside((-30, -16), (10 * high + 3, 9 * high + 3)), 250.0)  # caval vein
    body.paint(body.inside((27, 43), (13, 13)), 235.0)  # descending aorta
    body.paint(body.inside((9, 36), (8, 6)), 35.0)  # oesophagus
    body.paint(body.inside((9, 36), (2.5, 1.5)), -700.0)
    split = np.clip(z + 35, 0, 60) * 0.55
    for side in (-1, 1):
        body.paint(body.inside((side * split - 2, 13), (10, 10)) * (z < 25), 20.0)
        body.paint(body.inside((side * split - 2, 13), (8, 8)) * (z < 25), -1000.0)


def _thoracic_bones(body: _Canvas) -> None:
    radius = np.hypot(body.x / 136, (body.y - 1) / 89)
    turn = np.arctan2(np.abs(body.x) / 136, -(body.y - 1) / 89)
    for shift, reach in ((0.0, 0.028), (0.0, 0.014)):
        phase = np.cos(13 * (turn - 0.0042 * body.z) + 0.8 * np.sign(body.x))
        arc = np.clip((phase - 0.05 - shift) * 4, 0, 1) * (turn > 0.42) * (turn < 2.75)
        rib = body.edge((np.abs(radius - 1) - reach) * 89) * arc
        body.paint(rib, 620.0 if reach > 0.02 else 260.0)
    sternum = ((0, -88), (24, 7))
    body.paint(body.inside(*sternum), 480.0)
    body.paint(body.inside((0, -88), (21, 4.5)), 170.0)
    marrow = 190 + 45 * body.texture(4)
    disc = 0.5 + 0.5 * np.cos(2 * np.pi * body.z / 28)
    body.paint(body.inside((0, 66), (21, 17), power=2.4), np.where(disc < 0.12, 180.0, 560.0))
    body.paint(body.inside((0, 66), (19, 15), power=2.4), np.where(disc < 0.12, 90.0, marrow))
    for side in (-1, 1):
        body.paint(body.inside((side * 13, 84), (4, 9), angle=side * 12), 520.0)  # pedicle
        body.paint(body.inside((side * 27, 93), (17, 5), angle=side * 22), 470.0)  # transverse
        body.paint(body.inside((side * 9, 97), (10, 4), angle=-side * 35), 500.0)  # lamina
        blade = np.clip(-body.z / 30 + 0.9, 0, 1)
        body.paint(body.inside((side * 112, 62), (37 * blade, 4), angle=side * 62 - 90), 520.0)
    body.paint(body.inside((0, 104), (4, 13)), 430.0)  # spinous process
    body.paint(body.inside((0, 87), (9, 7.5)), 30.0)  # canal
    body.paint(body.inside((0, 87), (5, 4)), 45.0)


def _head_shell(head: _Canvas) -> None:
    for wide, high, value in (
        (82, 101, 250.0),  # skin
        (80, 99, 640.0),  # scalp fat
        (75.5, 94.5, 45.0),  # outer table
        (73, 92, 300.0),  # marrow
        (71, 90, 45.0),  # inner table
        (69, 88, 1080.0),  # CSF
    ):
        scale = _dome(head)
        head.paint(head.inside((0, 2), (wide * scale, high * scale), power=2.15), value)


def _dome(head: _Canvas) -> npt.NDArray[np.float64]:
    """How wide the head is at each level, against its widest."""
    height = np.where(head.z < 0, head.z / 92, head.z / 160)
    return np.asarray(np.sqrt(np.clip(1 - height**2, 0.05, 1)))


def _cortex(head: _Canvas) -> None:
    """Grey and white matter; sulci follow the zero lines of a band-limited random field."""
    scale = _dome(head)
    folds = _filtered(head.texture(10.5) - 0.9 * head.texture(25), 0.75)
    folds = folds / folds.std()
    sides = np.where(head.x < 0, folds, folds[:, ::-1, ::-1])  # two unlike halves
    radius = np.hypot(head.x / (66.5 * scale), (head.y - 2) / (85.5 * scale))
    depth = (1 - radius) * 66.5 * scale  # mm below the surface of the brain
    brain = head.edge(-depth)
    head.paint(brain, 430 + 12 * head.texture(5))
    narrow = np.clip(1 - depth / 29, 0, 1)
    ribbon = np.clip((0.62 * narrow**0.5 + 0.05 * (depth < 29) - np.abs(sides)) * 6, 0, 1)
    ribbon = np.maximum(ribbon, np.clip((4 - depth) / 2, 0, 1))
    head.paint(brain * ribbon, 665 + 14 * head.texture(4))
    sulcus = np.clip((0.30 * narrow - np.abs(sides)) * 9, 0, 1)
    head.paint(brain * sulcus, 1060.0)
    midline = np.abs(head.x - 1.2 * np.sin(head.y / 11)) - 1.1
    outer = (np.abs(head.y) > 30) | (head.z < -28)
    head.paint(brain * head.edge(midline - 2.6) * outer, 660.0)
    head.paint(brain * head.edge(midline) * outer, 1060.0)


def _deep_brain(head: _Canvas) -> None:
    size = np.clip(1 - np.abs(head.z) / 34, 0, 1) ** 0.5
    for side in (-1, 1):
        head.paint(head.inside((side * 26, 0), (8 * size, 19 * size), angle=side * 10), 560.0)
        head.paint(head.inside((side * 11, 12), (9 * size, 13 * size), angle=-side * 12), 590.0)
        horn = head.inside((side * 11, -22), (4.6 * size, 15 * size), angle=-side * 24)
        body = head.inside((side * 9.5, 0), (3.6 * size, 22 * size), angle=side * 7)
        back = head.inside((side * 21, 31), (5.6 * size, 17 * size), angle=-side * 26)
        head.paint(np.maximum(np.maximum(horn, body), back), 1120.0)
        head.paint(head.inside((side * 17, -22), (4 * size, 9 * size), angle=-side * 16), 600.0)
        eye = head.ball((side * 31, -72, 48), 12.0)
        head.paint(eye, 1100.0)
    head.paint(head.inside((0, 10), (1.8 * size, 11 * size)), 1090.0)  # third ventricle
    for x, y, z in head.rng.uniform((-30, -40, -15), (30, 45, 15), (7, 3)):
        if abs(x) > 16:
            head.paint(head.ball((x, y, z), head.rng.uniform(1.6, 3.2)), 900.0)  # lesion


def _fdg_trunk(body: _Canvas) -> None:
    z = body.z
    trunk = (z > -235) & (z < 460)
    widths = np.interp(z, [-240, -200, -120, 0, 140, 260, 460], [70, 175, 178, 165, 150, 172, 175])
    depths = np.interp(z, [-240, -200, -120, 0, 140, 260, 460], [60, 90, 112, 112, 105, 112, 105])
    texture = 1 + 0.12 * body.texture(18)
    body.paint(body.inside((0, 0), (widths, depths), power=2.4) * trunk, 0.28 * texture)
    body.paint(body.inside((0, 2), (widths - 16, depths - 14), power=2.3) * trunk, 0.75 * texture)
    inner = np.clip(1 - np.maximum(-z - 60, 0) / 150, 0.1, 1)
    for side in (-1, 1):
        lung = body.inside((side * 66, 0), (55 * inner, 74 * inner), power=2.2)
        base = 55 if side < 0 else 72
        body.paint(lung * np.clip((base - z) / 8, 0, 1) * (z > -205), 0.42 * texture)
        body.paint(body.inside((side * 92, 10), (62, 72)) * (z > 380), 0.7 * texture)  # thigh
    body.paint(body.inside((0, 68), (19, 17)) * (z > -260) * (z < 330), 1.7 * texture)  # marrow
    body.paint(body.inside((0, 90), (6, 6)) * (z > -260) * (z < 300), 1.2)  # cord
    for side in (-1, 1):
        wing = body.inside((side * 95, 40), (38, 11), angle=side * 50)
        body.paint(wing * (z > 270) * (z < 370), 1.4 * texture)


def _fdg_head(body: _Canvas) -> None:
    body.paint(body.inside((0, 12), (62, 58)) * (body.z < -215) * (body.z > -300), 0.8)
    body.paint(body.ball((0, 0, -395), (80, 100, 120)), 0.7)
    body.paint(body.ball((0, 0, -405), (70, 88, 80)), 5.0)
    body.paint(body.ball((0, 0, -408), (69, 87, 78)), 8.6 + 0.6 * body.texture(9))
    for side in (-1, 1):
        body.paint(body.ball((side * 27, 0, -410), (24, 56, 48)), 3.4)  # white matter
        body.paint(body.ball((side * 16, 2, -402), (10, 16, 16)), 9.2)  # deep grey matter


def _fdg_organs(body: _Canvas) -> None:
    texture = 1 + 0.05 * body.texture(12)
    body.paint(body.ball((12, -22, -30), (56, 46, 52)), 1.6)  # blood pool
    body.paint(body.ball((36, -20, -12), (38, 31, 40)), 5.2 * texture)  # heart muscle
    body.paint(body.ball((32, -22, -16), (25, 19, 27)), 1.7)
    body.paint(body.inside((26, 43), (12, 12)) * (body.z < 250) * (body.z > -150), 1.55)
    body.paint(body.ball((-58, -6, 85), (92, 82, 72)) * (body.x < 62), 2.25 * texture)  # liver
    body.paint(body.ball((100, 34, 85), (30, 40, 48)), 1.95 * texture)  # spleen
    body.paint(body.ball((42, -32, 95), (42, 30, 38)), 1.3)  # stomach
    for side, level in ((-1, 165), (1, 150)):
        body.paint(body.ball((side * 62, 48, level), (27, 24, 52)), 3.4 * texture)  # kidney
        body.paint(body.ball((side * 52, 46, level), (12, 11, 26)), 9.0)
        ureter = body.inside((side * (38 - 0.03 * body.z), 30), (4, 4))
        body.paint(ureter * (body.z > level + 30) * (body.z < 375), 3.0)
    for x, y, z in body.rng.uniform((-90, -75, 190), (90, 0, 320), (14, 3)):
        body.paint(body.ball((x, y, z), (24, 16, 18)), body.rng.uniform(0.9, 2.4))  # bowel
    body.paint(body.ball((0, -28, 400), (42, 36, 34)), 19.0)  # bladder


def _fdg_lesions(body: _Canvas) -> None:
    body.paint(body.ball((-78, 22, -45), 14.0), 8.5)  # lung
    body.paint(body.ball((-14, 14, -70), 9.0), 6.0)  # mediastinal node
    body.paint(body.ball((-84, 6, 60), 12.0), 8.0)  # liver
    body.paint(body.ball((2, 66, 30), 10.0), 7.0)  # spine
    for x, y, z in body.rng.uniform((-110, -40, -60), (110, 60, 200), (3, 3)):
        body.paint(body.ball((x, y, z), body.rng.uniform(5, 9)), body.rng.uniform(3, 9))
