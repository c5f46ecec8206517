"""The three stages of DiffCode: what each trains, what it keeps frozen, its loss and its gate.

I   autoencoder and codebook bank on clean images (Eq. 3)
II  condition encoder and latent diffusion towards the frozen E_vq's features (Eq. 6)
III backbone, routing modules and classifier, guided by the frozen rest (Eq. 7)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restoration.diffcode import DiffCode
from restoration.quantizer import rows_by_task, straight_through
from restoration.tasks import RestorationTask
from training.recipe import Optimisation, Recipe

Terms = dict[str, Tensor]
Loss = Callable[..., Tensor]


class Stage(Enum):
    """One step of the training; the value names its command."""

    CODEBOOK = "codebook"  #: Stage I
    DIFFUSION = "diffusion"  #: Stage II
    RESTORATION = "restoration"  #: Stage III

    @property
    def table(self) -> str:
        """The table of the recipe that governs this stage."""
        return _TABLES[self]

    def settings(self, recipe: Recipe) -> Optimisation:
        """What that table says."""
        settings: Optimisation = getattr(recipe, self.table)
        return settings

    def folder(self, variant: str) -> str:
        """Subfolder of the run; one run may hold every rung of the ladder."""
        if self is Stage.CODEBOOK:
            return "codebook"
        if self is Stage.DIFFUSION:
            return "condition" if variant == "v3" else "diffusion"
        return f"restoration-{variant}"

    def before(self, variant: str) -> Stage | None:
        """The stage whose weights this one starts from; V1 and V2 need no codebook."""
        if self is Stage.RESTORATION:
            return Stage.DIFFUSION if variant in ("v3", "full") else None
        return Stage.CODEBOOK if self is Stage.DIFFUSION else None


_TABLES = {Stage.CODEBOOK: "stage1", Stage.DIFFUSION: "stage2", Stage.RESTORATION: "stage3"}
_LEAST_MSE = 1e-6  # a root of 4 HU
TRAINED = {
    Stage.CODEBOOK: ("vq_encoder", "bank", "decoder"),
    Stage.DIFFUSION: ("condition", "prior"),
    Stage.RESTORATION: ("backbone", "classifier"),
}
FROZEN = {
    Stage.CODEBOOK: (),
    Stage.DIFFUSION: ("vq_encoder", "bank", "decoder"),
    Stage.RESTORATION: ("condition", "prior", "bank", "decoder"),
}


def trained_parameters(model: DiffCode, stage: Stage) -> dict[str, nn.Parameter]:
    """Name and parameter of all that ``stage`` moves; every other parameter is frozen."""
    prefixes = tuple(f"{part}." for part in TRAINED[stage])
    trained = {n: p for n, p in model.named_parameters() if n.startswith(prefixes)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return trained


def stage_state(model: DiffCode, stage: Stage) -> dict[str, Tensor]:
    """The weights that a checkpoint of ``stage`` holds: those trained, and those it stands on."""
    prefixes = tuple(f"{part}." for part in TRAINED[stage] + FROZEN[stage])
    return {n: t for n, t in model.state_dict().items() if n.startswith(prefixes)}


def masked_l1(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference over the pixels of ``mask``; all are (B, 1, H, W)."""
    difference: Tensor = (prediction - target).abs() * mask
    return difference.sum() / mask.sum().clamp(min=1.0)


def masked_psnr_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Minus the mean PSNR of the images (B, 1, H, W), in units of 100 dB; peak 1.

    An L1 loss ends at the median of what a pixel may be, this one at its mean: quantities that are
    averages stay what they are. The loss of NAFNet (Chen et al., ECCV 2022), with a floor so that
    images which hold little but air do not rule the rest.
    """
    errors = (prediction.float() - target).square() * mask
    mse = errors.sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1.0)
    return (mse + _LEAST_MSE).log10().mean() / 10


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """Latent positions that see real pixels: (B, 1, H, W) → (B, 1, H/f, W/f)."""
    return F.max_pool2d(mask, factor)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, d, h, w) over the positions of ``mask`` (B, 1, h, w)."""
    return (values * mask).sum() / (mask.sum().clamp(min=1.0) * values.shape[1])


