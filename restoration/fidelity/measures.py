"""What the gates measure in each slice: pure functions of input and output.

Spec: the change of a good restoration is noise and detail. It has no low frequencies, no blob, no
preferred tissue, and as much energy as the noise of its input lets one expect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from restoration.fidelity import images, inputs
from restoration.kspace import Support
from restoration.tasks import MR_REFERENCE_INTENSITY, RestorationTask

Measures = dict[str, Tensor]

_PLANE = (-2, -1)
_CT, _MR, _PET = (
    RestorationTask.CT_DENOISE,
    RestorationTask.MRI_SR,
    RestorationTask.PET_SYNTHESIS,
)
#: What smoothed pixels exceed in the body: HU, a.u. scaled to 1150, SUV.
_BODY = {_CT: -500.0, _MR: 60.0, _PET: 0.1}
#: Gaussians that find a blob of about four times their width, in pixels.
_BLOBS = {_CT: (2.0, 4.0), _MR: (1.5, 3.0), _PET: (1.0, 2.0)}
#: Restoration moves an edge by less than this, in pixels: so much change beside it is no structure.
_EDGE_SHIFT = 0.1
_COARSE = 8.0  # pixels, of the low frequencies
_LEAST_PIXELS = 100  # of a tissue in a slice; fewer say nothing about it
# Of the Gaussian that draws tissue classes: with less, their pixels are chosen by their noise,
# which the restoration takes away, and the classes look biased.
_TISSUE_WIDTH = 4.0  # pixels
#: HU of the smoothed input; the classes of training.quantities.
TISSUES = {
    "air": (-math.inf, -950.0),
    "lung": (-950.0, -500.0),
    "fat": (-150.0, -30.0),
    "soft": (0.0, 80.0),
    "bone": (200.0, math.inf),
}
_SOFT = (-150.0, 150.0)  # what most of a body that is not lung reads in HU
_LARGE = 256  # rows and columns from which half of the pixels tell enough


@dataclass(frozen=True)
class Slices:
    """Some slices of a series before and after: (slices, rows, columns), float32."""

    x: Tensor  #: MR scaled to 1150
    y: Tensor  #: the same after restoration at full strength
    task: RestorationTask
    support: Support | None  #: the acquired k-space of MR, where it was found


@dataclass(frozen=True)
class _View:
    """What the measures share: images at half their pixels where they have enough of them."""

    step: int  #: pixels of the images that are one of these
    x: Tensor
    change: Tensor
    smooth: Tensor  #: x without its noise
    body: Tensor
    full: Tensor  #: x at all of its pixels

    @cached_property
    def edges(self) -> Tensor:
        """The gradient of what has no noise."""
        return images.gradient(self.smooth)

    @cached_property
    def noise(self) -> Tensor:
        """SD of the finest detail in the body (slices,); NaN without one."""
        return images.noise(self.full, self.body, self.step, inputs.LEAST)

    @cached_property
    def level(self) -> Tensor:
        """The median of the body (slices,); NaN without one."""
        return images.masked_median(self.x, self.body, least=20)

    def smoothed(self, stack: Tensor, width: float) -> Tensor:
        """By a Gaussian of so many pixels of the original image."""
        return images.gaussian(stack, width / self.step)

    @property
    def coarse(self) -> float:
        """Width of the low frequencies in original pixels; less in images of few pixels."""
        return min(_COARSE, self.step * min(self.x.shape[-2:]) / 8)


def slice_measures(given: Slices, described: bool = False) -> tuple[Measures, Tensor | None]:
    """Name → (slices,) of everything that a slice says alone; its `input_features` if asked for."""
    x, y, task = given.x, given.y, given.task
    change = y - x
    view = _view(x, change, task)
    found = {
        "range": _overshoot(x, y),
        **_low_frequencies(view, task),
        "whiteness": _whiteness(change),
        "edge_correlation": images.correlation(view.change.abs(), view.edges),
        **_input_measures(x, view, task),
    }
    found["residual_energy"] = _energy(given, view, change, found["noise_level"])
    if given.support is None:
        found["structure"] = _structure(view, view.change, task)
    else:
        local = acquired(change, given.support)
        found["structure"] = _structure(view, images.shrunk(local, view.step), task)
        found["data_consistency"] = 100 * _inconsistency(x, local, given.support)
    if task is _CT:
        found |= _tissue_bias(view)
    power = images.power(x) if described or task is _CT else None
    if power is not None and task is _CT:
        found["echo"] = inputs.echo(power, x.shape[-2:])
    if power is None or not described:
        return found, None
    return found, _features(x, view, task, power)


def body_noise(x: Tensor, task: RestorationTask) -> Tensor:
    """SD of the finest detail in the body (slices,), in the units of `x`; NaN without a body."""
    return _view(x, x, task).noise


def input_features(x: Tensor, task: RestorationTask) -> Tensor:
    """`inputs.describe` of slices as they are in `Slices`: (slices, features and the level)."""
    return _features(x, _view(x, x, task), task, images.power(x))


def _features(x: Tensor, view: _View, task: RestorationTask, power: Tensor) -> Tensor:
    level = torch.ones(len(x), dtype=torch.float64, device=x.device)
    if task is not _CT:
        level = view.level
    return inputs.describe(x, power, view.body, view.step, view.noise, level, task)


def _view(x: Tensor, change: Tensor, task: RestorationTask) -> _View:
    step = 2 if min(x.shape[-2:]) >= _LARGE else 1
    small, change = (images.shrunk(stack, step) for stack in (x, change))
    smooth = images.gaussian(small, (1.0 if task is _PET else 2.0) / step)
    return _View(step, small, change, smooth, smooth > _BODY[task], x)


def _structure(view: _View, change: Tensor, task: RestorationTask) -> Tensor:
    """The strongest blob in the change, in SD of what the change has elsewhere in the slice.

    The change is smoothed to the size of a blob, divided by its local fine SD (noise differs over a
    slice) and by what edges of the input excuse, then by the robust SD of the result.
    """
    blobs = {width: view.smoothed(change, width) for width in (*_BLOBS[task], 4.0)}
    fine = (change - blobs[4.0]).square_()
    spread = images.wide_gaussian(fine, 2 * view.coarse / view.step).clamp_(min=0)
    edges = _EDGE_SHIFT / view.step * view.edges
    excuse = edges.square_().add_(spread).sqrt_()
    excuse += 1e-6 * excuse.amax(_PLANE, keepdim=True) + 1e-12
    least = _LEAST_PIXELS // view.step**2
    found = [_outlier(blobs[width] / excuse, view.body, least) for width in _BLOBS[task]]
    return torch.stack(found).amax(0)


def _tissue_bias(view: _View) -> Measures:
    """Mean change in HU of each tissue class of the smoothed input, eroded by a pixel."""
    low, high = images.extremes(view.smoothed(view.x, _TISSUE_WIDTH))
    least = _LEAST_PIXELS // view.step**2
    return {
        f"hu_bias_{tissue}": images.masked_mean(
            view.change, (low >= lowest) & (high <= highest), least
        )
        for tissue, (lowest, highest) in TISSUES.items()
    }


def acquired(change: Tensor, support: Support) -> Tensor:
    """The part of the change inside the acquired k-space."""
    spectrum = torch.fft.rfft2(change)
    spectrum *= _half_mask(change, support)
    real: Tensor = torch.fft.irfft2(spectrum, change.shape[-2:])
    return real


def _half_mask(stack: Tensor, support: Support) -> Tensor:
    return support.mask(stack)[:, : stack.shape[-1] // 2 + 1]


def _input_measures(x: Tensor, view: _View, task: RestorationTask) -> Measures:
    """What the input says about itself: noise, and whether its values are those of its units."""
    noise = view.noise
    if task is _CT:
        soft = (view.smooth >= _SOFT[0]) & (view.smooth <= _SOFT[1])
        share = images.masked_mean(soft.float(), view.body, _LEAST_PIXELS // view.step**2)
        doubt = inputs.intercept_doubt(view.smooth)
        return {"noise_level": noise, "intensity": share, "units": doubt}
    level = view.level
    found = {"noise_level": noise / level, "intensity": level / MR_REFERENCE_INTENSITY}
    return found if task is _MR else found | {"intensity": inputs.uptake_level(view.x)}


def _overshoot(x: Tensor, y: Tensor) -> Tensor:
    (lowest, highest), (low, high) = ((s.amin(_PLANE), s.amax(_PLANE)) for s in (x, y))
    return torch.maximum(high - highest, lowest - low).clamp(min=0).double()


def _low_frequencies(view: _View, task: RestorationTask) -> Measures:
    """RMS of the smoothed change (HU for CT, else % of that of the input), and its gain in %."""
    width = view.coarse / view.step
    x, change = (images.smooth_modes(stack, width) for stack in (view.x, view.change))
    moved = images.norm(change)
    if task is not _CT:
        whole = images.norm(x)
        moved = torch.where(whole > 0, 100 * moved / whole, torch.nan)
    for modes in (x, change):
        modes[:, 0, 0] = 0  # the mean
    power, cross = (x * x).sum(_PLANE), (x * change).sum(_PLANE)
    return {"low_frequency": moved, "gain": torch.where(power > 0, 100 * cross / power, torch.nan)}


def _whiteness(change: Tensor) -> Tensor:
    spread = images.deviation(change)
    return torch.where(spread > 0, images.mean(change) / spread, torch.nan)


def _energy(given: Slices, view: _View, change: Tensor, noise: Tensor) -> Tensor:
    """SD of the change over the noise of the input; for PET and MR over its finest detail."""
    expected = noise if given.task is _CT else images.rms(view.x - view.smooth)
    return torch.where(expected > 0, images.deviation(change) / expected, torch.nan)


def _inconsistency(x: Tensor, local: Tensor, support: Support) -> Tensor:
    """‖M(Fy − Fx)‖ / ‖M Fx‖, the mean left out of both: Parseval, so the image need not be made."""
    height, width = x.shape[-2:]
    power = images.squared(torch.fft.rfft2(x - x.mean(_PLANE, keepdim=True)))
    power *= _half_mask(x, support)
    # All columns but the first, and the last of an even width, stand for two frequencies.
    power[..., 1 : (width + 1) // 2] *= 2
    whole = images.total(power).sqrt() / (height * width)
    return torch.where(whole > 0, images.rms(local) / whole, torch.nan)


def _outlier(response: Tensor, body: Tensor, least: int) -> Tensor:
    """Largest |response| in the body over the robust SD of all of it there."""
    size = response.abs()
    typical = images.masked_median(size, body, least) / 0.6745
    largest = (size * body).amax(_PLANE).double()
    return torch.where(typical > 0, largest / typical, torch.nan)
