"""pyfast.nn: each layer against its twin in torch.nn, values, gradients and state dicts."""

import copy

import pytest
import torch
import torch.nn.functional as F

import pyfast
from pyfast import nn
from pyfast.tolerance import assert_as_good_as_torch


def twins(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Give both the same parameters, by way of both directions of the state dict."""
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


def compare(ours, theirs, *inputs, theirs_forward=None) -> None:
    """Output and all gradients of `ours` are as good as those of its torch twin."""
    run = theirs_forward or (lambda module, *args: module(*args))
    results = []
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    for module, forward, arguments in (
        (ours, lambda module, *args: module(*args), inputs),
        (theirs, run, inputs),
        (copy.deepcopy(theirs).double(), run, wide),
    ):
        module.zero_grad()
        leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in arguments]
        out = forward(module, *leaves)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
        (out * weight.to(out.dtype)).sum().backward()
        grads = [t.grad for t in leaves if t.requires_grad]
        results.append([out.detach(), *grads, *(p.grad.clone() for p in module.parameters())])
    for i, (mine, torchs, truth) in enumerate(zip(*results, strict=True)):
        assert mine.dtype == inputs[0].dtype
        assert_as_good_as_torch(f"result {i}", mine, torchs, truth)


@pytest.mark.parametrize("act", nn.ACTIVATIONS)
def test_linear_equals_torch_linear_and_activation(act):
    torch.manual_seed(0)
    plain = {
        "none": lambda v: v,
        "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
    }
    ours, theirs = nn.Linear(19, 33, act=act), torch.nn.Linear(19, 33)  # odd: no whole vectors
    twins(ours, theirs)
    activate = plain.get(act) or getattr(F, act)
    compare(ours, theirs, torch.randn(3, 5, 19), theirs_forward=lambda m, x: activate(m(x)))


@pytest.mark.parametrize(
    "shape", [(7,), (0, 7), (1, 7), (2, 1, 3, 7)]
)  # vector, empty, one row, 4-D
@pytest.mark.parametrize("bias", [True, False])
def test_linear_takes_the_shapes_torch_takes(shape, bias):
    ours, theirs = nn.Linear(7, 5, bias=bias), torch.nn.Linear(7, 5, bias=bias)
    twins(ours, theirs)
    x = torch.randn(shape)
    torch.testing.assert_close(ours(x), theirs(x))
    assert isinstance(ours, torch.nn.Linear)


def test_linear_takes_strided_input():
    ours, theirs = nn.Linear(6, 4), torch.nn.Linear(6, 4)
    twins(ours, theirs)
    compare(ours, theirs, torch.randn(6, 5).t())


def test_linear_names_the_activations_it_knows():
    with pytest.raises(ValueError, match=r"Linear: act must be one of none, relu.*got 'geglu'"):
        nn.Linear(3, 3, act="geglu")


def test_linear_works_after_a_class_swap():
    layer, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    expected = layer(x)
    layer.__class__ = nn.Linear
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("act", ["none", "gelu_tanh"])
def test_conv1d_equals_hugging_face(act):
    transformers = pytest.importorskip("transformers")
    ours, theirs = nn.Conv1D(13, 9, act=act), transformers.pytorch_utils.Conv1D(13, 9)
    twins(ours, theirs)
    activate = (lambda v: v) if act == "none" else (lambda v: F.gelu(v, approximate="tanh"))
    compare(ours, theirs, torch.randn(2, 3, 9), theirs_forward=lambda m, x: activate(m(x)))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 1e-2}],
    ids=str,
)
def test_layer_norm_equals_torch(arguments):
    ours, theirs = nn.LayerNorm((3, 7), **arguments), torch.nn.LayerNorm((3, 7), **arguments)
    for param in theirs.parameters():
        torch.nn.init.normal_(param)
    twins(ours, theirs)
    compare(ours, theirs, torch.randn(4, 3, 7))


@pytest.mark.parametrize("arguments", [{}, {"elementwise_affine": False}, {"eps": 1e-2}], ids=str)
def test_rms_norm_equals_torch(arguments):
    ours, theirs = nn.RMSNorm(21, **arguments), torch.nn.RMSNorm(21, **arguments)
    for param in theirs.parameters():
        torch.nn.init.normal_(param)
    twins(ours, theirs)
    compare(ours, theirs, torch.randn(4, 3, 21))


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_norm_returns_the_sum_it_normalised(kind):
    ours, theirs = getattr(nn, kind)(10), getattr(torch.nn, kind)(10)
    x, residual = torch.randn(3, 10), torch.randn(3, 10)
    total, normed = ours(x, residual=residual)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed, theirs(x + residual))


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_norm_takes_mixed_dtypes(kind):
    ours, theirs = getattr(nn, kind)(10), getattr(torch.nn, kind)(10)  # float32 weights
    x, stream = torch.randn(3, 10).bfloat16(), torch.randn(3, 10)
    assert ours(x).dtype == torch.bfloat16
    torch.testing.assert_close(ours(x), theirs(x.float()).bfloat16())
    total, normed = ours(x, residual=stream)
    assert total.dtype == normed.dtype == torch.float32
    torch.testing.assert_close(total, x + stream)


CROSS_ENTROPY = [
    {},
    {"reduction": "sum"},
    {"reduction": "none", "ignore_index": 3},
    {"label_smoothing": 0.1},
    {"size_average": False},  # torch's deprecated spelling of reduction="sum"
]


@pytest.mark.parametrize("arguments", CROSS_ENTROPY, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.filterwarnings("ignore:size_average")
def test_cross_entropy_loss_equals_torch(arguments, weighted):
    torch.manual_seed(1)
    weight = torch.rand(11) if weighted else None
    ours = nn.CrossEntropyLoss(weight, **arguments)
    theirs = torch.nn.CrossEntropyLoss(weight, **arguments)
    twins(ours, theirs)
    logits, target = torch.randn(9, 11), torch.randint(11, (9,))
    target[4] = -100 if "ignore_index" not in arguments else 3
    compare(ours, theirs, logits, target)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 5, 3), (2, 5, 3, 2)])  # classes: dim 1
def test_cross_entropy_loss_takes_the_shapes_torch_takes(shape):
    logits = torch.randn(shape)
    target = torch.randint(5, shape[:1] + shape[2:] if len(shape) > 1 else ())
    ours, theirs = nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss()
    torch.testing.assert_close(ours(logits, target), theirs(logits, target))


def test_cross_entropy_loss_takes_probabilities():
    logits, target = torch.randn(4, 5), torch.rand(4, 5).softmax(-1)
    ours = nn.CrossEntropyLoss(label_smoothing=0.2, loss_dtype=torch.float64)
    theirs = torch.nn.CrossEntropyLoss(label_smoothing=0.2)
    assert ours(logits, target).dtype == torch.float64
    torch.testing.assert_close(ours(logits, target).float(), theirs(logits, target))


def test_cross_entropy_loss_in_float32_of_bfloat16_logits():
    logits, target = torch.randn(4, 5).bfloat16(), torch.randint(5, (4,))
    loss = nn.CrossEntropyLoss(loss_dtype=torch.float32)(logits, target)
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), target))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bias": True, "reduction": "sum", "ignore_index": 2},
        {"reduction": "none", "label_smoothing": 0.1},
        {"weight": torch.linspace(0.5, 1.5, 11), "bias": True},
        {"options": torch.nn.LinearCrossEntropyOptions()},
    ],
    ids=lambda arguments: ",".join(arguments) or "plain",
)
def test_linear_cross_entropy_loss_equals_torch(arguments):
    torch.manual_seed(2)
    ours = nn.LinearCrossEntropyLoss(7, 11, **arguments)
    theirs = torch.nn.LinearCrossEntropyLoss(7, 11, **{**arguments, "options": None})
    twins(ours, theirs)
    target = torch.randint(11, (13,))
    target[5] = arguments.get("ignore_index", -100)
    compare(ours, theirs, torch.randn(13, 7), target)


def test_linear_cross_entropy_loss_takes_torchs_other_targets():
    ours = nn.LinearCrossEntropyLoss(5, 10, out_features=(4, 3))
    theirs = torch.nn.LinearCrossEntropyLoss(5, 10, out_features=(4, 3))
    twins(ours, theirs)
    x = torch.randn(2, 5)
    for target in (torch.randint(10, (2, 4, 3)), torch.randn(2, 10, 4, 3).softmax(1)):
        torch.testing.assert_close(ours(x, target), theirs(x, target))
    single, row = nn.LinearCrossEntropyLoss(5, 10), torch.randn(5)
    expected = F.cross_entropy(single.linear(row), torch.tensor(3))
    torch.testing.assert_close(single(row, torch.tensor(3)), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_causal_self_attention_equals_multihead_attention(bias):
    torch.manual_seed(3)
    ours = nn.CausalSelfAttention(24, 3, bias=bias)
    theirs = torch.nn.MultiheadAttention(24, 3, bias=bias, batch_first=True)
    twins(ours, theirs)
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1)  # torch: True hides

    def forward(module, x):
        return module(x, x, x, attn_mask=mask, need_weights=False)[0]

    compare(ours, theirs, torch.randn(2, 7, 24), theirs_forward=forward)


def test_causal_self_attention_needs_whole_heads():
    with pytest.raises(ValueError, match="num_heads must divide embed_dim=24; got 5"):
        nn.CausalSelfAttention(24, 5)


class PlainSwiGLU(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = torch.nn.Linear(9, 15)
        self.up_proj = torch.nn.Linear(9, 15)
        self.down_proj = torch.nn.Linear(15, 9)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def test_swiglu_equals_its_formula():
    ours, theirs = nn.SwiGLU(9, 15, bias=True), PlainSwiGLU()
    twins(ours, theirs)
    compare(ours, theirs, torch.randn(4, 9))


def test_swiglu_does_not_bypass_a_wrapper_or_a_hook():
    class Doubled(torch.nn.Module):  # as LoRA does it: a wrapper that still shows `.weight`
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

        def forward(self, x):
            return 2 * self.inner(x)

    layer, x = nn.SwiGLU(9, 15), torch.randn(4, 9)
    expected = layer.down_proj(F.silu(2 * layer.gate_proj(x)) * layer.up_proj(x))
    hook = layer.gate_proj.register_forward_hook(lambda module, args, out: 2 * out)
    torch.testing.assert_close(layer(x), expected)
    hook.remove()
    layer.gate_proj = Doubled(layer.gate_proj)
    torch.testing.assert_close(layer(x), expected)


def test_layers_compile_without_graph_breaks():
    stack = torch.nn.Sequential(nn.Linear(8, 8, act="gelu"), nn.LayerNorm(8), nn.RMSNorm(8))
    x = torch.randn(3, 8)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), stack(x))


def test_layers_are_built_from_pyfast_operations(monkeypatch):
    called = []
    for name in ("linear_act", "layer_norm", "rms_norm", "cross_entropy"):
        real = getattr(pyfast, name)

        def spy(*args, _real=real, _name=name, **kwargs):
            called.append(_name)
            return _real(*args, **kwargs)

        monkeypatch.setattr(pyfast, name, spy)
    x = nn.RMSNorm(4)(nn.LayerNorm(4)(nn.Linear(4, 4)(torch.randn(2, 4))))
    nn.CrossEntropyLoss()(x, torch.tensor([1, 2]))
    assert called == ["linear_act", "layer_norm", "rms_norm", "cross_entropy"]
