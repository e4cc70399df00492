"""The suite: every claim as a line with a bound."""
