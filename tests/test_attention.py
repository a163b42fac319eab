"""Promises of attention beyond its cases: views, masks, decoding, threads, errors."""

import math

import pytest
import torch
import torch.nn.functional as F

import pyfast


def _operands(b, h, kv, tq, tk, d, dv=None, dtype=torch.float32):
    make = torch.Generator().manual_seed(0)
    shapes = ((b, h, tq, d), (b, kv, tk, d), (b, kv, tk, dv or d))
    return [torch.randn(s, generator=make).to(dtype).requires_grad_() for s in shapes]


def _close_to_torch(operands, mask=None, expected_mask=None, **modes):
    """Value and gradients against torch's in float64."""
    theirs = [t.detach().double().requires_grad_() for t in operands]
    wide = mask if expected_mask is None else expected_mask
    if wide is not None and wide.is_floating_point():
        wide = wide.detach().double().requires_grad_()
    out = pyfast.attention(*operands, mask, **modes)
    expected = F.scaled_dot_product_attention(*theirs, wide, **modes)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    trained = mask is not None and mask.requires_grad
    ours = torch.autograd.grad(
        out, [*operands, *([mask] if trained else [])], weights.to(out.dtype)
    )
    truth = torch.autograd.grad(expected, [*theirs, *([wide] if trained else [])], weights)
    for mine, true in zip((out, *ours), (expected, *truth), strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=2e-5)


def test_attention_reads_views_of_a_fused_projection():
    fused = torch.randn(2, 50, (4 + 2 + 2) * 24).view(2, 50, 8, 24).transpose(1, 2)
    q, k, v = (t.requires_grad_() for t in fused.detach().split((4, 2, 2), dim=1))
    _close_to_torch((q, k, v), is_causal=True, enable_gqa=True)
    out = pyfast.attention(q, k, v, is_causal=True, enable_gqa=True)
    assert out.transpose(1, 2).is_contiguous()  # joining the heads costs no copy


@pytest.mark.parametrize("tq", [1, 2, 6, 7])  # 6: the last that takes the path without packing
@pytest.mark.parametrize("tk", [1, 255, 2100])  # one key, one run of keys, several
def test_attention_decodes_from_a_cache(tq, tk):
    q, k, v = _operands(2, 6, 2, tq, tk, 40, 24)
    cache = torch.full((2, 2, tk + 9, 40), math.nan)  # what lies beyond must not be read
    cache[:, :, :tk] = k.detach()
    mask = torch.arange(tk) % 7 != 3
    _close_to_torch((q, cache[:, :, :tk].requires_grad_(), v), mask[None], enable_gqa=True)


# Every dimension broadcast or whole; a key more than a block, a query more than a block.
@pytest.mark.parametrize(
    "shape", [(65, 127), (1, 127), (3, 1, 127), (2, 1, 1, 127), (2, 3, 65, 127)]
)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attention_masks_broadcast(shape, kind):
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.3
    mask = keep if kind == "bool" else torch.randn(shape).masked_fill(~keep, -math.inf)
    mask = mask if kind == "bool" else mask.requires_grad_()
    _close_to_torch(_operands(2, 3, 3, 65, 127, 8), mask)


def test_attention_rows_without_keys_give_zero():
    q, k, v = _operands(1, 2, 2, 40, 60, 16)
    mask = torch.ones(40, 60, dtype=torch.bool)
    mask[7] = False
    out = pyfast.attention(q, k, v, mask)
    out.sum().backward()
    assert out[:, :, 7].eq(0).all() and q.grad[:, :, 7].eq(0).all()
    assert all(t.grad.isfinite().all() for t in (q, k, v))
    assert pyfast.attention(q, k[:, :, :0], v[:, :, :0]).eq(0).all()


def test_attention_averages_rows_masked_by_the_lowest_float():
    q, k, v = _operands(1, 1, 1, 8, 30, 4)
    mask = torch.full((8, 30), torch.finfo(torch.float32).min)
    out = pyfast.attention(q, k, v, mask)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))


def test_attention_survives_large_scores():
    q, k, v = _operands(1, 1, 1, 70, 70, 8)
    out = pyfast.attention(20 * q, 20 * k, v, is_causal=True)  # e^score is far beyond float32
    wide = [t.detach().double() for t in (20 * q, 20 * k, v)]
    expected = F.scaled_dot_product_attention(*wide, is_causal=True)
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("time", [40, 300])  # torch's operator, and the kernel
def test_attention_takes_any_scale(time, scale):
    """torch's causal kernel multiplies the -inf of its mask by the scale: NaN."""
    q, k, v = _operands(1, 2, 2, time, time, 16)
    hidden = torch.full((time, time), -math.inf, dtype=torch.float64).triu(1)
    expected = (q.double() @ k.double().mT * scale + hidden).softmax(-1) @ v.double()
    out = pyfast.attention(q, k, v, is_causal=True, scale=scale)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


