"""Preallocated keys, values and attention mask; the only floor that touches cache storage."""
