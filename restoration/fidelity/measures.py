"""What the gates measure in each slice: pure functions of input and output.

Spec: the change of a good restoration is noise and detail. It has no low frequencies, no blob, no
preferred tissue, and as much energy as the noise of its input lets one expect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from restoration.fidelity import images
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
RINGS = 6  # of the spectrum that says what an input is like


@dataclass(frozen=True)
class Slices:
    """Some slices of a series before and after; what several measures need is made once."""

    x: Tensor  #: (slices, rows, columns), float32; MR scaled to 1150
    y: Tensor  #: the same after restoration at full strength
    task: RestorationTask
    support: Support | None  #: the acquired k-space of MR, where it was found

    @property
    def coarse(self) -> float:
        """Width of the low frequencies in pixels; less in images of few pixels."""
        return min(_COARSE, min(self.x.shape[-2:]) / 8)


def slice_measures(given: Slices) -> Measures:
    """Name → (slices,) of everything that a slice says alone."""
    x, y, task = given.x, given.y, given.task
    change = y - x
    smooth = _smooth(x, task)
    body = smooth > _BODY[task]
    found = {
        "finite": (~y.isfinite()).sum(_PLANE).double(),
        "range": _overshoot(x, y),
        **_low_frequencies(given, change),
        "whiteness": _whiteness(change),
        "edge_correlation": images.correlation(change.abs(), images.gradient(smooth)),
        **_input_measures(given, body),
    }
    local = change if given.support is None else acquired(change, given.support)
    found["structure"] = structure(local, smooth, body, _BLOBS[task])
    found["residual_energy"] = _energy(given, change, found["noise_level"])
    if task is _CT:
        found |= tissue_bias(change, images.gaussian(x, _TISSUE_WIDTH))
    if given.support is not None:
        found["data_consistency"] = 100 * _inconsistency(x, local, given.support)
    return found


def structure(change: Tensor, smooth: Tensor, body: Tensor, widths: tuple[float, ...]) -> Tensor:
    """The strongest blob in the change, in SD of what the change has elsewhere in the slice.

    The change is smoothed to the size of a blob, divided by its local fine SD (noise differs over a
    slice) and by what edges of the input excuse, then by the robust SD of the result.
    """
    fine = change - images.gaussian(change, 4.0)
    spread = images.gaussian(fine.square(), min(16.0, min(change.shape[-2:]) / 6)).clamp(min=0)
    edges = _EDGE_SHIFT * images.gradient(smooth)
    excuse = (spread + edges.square()).sqrt()
    excuse = excuse + 1e-6 * excuse.amax(_PLANE, keepdim=True) + 1e-12
    found = [_outlier(images.gaussian(change, width) / excuse, body) for width in widths]
    return torch.stack(found).amax(0)


def tissue_bias(change: Tensor, smooth: Tensor) -> Measures:
    """Mean change in HU of each tissue class of the smoothed input, eroded by a pixel."""
    found = {}
    for tissue, (low, high) in TISSUES.items():
        mask = images.eroded((smooth >= low) & (smooth <= high))
        found[f"hu_bias_{tissue}"] = images.masked_mean(change, mask, _LEAST_PIXELS)
    return found


def acquired(change: Tensor, support: Support) -> Tensor:
    """The part of the change inside the acquired k-space."""
    spectrum = torch.fft.fft2(change) * support.mask(change)
    real: Tensor = torch.fft.ifft2(spectrum).real
    return real


def likeness(features: Tensor, model: Mapping[str, Tensor]) -> Tensor:
    """Mahalanobis distance (slices,) of features (slices, n), per root of their number."""
    apart = (features - model["mean"]).double()
    squares = torch.einsum("si,ij,sj->s", apart, model["precision"].double(), apart)
    return (squares.clamp(min=0) / apart.shape[1]).sqrt()


def input_features(x: Tensor, noise_level: Tensor) -> Tensor:
    """What an input is like: logs of its spectrum's rings and of its noise, (slices, RINGS + 1)."""
    power = images.spectrum(x, RINGS).double() + 1e-12
    rings = (power / power.sum(1, keepdim=True)).clamp(min=1e-9).log10()
    return torch.cat([rings, noise_level.clamp(min=1e-6).log10()[:, None]], 1)


def body_noise(x: Tensor, task: RestorationTask) -> Tensor:
    """SD of the finest detail in the body (slices,), in the units of `x`; NaN without a body."""
    return images.noise(x, _smooth(x, task) > _BODY[task])


def _smooth(x: Tensor, task: RestorationTask) -> Tensor:
    return images.gaussian(x, 1.0 if task is _PET else 2.0)


def _input_measures(given: Slices, body: Tensor) -> Measures:
    """What the input says about itself: noise, and whether its values are those of its units."""
    x, task = given.x, given.task
    noise = images.noise(x, body)
    if task is _CT:
        soft = (x >= _SOFT[0]) & (x <= _SOFT[1])
        return {
            "noise_level": noise,
            "intensity": images.masked_mean(soft.float(), body, _LEAST_PIXELS),
        }
    level = images.masked_median(x, body, least=20)
    if task is _PET:
        return {"noise_level": noise / level, "intensity": level}
    return {"noise_level": noise / level, "intensity": level / MR_REFERENCE_INTENSITY}


def _overshoot(x: Tensor, y: Tensor) -> Tensor:
    above = y.amax(_PLANE) - x.amax(_PLANE)
    below = x.amin(_PLANE) - y.amin(_PLANE)
    return torch.maximum(above, below).clamp(min=0).double()


def _low_frequencies(given: Slices, change: Tensor) -> Measures:
    """RMS of the smoothed change (HU for CT, else % of that of the input), and its gain in %."""
    x, coarse = (images.gaussian(stack, given.coarse) for stack in (given.x, change))
    moved = images.rms(coarse)
    if given.task is not _CT:
        whole = images.rms(x)
        moved = torch.where(whole > 0, 100 * moved / whole, torch.nan)
    return {"low_frequency": moved, "gain": 100 * images.slope(x, coarse)}


def _whiteness(change: Tensor) -> Tensor:
    spread = images.deviation(change)
    mean = change.mean(_PLANE, dtype=torch.float64)
    return torch.where(spread > 0, mean / spread, torch.nan)


def _energy(given: Slices, change: Tensor, noise_level: Tensor) -> Tensor:
    """SD of the change over the noise of the input; for MR over its finest detail."""
    if given.task is _CT:
        expected = noise_level
    elif given.task is _PET:
        expected = images.rms(given.x - images.gaussian(given.x, 1.0))
    else:
        expected = images.rms(given.x - images.gaussian(given.x, 2.0))
    return torch.where(expected > 0, images.deviation(change) / expected, torch.nan)


def _inconsistency(x: Tensor, local: Tensor, support: Support) -> Tensor:
    """‖M(Fy − Fx)‖ / ‖M Fx‖, the mean left out of both (Parseval: the same in the image)."""
    measured = acquired(x - x.mean(_PLANE, keepdim=True), support)
    whole = images.rms(measured)
    return torch.where(whole > 0, images.rms(local) / whole, torch.nan)


def _outlier(response: Tensor, body: Tensor) -> Tensor:
    """Largest |response| in the body over the robust SD of all of it there."""
    size = response.abs()
    typical = images.masked_median(size, body, least=_LEAST_PIXELS) / 0.6745
    largest = torch.where(body, size, 0.0).amax(_PLANE).double()
    return torch.where(typical > 0, largest / typical, torch.nan)
