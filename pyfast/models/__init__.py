"""Decoders in Hugging Face's parameter layout, built from pyfast's layers."""

from pyfast.models.cache import KVCache
from pyfast.models.causal_lm import CausalLM
from pyfast.models.checkpoint import build, load, load_tensors, read_config, save
from pyfast.models.classifier import SequenceClassifier
from pyfast.models.config import GPTConfig, LlamaConfig, ModelConfig, config_from_dict
from pyfast.models.generate import generate, sample, stream
from pyfast.models.gpt import GPT
from pyfast.models.llama import Llama

__all__ = [
    "GPT",
    "CausalLM",
    "GPTConfig",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "ModelConfig",
    "SequenceClassifier",
    "build",
    "config_from_dict",
    "generate",
    "load",
    "load_tensors",
    "read_config",
    "sample",
    "save",
    "stream",
]
