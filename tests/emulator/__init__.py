"""Executes compiled PTX on the CPU, with memory checks and exact counters; see README.md."""

from .module import Kernel, Module, Unsupported, Violation
from .stats import Stats

__all__ = ["Kernel", "Module", "Stats", "Unsupported", "Violation"]
