"""Many points: a plan, its sweep, and what varied."""
