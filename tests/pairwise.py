"""Few cases of a product: every pair of values of any two factors meets in them, or every value is in one."""

from itertools import combinations, product


def pairwise(factors: dict[str, list]) -> list[dict]:
    """Cases (name -> value), greedily chosen until every pair of values has met; deterministic."""
    return _covering(factors, 2)


def each_value(factors: dict[str, list]) -> list[dict]:
    """As many cases as the longest factor has values, for what takes a compiler a quarter of a minute."""
    return _covering(factors, 1)


def _covering(factors: dict[str, list], together: int) -> list[dict]:
    names = list(factors)
    everything = [dict(zip(names, values, strict=True)) for values in product(*factors.values())]
    missing = set().union(*(_subsets(case, together) for case in everything))
    chosen = []
    while missing:
        best = max(everything, key=lambda case: len(_subsets(case, together) & missing))
        missing -= _subsets(best, together)
        chosen.append(best)
    return chosen


def _subsets(case: dict, size: int) -> set:
    return set(combinations(case.items(), size))
