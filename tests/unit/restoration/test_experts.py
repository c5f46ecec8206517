from __future__ import annotations

import pytest
import torch

from restoration.experts import (
    GlobalRouter,
    TaskAdaptiveRouting,
    switch_gate,
    task_gate,
    top_k_gate,
)

LOGITS = torch.tensor([[0.3, 2.0, -1.0, 1.0], [5.0, 4.0, 3.0, 2.0]])


def routing(experts: int = 4, channels: int = 6) -> TaskAdaptiveRouting:
    """Routing whose experts all do something."""
    module = TaskAdaptiveRouting(channels, experts)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return module


def test_one_expert_by_equation_eight_gets_no_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    gate = top_k_gate(logits, 1)
    assert gate.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    (gate * torch.randn(2, 4)).sum().backward()
    assert logits.grad is not None
    assert not bool(logits.grad.any())


@pytest.mark.parametrize("k", [2, 3])
def test_several_experts_by_equation_eight_get_a_gradient(k: int) -> None:
    logits = LOGITS.clone().requires_grad_()
    gate = top_k_gate(logits, k)
    torch.testing.assert_close(gate.sum(1), torch.ones(2))
    assert (gate > 0).sum(1).tolist() == [k, k]
    (gate * torch.randn(2, 4)).sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.any())


def test_a_switch_gate_has_a_gradient_with_one_expert() -> None:
    logits = LOGITS.clone().requires_grad_()
    gate = switch_gate(logits, 1)
    torch.testing.assert_close(gate.amax(1), LOGITS.softmax(1).amax(1))
    assert (gate > 0).sum(1).tolist() == [1, 1]
    gate.sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.any())


def test_the_task_chooses_its_expert() -> None:
    assert task_gate(torch.tensor([2, 0]), 4).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]


def test_routing_starts_as_the_identity() -> None:
    features = torch.randn(2, 6, 5, 5)
    assert torch.equal(TaskAdaptiveRouting(6, 4)(features, top_k_gate(LOGITS, 2)), features)


def test_routing_adds_the_weighted_experts() -> None:
    module, features = routing(), torch.randn(2, 6, 5, 4)
    weights = top_k_gate(LOGITS, 2)
    expected = features.clone()
    for e, expert in enumerate(module.experts):
        expected = expected + weights[:, e].view(2, 1, 1, 1) * expert(features)
    torch.testing.assert_close(module(features, weights), expected)


def test_a_mixed_batch_is_routed_image_by_image() -> None:
    module, features = routing(), torch.randn(4, 6, 5, 4)
    weights = task_gate(torch.tensor([1, 0, 1, 2]), 4)
    mixed = module(features, weights)
    alone = [module(features[i : i + 1], weights[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(mixed, torch.cat(alone))


def test_an_expert_without_weight_is_never_called() -> None:
    module, features = routing(), torch.randn(2, 6, 5, 4)
    with torch.no_grad():
        for parameter in module.experts[3].parameters():
            parameter.fill_(float("nan"))
    assert bool(module(features, task_gate(torch.tensor([0, 2]), 4)).isfinite().all())


@pytest.mark.parametrize("channels", [8, 64])
def test_routing_has_the_published_number_of_parameters(channels: int) -> None:
    count = sum(p.numel() for p in TaskAdaptiveRouting(channels, 4).parameters())
    assert count == 4 * (4 * channels**2 + 3 * channels)


def test_the_classifier_is_small() -> None:
    assert sum(p.numel() for p in GlobalRouter(3, 4).parameters()) == 48_067


def test_the_classifier_learns_by_its_logits_alone_when_the_task_decides() -> None:
    router = GlobalRouter(3, 4)
    weights, logits = router(torch.randn(2, 1, 24, 18), torch.tensor([0, 2]))
    assert weights.tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    assert logits.shape == (2, 3)
    assert not weights.requires_grad
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in router.parameters())


@pytest.mark.parametrize("gate", ["top_k", "switch"])
def test_a_learned_gate_looks_at_the_image_and_not_at_the_task(gate: str) -> None:
    router = GlobalRouter(3, 4, gate, k=2)
    image = torch.randn(2, 1, 24, 18)
    first, _ = router(image, torch.tensor([0, 2]))
    second, _ = router(image, torch.tensor([1, 1]))
    assert torch.equal(first, second)
    assert (first > 0).sum(1).tolist() == [2, 2]


def test_an_unknown_gate_is_refused() -> None:
    with pytest.raises(ValueError, match="gate"):
        GlobalRouter(3, 4, "roulette")
