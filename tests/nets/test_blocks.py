"""What every network gets from its blocks: gradient checkpointing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldm.nets.autoencoder import AutoencoderKL, VQModel
from ldm.nets.blocks import Block
from ldm.nets.diffusers import Pretrained
from ldm.nets.unet import UNet

SHAPE = {"in_channels": 2, "out_channels": 2, "block_out_channels": [8, 12, 16], "layers_per_block": 2, "norm_num_groups": 4}
X = torch.randn(2, 2, 16, 24, generator=torch.Generator().manual_seed(0))


def kl() -> tuple[Pretrained, Callable[[Tensor], Tensor]]:
    net = AutoencoderKL(latent_channels=3, attention=[False, True, False], **SHAPE)
    return net, lambda x: net.decode(net.encode(x).sample(torch.ones(1)))


def vq() -> tuple[Pretrained, Callable[[Tensor], Tensor]]:
    net = VQModel(latent_channels=3, num_vq_embeddings=7, **SHAPE)
    return net, lambda x: net.decode(net.encode(x).mean)


def unet() -> tuple[Pretrained, Callable[[Tensor], Tensor]]:
    net = UNet(attention=["none", "cross", "cross"], cross_attention_dim=5, num_heads=2, **SHAPE)
    context = torch.randn(2, 3, 5)
    return net, lambda x: net(x, torch.tensor([3.0, 500.0]), context, torch.tensor([[True, True, False]] * 2))


def train(net: Pretrained, function: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], int]:
    """Output and gradients; and bytes held for the backward pass, those of the stages' inputs included."""
    held: dict[int, int] = {}  # by storage: views and tensors saved twice take no more memory

    def hold(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def hold_inputs(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        for value in (*args, *kwargs.get("skips", ())):
            if isinstance(value, Tensor):
                alive.append(hold(value))

    alive: list[Tensor] = []  # so that no address is used twice
    blocks = [module for module in net.modules() if isinstance(module, Block)]
    hooks = [block.register_forward_pre_hook(hold_inputs, with_kwargs=True) for block in blocks]
    for parameter in net.parameters():
        parameter.grad = None
    x = X.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: alive.append(t) or hold(t), lambda t: t):
        output = function(x)
    total = sum(held.values())
    for hook in hooks:
        hook.remove()
    output.square().sum().backward()
    assert x.grad is not None
    return [output.detach(), x.grad, *(p.grad for p in net.parameters() if p.grad is not None)], total


@pytest.mark.parametrize("make", [kl, vq, unet])
def test_checkpointing_changes_no_bit_and_holds_less(make: Callable[[], tuple[Pretrained, Callable[[Tensor], Tensor]]]) -> None:
    torch.manual_seed(0)
    net, function = make()
    assert not any(block.recompute for block in net.blocks())
    plain, everything = train(net, function)
    net.set_gradient_checkpointing(True)
    assert all(block.recompute for block in net.blocks())
    twice, inputs = train(net, function)
    assert len(plain) == len(twice) > 100
    assert all(torch.equal(a, b) for a, b in zip(plain, twice, strict=True))
    assert inputs < everything / 4
    net.set_gradient_checkpointing(False)
    assert train(net, function)[1] == everything


@pytest.mark.parametrize("make", [kl, unet])
def test_checkpointing_computes_nothing_twice_without_gradients(make: Callable[[], tuple]) -> None:
    net, function = make()
    calls: list[int] = []
    blocks = [module for module in net.modules() if isinstance(module, Block)]
    blocks[0].resnets[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    net.set_gradient_checkpointing(True)
    with torch.no_grad():
        function(X)
    assert len(calls) == 1
    function(X).sum().backward()
    assert len(calls) == 3
