"""Texts longer than the cache, or than the positions that a model was made for: context shift and self-extend."""
