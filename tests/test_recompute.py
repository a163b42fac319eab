"""A GPT-2 block keeps what it says, and its gradients are those of its layers one by one."""

import pytest
import torch
from torch import Tensor

import pyfast
from pyfast import backend, models, nn
from pyfast.models import GPTConfig
from pyfast.recompute import norm_linear, norm_mlp

pytestmark = pytest.mark.skipif(backend.extension() is None, reason="pyfast._C is not built")

B, T, C = 2, 5, 32


def layers(
    act: str = "gelu_tanh", dtype: torch.dtype = torch.float64
) -> dict[str, torch.nn.Module]:
    made = {
        "norm": nn.LayerNorm(C),
        "linear": nn.Conv1D(3 * C, C),
        "up": nn.Conv1D(4 * C, C, act=act),
        "down": nn.Conv1D(C, 4 * C),
    }
    for layer in made.values():
        for p in layer.parameters():
            p.data = torch.randn_like(p).mul(0.3).to(dtype)
    return made


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    weights = [torch.randn_like(out) for out in outputs]
    return torch.autograd.grad(outputs, leaves, weights, allow_unused=True)


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(B, T, C, dtype=dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("act", ["none", "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("with_residual", [True, False])
def test_norm_linear_is_its_layers(act: str, with_residual: bool) -> None:
    parts, (x, residual) = layers(), inputs()
    norm, linear = parts["norm"], parts["linear"]
    linear.act = act
    leaves = [x, *norm.parameters(), *linear.parameters()] + [residual] * with_residual
    total = x + residual if with_residual else x
    wanted = gradients((total, linear(norm(total))), leaves)
    ours = norm_linear(norm, linear, x, residual if with_residual else None)
    assert "NormLinear" in ours[1].grad_fn.name()
    for got, want in zip(gradients(ours, leaves), wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("act", ["relu", "gelu", "gelu_tanh", "silu"])
def test_norm_mlp_is_its_layers(act: str) -> None:
    parts, (x, residual) = layers(act), inputs()
    norm, up, down = parts["norm"], parts["up"], parts["down"]
    leaves = [x, residual, *(p for part in (norm, up, down) for p in part.parameters())]
    total = x + residual
    wanted = gradients((total, down(up(norm(total)))), leaves)
    ours = norm_mlp(norm, up, down, x, residual)
    assert "NormMLP" in ours[1].grad_fn.name()
    for got, want in zip(gradients(ours, leaves), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_frozen_layers_get_no_gradient() -> None:
    parts, (x, residual) = layers(), inputs()
    for name in ("norm", "up"):
        parts[name].requires_grad_(False)
    out = norm_mlp(parts["norm"], parts["up"], parts["down"], x, residual)
    sum(o.sum() for o in out).backward()
    assert parts["up"].weight.grad is None and parts["norm"].bias.grad is None
    assert parts["down"].weight.grad is not None and x.grad is not None


def test_only_the_sum_may_be_used() -> None:
    parts, (x, residual) = layers(), inputs()
    norm_mlp(parts["norm"], parts["up"], parts["down"], x, residual)[0].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and torch.equal(residual.grad, x.grad)
    assert parts["up"].weight.grad is None


@pytest.mark.parametrize("change", ["hook", "wrapper", "no gradient", "other dtype", "reference"])
def test_what_is_not_plain_goes_layer_by_layer(change: str) -> None:
    parts, (x, residual) = layers(dtype=torch.float32), inputs(torch.float32)
    seen: list[str] = []
    linear = parts["linear"]
    if change == "hook":
        linear.register_forward_hook(lambda *_: seen.append("hook"))
    if change == "wrapper":
        parts["linear"] = torch.nn.Sequential(linear)
    if change == "other dtype":
        x = x.detach().bfloat16()
    with torch.set_grad_enabled(change != "no gradient"):
        name = "torch" if change == "reference" else "auto"
        with pyfast.using(name):
            out = norm_linear(parts["norm"], parts["linear"], x, residual)[1]
    assert out.grad_fn is None or "NormLinear" not in out.grad_fn.name()
    assert seen == ["hook"] * (change == "hook")


def test_double_backward_is_refused_in_words() -> None:
    parts, (x, residual) = layers(), inputs()
    out = norm_linear(parts["norm"], parts["linear"], x, residual)[1]
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="norm_linear: order of the derivative must be 1"):
        grad.sum().backward()


def test_a_block_keeps_ten_tensors() -> None:
    config = GPTConfig(vocab_size=50, n_positions=64, n_embd=64, n_layer=3, n_head=2)
    model = models.build(config)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    tokens = torch.randint(50, (2, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.hidden(tokens)
    unit = tokens.numel() * config.n_embd * 4
    assert sum(kept.values()) < (10.3 * config.n_layer + 2) * unit  # 0.3: statistics of rows


def test_layers_together_follow_autocast_as_each_alone():
    norm, linear, x = nn.LayerNorm(8), nn.Conv1D(8, 8), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        total, out = norm_linear(norm, linear, x, None)
        assert out.dtype == torch.bfloat16 and total.dtype == torch.float32
        assert torch.equal(out, linear(norm(x)))
