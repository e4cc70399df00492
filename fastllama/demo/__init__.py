"""The demo pair, its text, and models of real sizes made from it."""

from fastllama.demo.names import is_random, resolve

__all__ = ["is_random", "resolve"]