# One worker per key head, and two passes over shares; keys for one round, and for several.
@pytest.mark.parametrize("sizes", [(2, 4, 2, 300, 300, 64), (1, 1, 1, 700, 1300, 64)])
def test_attention_bits_do_not_depend_on_threads(sizes):
    q, k, v = _operands(*sizes)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        out = pyfast.attention(q, k, v, is_causal=True, enable_gqa=True)
        results.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_attention_broadcasts_leading_dimensions():
    q, k, v = _operands(2, 3, 1, 9, 11, 8)
    _close_to_torch((q, k, v))  # one head of keys for all
    _close_to_torch((q[0], k.expand(2, 3, -1, -1).detach().requires_grad_(), v))
    _close_to_torch([t.detach()[0, 0].requires_grad_() for t in (q, k, v)])
    _close_to_torch([t.detach()[None, :, :, None].requires_grad_() for t in (q, k, v)])


def test_attention_refuses_what_does_not_fit():
    q, k, v = _operands(1, 4, 2, 5, 6, 8)
    cases = [
        (dict(query=q, key=k, value=v), ValueError, "key must have as many heads as query's 4"),
        (
            dict(query=q[:, :3], key=k, value=v, enable_gqa=True),
            ValueError,
            "key must have a number of heads that divides query's 3",
        ),
        (dict(query=q[:, :2], key=k, value=v[:, :, 1:]), ValueError, r"value must have Tk=6 keys"),
        (dict(query=q[:, :2], key=k[..., 1:], value=v), ValueError, "key must end in D=8"),
        (
            dict(query=q[:, :2], key=k.double(), value=v),
            TypeError,
            "key must have the dtype of query",
        ),
        (dict(query=q.long(), key=k, value=v), TypeError, "query must be float32"),
        (dict(query=q[0, 0, 0], key=k, value=v), ValueError, "query must have the dimensions"),
        (dict(dropout_p=0.1), ValueError, "dropout_p must be 0; got 0.1"),
        (
            dict(attn_mask=torch.ones(5, 7)),
            ValueError,
            r"attn_mask must broadcast to \[1, 2, 5, 6\]",
        ),
        (dict(attn_mask=torch.ones(5, 6).long()), TypeError, "attn_mask must be bool, float32"),
        (dict(attn_mask=torch.ones(5, 6), is_causal=True), ValueError, "is_causal must be False"),
    ]
    for change, error, words in cases:
        with pytest.raises(error, match=f"attention: {words}"):
            pyfast.attention(**{"query": q[:, :2], "key": k, "value": v, **change})
    wide = torch.randn(1, 1, 2, 257)
    with pytest.raises(ValueError, match="query must have a head size from 1 to 256; got 257"):
        pyfast.attention(wide, wide, wide)


def test_attention_guards_direct_calls():
    q, k, v = (t.detach() for t in _operands(1, 4, 2, 5, 6, 8))
    op, mask = torch.ops.pyfast.attention, torch.zeros(1, 1, 5, 6)
    for arguments in (
        (q[0], k, v, None),
        (q[:, :3], k, v, None),
        (q, k[:, :0], v[:, :0], None),
        (q, k, v[:, :, 1:], None),
        (q, k[..., 1:], v, None),
        (q, k, v.double(), None),
        (q.long(), k.long(), v.long(), None),
        (torch.zeros(1, 1, 5, 300), torch.zeros(1, 1, 6, 300), v[:, :1], None),
        (q, k, v, mask[..., 1:]),
        (q, k, v, mask[0]),
        (q, k, v, mask.long()),
    ):
        with pytest.raises(RuntimeError, match="attention: "):
            op(*arguments, False, 1.0)
    out, lse = op(q, k, v, None, False, 1.0)
    backward = torch.ops.pyfast.attention_backward
    for grad, saved, statistic, mask, need in (
        (out[:, :3], out, lse, None, False),
        (out, out[..., 1:], lse, None, False),
        (out, out, lse[..., 1:], None, False),
        (out, out, lse.double(), None, False),
        (out, out, lse, None, True),
        (out, out, lse, torch.ones(1, 1, 5, 6, dtype=torch.bool), True),
    ):
        with pytest.raises(RuntimeError, match="attention: "):
            backward(grad, q, k, v, saved, statistic, mask, False, 1.0, need)


def test_attention_groups_key_and_value_heads_apart():
    q, k, v = (torch.randn(2, heads, 9, 8) for heads in (8, 2, 4))
    expected = F.scaled_dot_product_attention(
        q, k.repeat_interleave(4, 1), v.repeat_interleave(2, 1), is_causal=True
    )
    got = pyfast.attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, expected)


def test_attention_takes_a_float32_mask_beside_float64():
    operands, mask = _operands(1, 2, 2, 5, 7, 8, dtype=torch.float64), torch.randn(5, 7)
    expected = F.scaled_dot_product_attention(*operands, mask.double())
    torch.testing.assert_close(pyfast.attention(*operands, mask), expected)
