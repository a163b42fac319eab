"""What others do to layers and optimizers of torch, done to ours: they notice nothing."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pyfast
from pyfast import backend, models, nn, optim, testing
from pyfast.testing import Case
from tests.run_case import cotangent

FIRST = [testing.cases(op)[0] for op in backend.OPS]
CONFIG = models.GPTConfig(vocab_size=61, n_positions=16, n_embd=32, n_layer=2, n_head=2)
DISTRIBUTED = """
import os, sys
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from pyfast import models, optim

dist.init_process_group("gloo")
torch.manual_seed(0)
config = models.GPTConfig(vocab_size=61, n_positions=16, n_embd=32, n_layer=2, n_head=2)
alone, model = models.build(config), models.build(config)
model.load_state_dict(alone.state_dict())
both = torch.arange(2 * 4 * 16).view(8, 16) % 61
mine = both[4 * dist.get_rank():][:4]
if sys.argv[1] == "ddp":
    wrapped = DistributedDataParallel(model)
else:
    for block in model.transformer.h:
        fully_shard(block)
    wrapped = fully_shard(model)
norms = []
for net, tokens in ((wrapped, mine), (alone, both)):
    optimizer = optim.AdamW(net.parameters(), max_norm=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(tokens).square().mean().backward()
        optimizer.step()
    norms.append(optimizer.grad_norm)
torch.testing.assert_close(*norms, rtol=1e-4, atol=0)
for (name, one), (_, two) in zip(model.named_parameters(), alone.named_parameters()):
    if not name.endswith("c_attn.bias"):  # half of it has a gradient of noise, which Adam scales up
        whole = one.detach().full_tensor() if sys.argv[1] == "fsdp2" else one
        torch.testing.assert_close(whole, two, rtol=1e-4, atol=1e-4, check_device=False)
dist.barrier()
os._exit(0)  # torch's threads may end a process by "terminate called" while it shuts down
"""


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", [case for case in FIRST if case.grads], ids=str)
def test_op_works_under_activation_checkpointing(case: Case, reentrant: bool) -> None:
    """What is saved may be unpacked once only; all of it is made again by the backward."""
    inputs = case.inputs(torch.float32)

    def gradients(wrapped: bool) -> list[Tensor]:
        leaves = [inputs[name].clone().requires_grad_() for name in case.grads]

        def run(*tensors: Tensor) -> Any:
            given = inputs | dict(zip(case.grads, tensors, strict=True))
            return getattr(pyfast, case.op)(**given)

        out = checkpoint(run, *leaves, use_reentrant=reentrant) if wrapped else run(*leaves)
        outs = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(outs, [cotangent(o) for o in outs])
        return [leaf.grad for leaf in leaves]

    for again, plain in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


@pytest.mark.parametrize("save", ["checkpoint", "save_on_cpu"])
def test_model_works_under_activation_checkpointing(save: str) -> None:
    tokens = torch.arange(32).view(2, 16)
    model = models.build(CONFIG)
    model.loss(tokens, tokens).backward()
    plain = [param.grad for param in model.parameters()]
    model.zero_grad()
    if save == "checkpoint":
        loss = checkpoint(model.loss, tokens, tokens, use_reentrant=False)
    else:
        with torch.autograd.graph.save_on_cpu():
            loss = model.loss(tokens, tokens)
    loss.backward()
    for param, expected in zip(model.parameters(), plain, strict=True):
        assert torch.equal(param.grad, expected)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_with_both_batches(kind: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "--no-python", sys.executable, "-c", DISTRIBUTED, kind],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_swiglu_notices_a_replaced_forward() -> None:
    """accelerate, offloaders and quantisers put a function over the forward of one layer."""
    layer, x = nn.SwiGLU(9, 15), torch.randn(4, 9)
    expected = layer.down_proj(F.silu(2 * layer.gate_proj(x)) * layer.up_proj(x))
    forward = layer.gate_proj.forward
    layer.gate_proj.forward = lambda x: 2 * forward(x)
    torch.testing.assert_close(layer(x), expected)


def test_gpt_notices_a_replaced_forward() -> None:
    model, tokens = models.build(CONFIG), torch.arange(16)[None]
    before = model(tokens)
    layer = model.transformer.h[0].mlp.c_proj
    forward = layer.forward
    layer.forward = lambda x: 0 * forward(x)
    changed = model(tokens)
    assert not torch.allclose(changed, before)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), changed)


@pytest.mark.parametrize("parametrization", ["weight_norm", "orthogonal"])
def test_linear_takes_a_parametrization(parametrization: str) -> None:
    ours, theirs = nn.Linear(12, 12, act="relu"), torch.nn.Linear(12, 12)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 12)
    results = []
    for layer in (ours, theirs):
        getattr(torch.nn.utils.parametrizations, parametrization)(layer)
    theirs.load_state_dict(ours.state_dict())
    for layer in (ours, theirs):
        out = layer(x).relu()
        out.square().sum().backward()
        results.append([out.detach(), *(param.grad for param in layer.parameters())])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_norm_refuses_integers(kind: type) -> None:
    with pytest.raises(TypeError, match=r"input must be float32, .*; got torch.int64"):
        kind(8)(torch.ones(2, 8, dtype=torch.int64))


def test_causal_self_attention_refuses_a_matrix() -> None:
    with pytest.raises(ValueError, match=r"x must be \[B, T, C\]; got \[2, 8\]"):
        nn.CausalSelfAttention(8, 2)(torch.ones(2, 8))


@pytest.mark.parametrize("case", [case for case in FIRST if case.grads], ids=str)
def test_op_says_that_a_sparse_tensor_is_not_for_it(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    name = case.grads[0]
    for layout in ("to_sparse", "to_mkldnn"):
        with pytest.raises(TypeError, match=f"{case.op}: .+ must be dense; got torch"):
            getattr(pyfast, case.op)(**inputs | {name: getattr(inputs[name], layout)()})


def test_adamw_counts_its_steps_in_float32_whatever_the_default_dtype_is() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = optim.AdamW([param])
    torch.set_default_dtype(torch.bfloat16)  # where 256 + 1 is 256
    try:
        for _ in range(258):
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    step = optimizer.state[param]["step"]
    assert step.dtype == torch.float32 and step == 259
