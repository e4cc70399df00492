"""Measuring a point: the contestants, the clocks, and what they are compared by."""
