"""The three degradations that make low-quality inputs, versioned and seeded.

* MR: same-grid k-space truncation (``kspace-truncation``).
* CT: dose reduction by noise inserted in the projection domain (``ct-noise-insertion``).
* PET: thinned projection counts and the same OSEM for both images (``pet-thinned-osem``).

Each operator is a frozen dataclass of its physical parameters; ``record()`` is what manifests
keep. Volumes are float32 [slice, row, column] in HU, SUV or arbitrary units.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from restoration import kspace
from training.projector import ParallelBeam, fbp, osem

Volume = npt.NDArray[np.float32]

WATER_PER_MM = 0.0193
"""Linear attenuation of water at the 70 keV of a 120 kV spectrum (NIST XCOM)."""
_CHUNK = 4


class NoSoftTissueError(ValueError):
    """The noise of a CT cannot be measured: too few pixels of soft tissue."""


class _Operator:
    name: ClassVar[str]
    version: ClassVar[int]

    def record(self) -> dict[str, Any]:
        """Name, version and parameters, as JSON values."""
        return {"name": self.name, "version": self.version, "params": asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class KSpaceTruncation(_Operator):
    """Keep the central 1/factor of k-space along each axis, zero the rest, take the magnitude."""

    name: ClassVar[str] = "kspace-truncation"
    version: ClassVar[int] = 1

    factor: float = 4.0

    def apply(self, hq: Volume) -> Volume:
        return truncate_kspace(hq, self.factor)


@dataclass(frozen=True)
class CtNoiseInsertion(_Operator):
    """Low-dose CT: quantum and electronic noise, reconstructed and added to the full-dose image.

    Full-dose projections would have ``I0 exp(-p)`` photons for the line integral p, those at
    dose fraction f have f times as many. The image already carries the noise of the former, so
    only the difference is added: log-domain variance ``exp(p) (1/f - 1) / I0`` and, for an
    electronic noise of sigma quanta, ``sigma^2 exp(2p) (1/f^2 - 1) / I0^2``. The anatomy and its
    resolution stay untouched. I0 is calibrated for each series so that the simulated full-dose
    noise equals the measured one, and shared over views as a tube-current modulation would.
    """

    name: ClassVar[str] = "ct-noise-insertion"
    version: ClassVar[int] = 1

    dose_fraction: float = 0.25
    views: int = 270
    kernel: str = "hann"
    cutoff_per_mm: float = 0.75
    """Spatial frequency in line pairs per mm where the reconstruction kernel reaches zero."""
    electronic_quanta: float = 3.0
    modulation: float = 0.5
    """Photons of a view go with the view's largest exp(p) to this power (Gies et al., 1999)."""

    def apply(
        self, hq: Volume, *, pixel_mm: float, noise_hu: float, rng: np.random.Generator
    ) -> Volume:
        """Low-dose CT in HU from full-dose CT, [slice, row, column].

        ``noise_hu`` is the full-dose noise of the series (``soft_tissue_noise``). Raises ValueError
        for a dose fraction outside (0, 1] or a noise that is not positive, NoSoftTissueError where
        it cannot be calibrated.
        """
        image = torch.from_numpy(hq)
        return self.insert(image, pixel_mm=pixel_mm, noise_hu=noise_hu, rng=rng).numpy()

    def insert(
        self, hq: Tensor, *, pixel_mm: float, noise_hu: float, rng: np.random.Generator
    ) -> Tensor:
        """The same on the device of ``hq`` (float32); the noise itself is drawn on the CPU."""
        photons = calibrated_photons(hq, self, pixel_mm=pixel_mm, noise_hu=noise_hu, rng=rng)
        return insert_ct_noise(hq, self, pixel_mm=pixel_mm, photons=photons, rng=rng)


