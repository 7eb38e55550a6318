import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.nn import functional as F

from rtdmd_cli.engine.compute.gelu import SigmoidGELU, gelu, quicken_gelu
from rtdmd_cli.engine.compute.mixed import MixedPrecision


def layer(activation: str = "gelu-approximate") -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = FeedForward(8, activation_fn=activation)
    return network


def operations(module: nn.Module, x: Tensor) -> set[str]:
    with torch.profiler.profile() as profile:
        module(x)
    return {event.key for event in profile.key_averages()}


def test_value_and_gradient_are_those_of_torch() -> None:
    own = torch.linspace(-12, 12, 4801).requires_grad_()
    theirs = own.detach().double().requires_grad_()
    upstream = torch.linspace(1, 2, 4801)
    found, expected = gelu(own), F.gelu(theirs, approximate="tanh")
    found.backward(upstream)
    expected.backward(upstream.double())
    assert own.grad is not None and theirs.grad is not None
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(own.grad, theirs.grad.float(), rtol=1e-5, atol=3e-6)
    with torch.no_grad():
        assert torch.equal(gelu(own), found)


def test_numbers_so_large_that_an_exponential_overflows() -> None:
    x = torch.tensor([-1e6, -100.0, 0.0, 100.0, 1e6], requires_grad=True)
    y = gelu(x)
    y.sum().backward()
    assert y.tolist() == [0, 0, 0, 100, 1e6]
    assert x.grad is not None and x.grad.tolist() == [0, 0, 0.5, 1, 1]


def test_only_while_wanted_and_only_where_it_is_quicker() -> None:
    network, x = layer(), torch.randn(3, 8)
    mixed, names = MixedPrecision([network], None), [name for name, _ in layer().named_parameters()]
    assert isinstance(network.get_submodule("net.0"), SigmoidGELU)
    assert [name for name, _ in network.named_parameters()] == names
    assert torch.equal(network(x), layer()(x)) and "aten::gelu" in operations(network, x)
    with mixed.active():
        torch.testing.assert_close(network(x), layer()(x), rtol=1e-5, atol=1e-6)
        assert "aten::gelu" not in operations(network, x)
        assert "aten::gelu" in operations(network.to(torch.bfloat16), x.to(torch.bfloat16))


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
def test_other_activations_stay(activation: str) -> None:
    network, x = layer(activation), torch.randn(3, 8)
    quicken_gelu(network, lambda: True)
    assert not any(isinstance(module, SigmoidGELU) for module in network.modules())
    assert torch.equal(network(x), layer(activation)(x))
