"""The demo pair, its text, and models of real sizes made from it."""

from fastllama.demo.names import configuration, is_random, resolve

__all__ = ["configuration", "is_random", "resolve"]
