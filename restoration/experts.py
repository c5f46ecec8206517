"""Task-adaptive routing strategy: one global gate per image for all levels (DiffCode Eq. 8).

With k = 1 the softmax over the single chosen logit is the constant 1 and the gate gets no gradient,
so by default the task decides the expert (``task_map``) and a classifier, trained beside it, only
cross-checks. ``top_k`` (the literal Eq. 8) and ``switch`` are kept for the study of Table 2b.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restoration.blocks import Pointwise

GATES = ("task_map", "top_k", "switch")


def top_k_gate(logits: Tensor, k: int) -> Tensor:
    """Eq. 8: softmax over the k largest logits, zero elsewhere: (B, E) → (B, E)."""
    values, index = logits.topk(k, dim=1)
    return torch.zeros_like(logits).scatter(1, index, values.softmax(dim=1))


def switch_gate(logits: Tensor, k: int) -> Tensor:
    """Softmax over all experts, of which the k largest are kept (Fedus et al., 2022)."""
    values, index = logits.softmax(dim=1).topk(k, dim=1)
    return torch.zeros_like(logits).scatter(1, index, values)


def task_gate(task: Tensor, experts: int) -> Tensor:
    """One-hot weights, expert = task index: (B,) → (B, E)."""
    return F.one_hot(task, experts).float()


class GlobalRouter(nn.Module):
    """Task classifier on the degraded image and, for learned gates, the expert logits.

    The trunk is AMIR's routing-instruction network: two 3×3 convolutions of stride 3, three 1×1,
    global average pooling.
    """

    def __init__(self, tasks: int, experts: int, gate: str = "task_map", k: int = 1) -> None:
        super().__init__()
        if gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)}, not {gate!r}")
        self.gate, self.k, self.experts = gate, k, experts
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 64, 3, stride=3),
            nn.LeakyReLU(0.1),
            nn.Conv2d(64, 64, 3, stride=3),
            nn.LeakyReLU(0.1),
            nn.Conv2d(64, 64, 1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(64, 64, 1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(64, 32, 1),
        )
        self.classify = nn.Linear(32, tasks)
        self.score = nn.Linear(32, experts) if gate != "task_map" else None

    def forward(self, image: Tensor, task: Tensor | int) -> tuple[Tensor | int, Tensor]:
        """(B, 1, H, W), (B,) → expert weights (B, E) and task logits (B, n_tasks); H, W ≥ 9.

        A number stands for the task of all images; where the task names the expert, the weights
        are then that expert's number.
        """
        features = self.trunk(image).mean(dim=(2, 3))  # (B, 32)
        logits = self.classify(features)
        if self.score is None:
            return task if isinstance(task, int) else task_gate(task, self.experts), logits
        choose = top_k_gate if self.gate == "top_k" else switch_gate
        return choose(self.score(features), self.k), logits


class TaskAdaptiveRouting(nn.Module):
    """TARM: f + Σ_e V_e A_e(f), each expert a two-layer 1×1 network (4c² + 3c parameters).

    The last convolution of each expert starts at zero, so the module starts as the identity.
    """

    def __init__(self, channels: int, experts: int, ratio: int = 2) -> None:
        super().__init__()
        self.experts = nn.ModuleList(_expert(channels, ratio) for _ in range(experts))

    def forward(self, features: Tensor, weights: Tensor | int) -> Tensor:
        """(B, C, H, W) with the weights of each image (B, E), or the one expert of them all."""
        out = features
        if isinstance(weights, int):
            update: Tensor = self.experts[weights](features)
            return out + update
        for e, expert in enumerate(self.experts):
            weight = weights[:, e].to(features.dtype)
            rows = torch.nonzero(weight).squeeze(1)
            if len(rows) == len(features):
                out = out + weight.view(-1, 1, 1, 1) * expert(features)
            elif len(rows):
                update = weight[rows].view(-1, 1, 1, 1) * expert(features[rows])
                out = out.index_add(0, rows, update.to(out.dtype))
        return out


def _expert(channels: int, ratio: int) -> nn.Sequential:
    last = Pointwise(ratio * channels, channels)
    nn.init.zeros_(last.weight)
    if last.bias is not None:
        nn.init.zeros_(last.bias)
    return nn.Sequential(Pointwise(channels, ratio * channels), nn.GELU(), last)
