"""The decode step as a package that runs without the Python model code: traced, compiled ahead of time, loaded."""
