"""Assisted generation: tokens are proposed cheaply, and one step of the target says how many of them stand."""
