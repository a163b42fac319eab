"""The contestant: the same GPT from torch's own layers, written the way its users write it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and MLP, each after a layer norm; [B, T, C] -> [B, T, C]."""

    def __init__(self, width: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width, eps)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)}
        )
        self.ln_2 = nn.LayerNorm(width, eps)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn["c_attn"](self.ln_1(x)).chunk(3, dim=-1)  # 3 x [B, T, C]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv)  # [B, H, T, D]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](mixed.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](hidden)


class PlainGPT(nn.Module):
    """Parameters have Hugging Face's GPT-2 names without `transformer.`; weights are [out, in]."""

    def __init__(
        self, *, vocab: int, positions: int, width: int, layers: int, heads: int, eps: float
    ):
        super().__init__()
        self.wte = nn.Embedding(vocab, width)
        self.wpe = nn.Embedding(positions, width)
        self.h = nn.ModuleList(Block(width, heads, eps) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width, eps)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy (a scalar) of targets [B, T] given tokens [B, T]."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)  # [B, T, V]
        wide = torch.promote_types(logits.dtype, torch.float32)  # as transformers does
        return F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten())

    @torch.no_grad()
    def copy_weights(self, state: dict[str, Tensor]) -> None:
        """Take the weights of a GPT-2 state dict, whose block matrices are [in, out]."""
        for name, parameter in self.named_parameters():
            source = state[f"transformer.{name}"]
            is_linear = name.startswith("h.") and parameter.dim() == 2
            parameter.copy_(source.T if is_linear else source)