def seeded_noise(shape: tuple[int, ...], seed: int, step: int, stream: int) -> Tensor:
    """Gaussian noise that depends on nothing but its arguments, so that a resumed run repeats."""
    state = np.random.SeedSequence((seed, step, stream)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
    return torch.randn(shape, generator=generator)


class Objective(nn.Module):
    """The loss of one stage as a module, which DistributedDataParallel can wrap.

    Called with normalised ``lq``, ``hq`` and ``mask`` (B, 1, H, W), ``task`` (B,) and the step;
    gives named scalars of which ``loss`` is the one to minimise.
    """

    def __init__(self, model: DiffCode, recipe: Recipe, rank: int = 0) -> None:
        super().__init__()
        self.model, self.recipe, self.rank = model, recipe, rank

    def noise(self, lq: Tensor, task: Tensor, step: int) -> Tensor:
        """What the chain of each image starts from: the same whether tasks come apart or not."""
        _, *shape = self.model.noise_shape(lq)
        noise = torch.empty(len(lq), *shape)
        for n, rows in rows_by_task(task.cpu()):
            stream = self.rank * len(RestorationTask) + n
            noise[rows] = seeded_noise((len(rows), *shape), self.recipe.seed, step, stream)
        return noise.to(lq.device)


def mean_over_tasks(loss: Loss, task: Tensor, *images: Tensor) -> Tensor:
    """The mean of a loss over the tasks of a batch, each over its own images."""
    parts = rows_by_task(task)
    if len(parts) == 1:
        return loss(*images)
    return torch.stack([loss(*(image[rows] for image in images)) for _, rows in parts]).mean()


class CodebookObjective(Objective):
    """Stage I, Eq. (3): L1 + codebook + β·commitment; plain L1 during the warm-up."""

    def forward(self, lq: Tensor, hq: Tensor, mask: Tensor, task: Tensor, step: int) -> Terms:
        model, settings = self.model, self.recipe.stage1
        assert model.vq_encoder is not None
        assert model.decoder is not None
        assert model.bank is not None
        z = model.vq_encoder(hq)  # (B, d, h, w)
        if step < settings.ae_warmup:
            l1 = mean_over_tasks(masked_l1, task, model.decoder(z), hq, mask)
            return {"loss": l1, "l1": l1}
        with torch.autocast(hq.device.type, enabled=False):
            z = z.float()
            codes = model.bank.encode(z, task)
            q = model.bank.decode(codes, task)
            weight = latent_mask(mask, model.config.factor)
            codebook = self._codebook_term(z.detach(), codes, q, task, weight)
            distance = (z - q.detach()).square()
            commitment = mean_over_tasks(masked_mean, task, distance, weight)
        decoded = model.decoder(straight_through(z, q))
        l1 = mean_over_tasks(masked_l1, task, decoded, hq, mask)
        loss = l1 + codebook + settings.commitment * commitment
        return {
            "loss": loss, "l1": l1, "codebook": codebook, "codes": codes, "latent": z.detach()
        }  # fmt: skip

    def _codebook_term(
        self, z: Tensor, codes: Tensor, q: Tensor, task: Tensor, weight: Tensor
    ) -> Tensor:
        bank = self.model.bank
        if self.recipe.stage1.codebook_loss == "final" or bank is None:
            return mean_over_tasks(masked_mean, task, (z - q).square(), weight)
        prefixes = (bank.decode(codes[:, : k + 1], task) for k in range(codes.shape[1]))
        terms = [
            mean_over_tasks(masked_mean, task, (z - prefix).square(), weight) for prefix in prefixes
        ]
        return torch.stack(terms).mean()


class DiffusionObjective(Objective):
    """Stage II, Eq. (6): L1(z, ẑ) after the whole chain; V3 trains the condition itself as ẑ."""

    def forward(self, lq: Tensor, hq: Tensor, mask: Tensor, task: Tensor, step: int) -> Terms:
        model = self.model
        assert model.vq_encoder is not None
        assert model.condition is not None
        with torch.no_grad():
            z = model.vq_encoder(hq).float()  # (B, d, h, w), not quantised
        condition = model.condition(lq)
        if model.prior is None:
            estimate = condition
        else:
            estimate = model.prior(condition, z, self.noise(lq, task, step))
        weight = latent_mask(mask, model.config.factor)
        loss = mean_over_tasks(masked_mean, task, (z - estimate).abs(), weight)
        return {"loss": loss, "latent_l1": loss}


class RestorationObjective(Objective):
    """Stage III, Eq. (7): L1 of the restored image and cross entropy of the task classifier.

    ``stage3.pixel_loss = "psnr"`` takes the mean PSNR in the place of L1.
    """

    def forward(self, lq: Tensor, hq: Tensor, mask: Tensor, task: Tensor, step: int) -> Terms:
        model = self.model
        with torch.no_grad():
            noise = None if model.prior is None else self.noise(lq, task, step)
            latent = model.estimate(lq, noise)
            reference, _, _ = model.lookup(latent, task)
        weights, logits = (None, None)
        if model.classifier is not None:
            weights, logits = model.classifier(lq, task)
        restored = model.backbone(lq, reference, weights)
        pixel = self.recipe.stage3.pixel_loss
        loss = mean_over_tasks(_PIXEL_LOSSES[pixel], task, restored, hq, mask)
        terms = {"loss": loss, pixel: loss}
        if logits is not None:
            terms["class"] = F.cross_entropy(logits.float(), task)
            terms["loss"] = loss + self.recipe.stage3.class_loss * terms["class"]
        return terms


_PIXEL_LOSSES = {"l1": masked_l1, "psnr": masked_psnr_loss}


OBJECTIVES: dict[Stage, type[Objective]] = {
    Stage.CODEBOOK: CodebookObjective,
    Stage.DIFFUSION: DiffusionObjective,
    Stage.RESTORATION: RestorationObjective,
}


def start_condition_from_encoder(model: DiffCode) -> None:
    """Give E_lq the weights of E_vq, which has its shape, as the start of Stage II."""
    if model.condition is not None and model.vq_encoder is not None:
        model.condition.load_state_dict(model.vq_encoder.state_dict())


def start_backbone_from(model: DiffCode, weights: Mapping[str, Tensor]) -> None:
    """Start Stage III from another rung's backbone and classifier.

    A departure from the paper, which trains each rung from scratch. Where this backbone has a
    reference channel that ``weights`` lacks, its input weights start at zero, so the first step
    restores exactly as the other rung does. Raises ValueError naming a weight that does not fit.
    """
    own = {
        n: p for n, p in model.state_dict().items() if n.startswith(("backbone.", "classifier."))
    }
    for name, target in own.items():
        source = weights.get(name)
        if source is None:
            if ".routing" in name or "_routing" in name or name.startswith("classifier."):
                continue  # V1 has none; a new routing module starts as the identity
            raise ValueError(f"the starting weights have no {name}")
        if name == "backbone.embed.weight" and source.shape[1] < target.shape[1]:
            target.zero_()
            target[:, : source.shape[1]].copy_(source)
        elif source.shape != target.shape:
            raise ValueError(f"{name}: {tuple(source.shape)} does not fit {tuple(target.shape)}")
        else:
            target.copy_(source)


@dataclass(frozen=True)
class GateCheck:
    """One condition for going on to the next stage."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value >= self.limit

    def __str__(self) -> str:
        verdict = "pass" if self.passed else "FAIL"
        return f"{verdict}  {self.name}: {self.value:.4g} (at least {self.limit:.4g})"


RECONSTRUCTION_GAIN_DB = 3.0
LEAST_CODE_USAGE = 0.6


def codebook_gate(figures: Mapping[str, Mapping[str, float]]) -> tuple[GateCheck, ...]:
    """Stage I may end when every codebook is used and describes more than the degraded image has.

    ``figures[task]`` has `input_psnr`, `reconstruction_psnr` and `usage` (a share).
    """
    checks = []
    for task, f in figures.items():
        gain = f["reconstruction_psnr"] - f["input_psnr"]
        checks.append(GateCheck(f"{task} reconstruction gain, dB", gain, RECONSTRUCTION_GAIN_DB))
        checks.append(GateCheck(f"{task} code usage", f["usage"], LEAST_CODE_USAGE))
    return tuple(checks)


def diffusion_gate(figures: Mapping[str, Mapping[str, float]]) -> tuple[GateCheck, ...]:
    """Stage II may end when ẑ is nearer to z than E_vq(LQ) is, and the reference helps.

    ``figures[task]`` has `latent_l1`, `plain_latent_l1`, `reference_psnr` and `input_psnr`; the
    reference must beat the input on CT and PET, else it would mislead the backbone.
    """
    checks = []
    for task, f in figures.items():
        gain = f["plain_latent_l1"] - f["latent_l1"]
        checks.append(GateCheck(f"{task} latent L1 below E_vq(LQ)", gain, 0.0))
        if task != "mri_sr":
            better = f["reference_psnr"] - f["input_psnr"]
            checks.append(GateCheck(f"{task} reference gain, dB", better, 0.0))
    return tuple(checks)


def restoration_gate(figures: Mapping[str, Mapping[str, float]]) -> tuple[GateCheck, ...]:
    """Stage III: better than its input and, paired on the same slices, not worse than V2.

    ``figures[task]`` has `restored_psnr`, `input_psnr` and, where a V2 was trained, `v2_psnr`.
    """
    checks = []
    for task, f in figures.items():
        gain = f["restored_psnr"] - f["input_psnr"]
        checks.append(GateCheck(f"{task} restoration gain, dB", gain, 0.0))
        if "v2_psnr" in f:
            paired = f["restored_psnr"] - f["v2_psnr"]
            checks.append(GateCheck(f"{task} gain over V2, dB", paired, 0.0))
    return tuple(checks)


GATES = {
    Stage.CODEBOOK: codebook_gate,
    Stage.DIFFUSION: diffusion_gate,
    Stage.RESTORATION: restoration_gate,
}


def gate_record(
    stage: Stage, figures: Mapping[str, Mapping[str, float]], step: int
) -> dict[str, Any]:
    """What ``gate.json`` beside a checkpoint says: figures, checks and the verdict."""
    checks = GATES[stage](figures)
    return {
        "stage": stage.value,
        "step": step,
        "passed": all(check.passed for check in checks),
        "checks": [
            {"name": c.name, "value": c.value, "limit": c.limit, "passed": c.passed} for c in checks
        ],
        "figures": {task: dict(values) for task, values in figures.items()},
    }