@dataclass(frozen=True)
class PetThinning(_Operator):
    """PET at 1/drf of the counts: Poisson projections and the same OSEM for both images.

    ``y = Poisson((factors * A x + scatter + randoms) / drf) * drf``; attenuation, scatter and
    randoms are known to the reconstruction. Defaults give about 10 % noise in the liver of a
    full-dose torso, as in a clinical 18F-FDG scan.
    """

    name: ClassVar[str] = "pet-thinned-osem"
    version: ClassVar[int] = 1

    drf: float = 12.0
    counts_per_suv_mm2: float = 60.0
    """Detected true counts, before attenuation, for each mm2 of a slice at SUV 1."""
    scatter_fraction: float = 0.3
    randoms_fraction: float = 0.2
    psf_fwhm_mm: float = 5.0
    """Blur of simulated activity; images of a scanner already have theirs (0)."""
    views: int = 120
    subsets: int = 12
    iterations: int = 2
    filter_fwhm_mm: float = 5.0

    def apply(
        self,
        activity: Volume,
        attenuation: Volume,
        *,
        pixel_mm: float,
        rng: np.random.Generator,
        psf_fwhm_mm: float | None = None,
    ) -> tuple[Volume, Volume]:
        psf = self.psf_fwhm_mm if psf_fwhm_mm is None else psf_fwhm_mm
        return simulate_pet(
            activity, attenuation, self, pixel_mm=pixel_mm, psf_fwhm_mm=psf, rng=rng
        )


def truncate_kspace(hq: Volume, factor: float = 4.0) -> Volume:
    """Low-resolution MR on the same grid [slice, row, column]; see ``restoration.kspace``."""
    planes = torch.from_numpy(np.ascontiguousarray(hq, dtype=np.float32))
    slices = [kspace.truncate(plane, factor).numpy() for plane in planes]
    return np.stack(slices).astype(np.float32)


def insert_ct_noise(
    hq: Tensor,
    scan: CtNoiseInsertion,
    *,
    pixel_mm: float,
    photons: float,
    rng: np.random.Generator,
) -> Tensor:
    """Low-dose CT in HU [slice, row, column] from full-dose CT of so many incident photons.

    Raises ValueError for a dose fraction outside (0, 1].
    """
    if not 0 < scan.dose_fraction <= 1:
        raise ValueError(f"'dose_fraction' must be in (0, 1], not {scan.dose_fraction}.")
    beam = _ct_beam(tuple(hq.shape[1:]), scan.views)
    noisy = torch.empty_like(hq)
    for start in range(0, len(hq), _CHUNK):
        part = hq[start : start + _CHUNK]
        spread = _log_noise(part, scan, beam, pixel_mm, photons)
        noisy[start : start + _CHUNK] = part + _ct_noise(spread, scan, beam, pixel_mm, rng)
    return noisy


