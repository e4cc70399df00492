"""Pairwise coverage: few cases in which every pair of values of any two factors meets."""

from itertools import combinations, product


def pairwise(factors: dict[str, list]) -> list[dict]:
    """Cases (name -> value), greedily chosen until every pair of values has met; deterministic."""
    names = list(factors)
    everything = [dict(zip(names, values, strict=True)) for values in product(*factors.values())]
    missing = set().union(*(_pairs(case) for case in everything))
    chosen = []
    while missing:
        best = max(everything, key=lambda case: len(_pairs(case) & missing))
        missing -= _pairs(best)
        chosen.append(best)
    return chosen


def _pairs(case: dict) -> set:
    return set(combinations(case.items(), 2))
