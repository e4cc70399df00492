"""Runs of several processes, and what they exchange."""
