from __future__ import annotations

import pytest
import torch

from restoration.autoencoder import Decoder, Encoder

PAPER = ((64, 128, 256, 256), (2, 2, 4, 4), 256)
SMALL = ((4, 6, 8, 8), (1, 1, 1, 1), 5)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_encoder_and_decoder_have_the_published_sizes() -> None:
    with torch.device("meta"):
        encoder, decoder = Encoder(*PAPER), Decoder(*PAPER)
    assert parameters(encoder) == 4_530_048
    assert parameters(decoder) == 4_529_345


@pytest.mark.parametrize("size", [(128, 128), (192, 400), (8, 16)])
def test_one_latent_position_stands_for_eight_by_eight_pixels(size: tuple[int, int]) -> None:
    x = torch.randn(2, 1, *size)
    z = Encoder(*SMALL)(x)
    assert z.shape == (2, 5, size[0] // 8, size[1] // 8)
    assert Decoder(*SMALL)(z).shape == x.shape


def test_all_parameters_of_both_take_part() -> None:
    encoder, decoder = Encoder(*SMALL), Decoder(*SMALL)
    for module in (encoder, decoder):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    decoder(encoder(torch.randn(1, 1, 32, 32))).square().sum().backward()
    for module in (encoder, decoder):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()), name


def test_the_bottleneck_carries_everything() -> None:
    decoder = Decoder(*SMALL)
    z = Encoder(*SMALL)(torch.randn(1, 1, 32, 32))
    assert torch.equal(decoder(z), decoder(z.clone()))
    assert not torch.equal(decoder(z), decoder(torch.zeros_like(z)))
