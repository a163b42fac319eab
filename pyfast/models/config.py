"""Model configurations: frozen dataclasses with the keys of Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

# Hugging Face's activation names -> ours.
_HF_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "leaky_relu": "leaky_relu",
    "mish": "mish",
}
_ROPE_TYPES = {  # kind -> the numbers it needs
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


@dataclass(frozen=True)
class GPTConfig:
    """GPT-2's architecture; the defaults are the 124M model. There is no dropout: see `to_dict`."""

    model_type: ClassVar[str] = "gpt2"
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # None: 4 * n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        _expect_positive(self, "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        _expect_positive(self, "layer_norm_epsilon", "initializer_range", kind=(int, float))
        if self.n_inner is not None:
            _expect_positive(self, "n_inner")
        _expect_divides(self, "n_head", "n_embd")
        if self.activation_function not in _HF_ACTIVATIONS:
            names = ", ".join(_HF_ACTIVATIONS)
            raise ValueError(
                f"GPTConfig: activation_function must be one of {names}; "
                f"got {self.activation_function!r}"
            )

    @property
    def act(self) -> str:
        """pyfast's name of `activation_function`."""
        return _HF_ACTIVATIONS[self.activation_function]

    @property
    def max_positions(self) -> int:
        """The most tokens in one sequence."""
        return self.n_positions

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPTConfig:
        """From the contents of a config.json, ignoring keys that do not change the architecture."""
        _refuse(cls, values, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
        _refuse(cls, values, add_cross_attention=False)
        return cls(**_known(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json. Dropout is written as 0: other readers then train alike."""
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return {"model_type": self.model_type, **dataclasses.asdict(self), **dropout}


@dataclass(frozen=True)
class LlamaConfig:
    """Llama's architecture; the defaults are those of Hugging Face (7B)."""

    model_type: ClassVar[str] = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: num_attention_heads (no grouping)
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # {"rope_type": "linear" or "llama3", ...}
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        _expect_positive(self, *sizes, "num_attention_heads", "max_position_embeddings")
        numbers = ("rms_norm_eps", "initializer_range", "rope_theta")
        _expect_positive(self, *numbers, kind=(int, float))
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            _expect_divides(self, "num_attention_heads", "hidden_size")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _expect_positive(self, "num_key_value_heads", "head_dim")
        _expect_divides(self, "num_key_value_heads", "num_attention_heads")
        if self.head_dim % 2:
            raise ValueError(f"LlamaConfig: head_dim must be even; got {self.head_dim}")
        if self.hidden_act not in ("silu", "swish"):
            raise ValueError(f"LlamaConfig: hidden_act must be silu; got {self.hidden_act!r}")
        self._expect_rope()

    @property
    def max_positions(self) -> int:
        """The most tokens in one sequence."""
        return self.max_position_embeddings

    @property
    def rope_type(self) -> str:
        """The kind of frequency scaling: "default", "linear" or "llama3"."""
        scaling = self.rope_scaling or {}
        return scaling.get("rope_type", scaling.get("type", "default"))

    def _expect_rope(self) -> None:
        if self.rope_type not in _ROPE_TYPES:
            kinds = ", ".join(_ROPE_TYPES)
            got = self.rope_type
            raise ValueError(f"LlamaConfig: rope_type must be one of {kinds}; got {got!r}")
        for key in _ROPE_TYPES[self.rope_type]:
            value = self.rope_scaling.get(key)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"LlamaConfig: rope {key} must be a number > 0; got {value!r}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LlamaConfig:
        """From the contents of a config.json, ignoring keys that do not change the architecture.

        RoPE is read from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).
        """
        known = _known(cls, values)
        rope = dict(values.get("rope_parameters") or {})
        _refuse(cls, rope, partial_rotary_factor=1.0)
        if rope:
            known["rope_theta"] = rope.pop("rope_theta", known.get("rope_theta", cls.rope_theta))
            known["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json, with RoPE spelled for transformers 4 and 5."""
        rope = {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta}
        return {"model_type": self.model_type, **dataclasses.asdict(self), "rope_parameters": rope}


ModelConfig = GPTConfig | LlamaConfig


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """The configuration in the contents of a Hugging Face config.json; `model_type` decides."""
    kinds = {kind.model_type: kind for kind in (GPTConfig, LlamaConfig)}
    model_type = values.get("model_type")
    if model_type not in kinds:
        names = ", ".join(kinds)
        raise ValueError(f"config: model_type must be one of {names}; got {model_type!r}")
    return kinds[model_type].from_dict(values)


def _known(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if name in names}


def _refuse(cls: type, values: dict[str, Any], **supported: Any) -> None:
    """Settings that change the architecture and that exist here in one form only."""
    for name, only in supported.items():
        if values.get(name, only) != only:
            raise ValueError(f"{cls.__name__}: {name} must be {only}; got {values[name]!r}")


def _expect_positive(config: Any, *names: str, kind: type | tuple[type, ...] = int) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < math.inf:
            what = "a positive integer" if kind is int else "a positive number"
            raise ValueError(f"{type(config).__name__}: {name} must be {what}; got {value!r}")


def _expect_divides(config: Any, part: str, whole: str) -> None:
    if getattr(config, whole) % getattr(config, part):
        raise ValueError(
            f"{type(config).__name__}: {part} must divide {whole}={getattr(config, whole)}; "
            f"got {getattr(config, part)}"
        )