def calibrated_photons(
    hq: Tensor,
    scan: CtNoiseInsertion,
    *,
    pixel_mm: float,
    noise_hu: float,
    rng: np.random.Generator,
    slices: int = 3,
) -> float:
    """Incident photons for which full-dose quantum noise equals ``noise_hu`` in soft tissue.

    Noise of one photon is reconstructed for a few slices; image noise goes with 1/sqrt(photons).
    Raises ValueError for a noise that is not positive, NoSoftTissueError.
    """
    if not noise_hu > 0:
        raise ValueError(f"'noise_hu' must be positive, not {noise_hu}.")
    part = hq[:: max(1, len(hq) // slices)][:slices]
    beam = _ct_beam(tuple(hq.shape[1:]), scan.views)
    noise = _ct_noise(_quantum_spread(part, scan, beam, pixel_mm), scan, beam, pixel_mm, rng)
    unit = _local_noise(noise.cpu().numpy(), _soft_tissue(part.cpu().numpy()))
    return (unit / noise_hu) ** 2


def soft_tissue_noise(hu: Volume) -> float:
    """Noise of a CT in HU: 25th percentile of the 7 x 7 local SD in soft tissue.

    Raises NoSoftTissueError.
    """
    return _local_noise(hu, _soft_tissue(hu))


def simulate_pet(
    activity: Volume,
    attenuation: Volume,
    scan: PetThinning,
    *,
    pixel_mm: float,
    psf_fwhm_mm: float,
    rng: np.random.Generator,
) -> tuple[Volume, Volume]:
    """Low-count and full-count PET (lq, hq) in SUV from true activity and attenuation.

    ``activity`` in SUV and ``attenuation`` in 1/mm at 511 keV are [slice, n, n] on one square
    grid that holds the body inside its inscribed circle.
    """
    subsets = _pet_subsets(activity.shape[-1], scan.views, scan.subsets)
    lq, hq = np.empty_like(activity), np.empty_like(activity)
    for start in range(0, len(activity), 8 * _CHUNK):
        part = slice(start, start + 8 * _CHUNK)
        true = _blur(torch.from_numpy(activity[part]), psf_fwhm_mm / pixel_mm)
        model = _pet_model(true, torch.from_numpy(attenuation[part]), subsets, scan, pixel_mm)
        for out, drf in ((hq, 1.0), (lq, scan.drf)):
            image = _scan_once(model, subsets, scan, drf, rng)
            out[part] = _blur(image, scan.filter_fwhm_mm / pixel_mm).numpy()
    return lq, hq


@dataclass(frozen=True)
class _PetModel:
    """Expected counts of one full-dose scan, one tensor (B, views, bins) for each subset."""

    trues: tuple[Tensor, ...]
    background: tuple[Tensor, ...]
    factors: tuple[Tensor, ...]


def _pet_model(
    activity: Tensor,
    attenuation: Tensor,
    subsets: tuple[ParallelBeam, ...],
    scan: PetThinning,
    pixel_mm: float,
) -> _PetModel:
    per_pixel = scan.counts_per_suv_mm2 * pixel_mm**2 / scan.views
    survival = [torch.exp(-beam.forward(attenuation) * pixel_mm) for beam in subsets]
    factors = [per_pixel * part for part in survival]
    trues = [factor * beam.forward(activity) for factor, beam in zip(factors, subsets, strict=True)]
    scattered = scan.scatter_fraction / (1 - scan.scatter_fraction)
    background = [
        scattered * _blur_rows(part, 200 / pixel_mm / 2.355)
        + scan.randoms_fraction * part.mean((1, 2), keepdim=True)
        for part in trues
    ]
    return _PetModel(tuple(trues), tuple(background), tuple(factors))


def _scan_once(
    model: _PetModel,
    subsets: tuple[ParallelBeam, ...],
    scan: PetThinning,
    drf: float,
    rng: np.random.Generator,
) -> Tensor:
    counts = []
    for trues, background in zip(model.trues, model.background, strict=True):
        mean = (trues + background).double().clamp_min(0).numpy() / drf
        counts.append(torch.from_numpy((rng.poisson(mean) * drf).astype(np.float32)))
    return osem(subsets, counts, model.factors, model.background, iterations=scan.iterations)


@lru_cache(maxsize=4)
def _pet_subsets(size: int, views: int, subsets: int) -> tuple[ParallelBeam, ...]:
    angles = [math.pi * view / views for view in range(views)]
    # Far-apart subsets follow each other: 0, n/2, 1, n/2+1 … converge evenly (Hudson & Larkin).
    half = (subsets + 1) // 2
    order = [k for pair in range(half) for k in (pair, pair + half) if k < subsets]
    return tuple(ParallelBeam(size, angles[k::subsets], bins=size | 1, matrix=True) for k in order)


@lru_cache(maxsize=4)
def _ct_beam(shape: tuple[int, ...], views: int) -> ParallelBeam:
    rows, columns = shape
    return ParallelBeam((rows, columns), views)


def _quantum_spread(
    hu: Tensor, scan: CtNoiseInsertion, beam: ParallelBeam, pixel_mm: float
) -> Tensor:
    """SD of the log projections (B, views, bins) for one incident photon per bin on average."""
    return torch.exp(0.5 * _attenuation(hu, scan, beam, pixel_mm))


def _log_noise(
    hu: Tensor, scan: CtNoiseInsertion, beam: ParallelBeam, pixel_mm: float, photons: float
) -> Tensor:
    """SD of the log-projection noise to add, (B, views, bins)."""
    dose = scan.dose_fraction
    inverse = torch.exp(_attenuation(hu, scan, beam, pixel_mm)) / photons
    inverse = inverse.clamp(max=dose)  # at least one photon arrives, else the logarithm is cut
    quantum = inverse * (1 / dose - 1)
    electronic = (scan.electronic_quanta * inverse) ** 2 * (1 / dose**2 - 1)
    return torch.sqrt(quantum + electronic)


def _attenuation(hu: Tensor, scan: CtNoiseInsertion, beam: ParallelBeam, pixel_mm: float) -> Tensor:
    """Line integrals p (B, views, bins) less the logarithm of the tube-current modulation.

    Counts vary slowly over the detector, so a quarter of the grid in each direction is enough.
    """
    density = (1 + hu / 1000).clamp_min(0)[:, None]
    coarse = torch.nn.functional.avg_pool2d(density, 4, ceil_mode=True, count_include_pad=False)
    thin = ParallelBeam(
        (coarse.shape[-2], coarse.shape[-1]), beam.angles[::3], bins=math.ceil(beam.bins / 4)
    )
    line = thin.forward(coarse[:, 0]) * (4 * pixel_mm * WATER_PER_MM)
    line = torch.nn.functional.interpolate(
        line[:, None], (len(beam.angles), beam.bins), mode="bilinear"
    )[:, 0]
    strength = scan.modulation * line.amax(2, keepdim=True)
    # Modulation shares the same photons among the views.
    return line - (strength - torch.logsumexp(strength, 1, keepdim=True) + math.log(line.shape[1]))


def _ct_noise(
    spread: Tensor,
    scan: CtNoiseInsertion,
    beam: ParallelBeam,
    pixel_mm: float,
    rng: np.random.Generator,
) -> Tensor:
    """Reconstructed noise in HU [slice, row, column] of log projections with this SD."""
    white = torch.from_numpy(rng.standard_normal(tuple(spread.shape), dtype=np.float32))
    cutoff = min(1.0, scan.cutoff_per_mm * 2 * pixel_mm)
    image = fbp(beam, white.to(spread.device) * spread, apodisation=scan.kernel, cutoff=cutoff)
    return image * (1000 / (pixel_mm * WATER_PER_MM))


def _soft_tissue(hu: Volume) -> npt.NDArray[np.bool_]:
    return np.asarray((hu > -60) & (hu < 140))


def _local_noise(image: Volume, mask: npt.NDArray[np.bool_]) -> float:
    """25th percentile of the 7 x 7 local SD where the whole window lies in the mask.

    Coarse images have few such windows; 5 x 5 and 3 x 3 are tried then.
    """
    stack = torch.from_numpy(np.stack([image, image**2, mask.astype(np.float32)], 1)).double()
    for width in (7, 5, 3):
        mean, square, inside = torch.nn.functional.avg_pool2d(stack, width, stride=1).unbind(1)
        spread = (square - mean**2).clamp_min(0).sqrt()[inside > 0.999]
        if spread.numel() >= 100:
            return float(torch.quantile(spread[:: max(1, spread.numel() // 100_000)], 0.25))
    raise NoSoftTissueError("The image has too little soft tissue to measure its noise.")


def _blur(image: Tensor, fwhm: float) -> Tensor:
    """Gaussian blur (B, rows, columns) of a full width at half maximum in pixels."""
    sigma = fwhm / 2.355
    return _blur_rows(_blur_rows(image, sigma).mT, sigma).mT if sigma > 0 else image


def _blur_rows(rows: Tensor, sigma: float) -> Tensor:
    """Gaussian blur along the last axis (B, n, m), zero outside; sigma in samples."""
    reach = min(math.ceil(3 * sigma), rows.shape[-1] - 1)
    offset = torch.arange(-reach, reach + 1, dtype=rows.dtype)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    weight = (kernel / kernel.sum())[None, None]
    flat = rows.reshape(-1, 1, rows.shape[-1])
    return torch.nn.functional.conv1d(flat, weight, padding=reach).reshape(rows.shape)
