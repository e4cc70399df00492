"""Samplers as their sources describe them, one row and one token at a time: what the fast ones must do."""

import math
from itertools import pairwise

OUT = -math.inf


def softmax(logits):
    top = max(logits)
    powers = [math.exp(logit - top) for logit in logits]
    return [power / sum(powers) for power in powers]


class LlamaCpp:
    """A row's candidates as llama.cpp moves them: (logit, id), best first. What is -inf at first is no candidate."""

    def __init__(self, logits, min_keep=1):
        self.size, self.min_keep = len(logits), min_keep
        self.all = [(logit, id) for id, logit in enumerate(logits) if logit > OUT]
        self.sort()

    def sort(self):
        self.all.sort(key=lambda candidate: -candidate[0])  # stable

    def p(self):
        return softmax([logit for logit, _ in self.all])

    def top_k(self, k):
        if k <= 0:
            return
        self.all = self.all[: max(k, self.min_keep)]

    def top_p(self, p):
        if p >= 1:
            return
        total = 0.0
        for place, share in enumerate(self.p()):
            total += share
            if total >= p and place + 1 >= self.min_keep:
                self.all = self.all[: place + 1]
                return

    def min_p(self, p):
        if p <= 0:
            return
        least = self.all[0][0] + math.log(p)
        self.all = [c for place, c in enumerate(self.all) if c[0] >= least or place < self.min_keep]

    def tfs_z(self, z):
        if z >= 1 or len(self.all) <= 2:
            return
        p = self.p()
        slope = [a - b for a, b in pairwise(p)]
        bend = [abs(a - b) for a, b in pairwise(slope)]
        total = sum(bend)
        bend = [b / total for b in bend] if total > 1e-6 else [1 / len(bend)] * len(bend)
        spent = 0.0
        for place, b in enumerate(bend):
            spent += b
            if spent > z and place >= self.min_keep:
                self.all = self.all[:place]
                return

    def typical_p(self, p):
        if p >= 1:
            return
        shares = self.p()
        entropy = -sum(share * math.log(share) for share in shares if share > 0)
        far = [abs(-math.log(share) - entropy) if share > 0 else math.inf for share in shares]
        order = sorted(range(len(far)), key=far.__getitem__)
        total, kept = 0.0, []
        for place, index in enumerate(order):
            total += shares[index]
            kept.append(index)
            if total > p and place >= self.min_keep - 1:
                break
        self.all = [self.all[index] for index in kept]
        self.sort()

    def temperature(self, temperature):
        self.all = [(logit / temperature, id) for logit, id in self.all]

    def mirostat_1(self, mu):
        p = self.p()
        above = below = 0.0
        for i in range(min(100 - 1, len(p) - 1)):
            t, b = math.log((i + 2) / (i + 1)), math.log(p[i] / p[i + 1])
            above, below = above + t * b, below + t * t
        s = above / below
        e = s - 1
        k = ((e * 2**mu) / (1 - self.size**-e)) ** (1 / s)
        self.all = self.all[: max(int(min(k, self.size)), 1)]

    def mirostat_2(self, mu):
        kept = next((place for place, p in enumerate(self.p()) if -math.log2(p) > mu), len(self.all))
        self.all = self.all[: max(kept, 1)]

    def surprise(self, id):
        return -math.log2(self.p()[[i for _, i in self.all].index(id)])

    def scores(self):
        out = [OUT] * self.size
        for logit, id in self.all:
            out[id] = logit
        return out


def penalised(logits, ids, repeat=1.0, last_n=-1, frequency=0.0, presence=0.0, zero_divides=False):
    """`ids` are a row's real tokens so far."""
    recent = ids if last_n < 0 else ids[len(ids) - min(last_n, len(ids)) :]
    out = list(logits)
    for id in set(recent):
        multiplies = out[id] < 0 if zero_divides else out[id] <= 0
        out[id] = out[id] * repeat if multiplies else out[id] / repeat
        out[id] -= recent.count(id) * frequency + presence
    return out


class Transformers:
    """A row's scores as transformers' warpers change them."""

    def __init__(self, logits, min_keep=1):
        self.scores, self.min_keep = list(logits), min_keep

    def _keep(self, condition):
        self.scores = [score if condition(id) else OUT for id, score in enumerate(self.scores)]

    def temperature(self, temperature):
        self.scores = [score / temperature for score in self.scores]

    def top_k(self, k):
        if k <= 0:
            return
        least = sorted(self.scores, reverse=True)[min(max(k, self.min_keep), len(self.scores)) - 1]
        self._keep(lambda id, scores=self.scores: scores[id] >= least)

    def top_p(self, p):
        if p >= 1:
            return
        order = sorted(range(len(self.scores)), key=self.scores.__getitem__)
        shares, total, out = softmax(self.scores), 0.0, set()
        for place, id in enumerate(order):
            total += shares[id]
            if total <= 1 - p and place < len(order) - self.min_keep:
                out.add(id)
        self._keep(lambda id: id not in out)

    def min_p(self, p):
        shares = softmax(self.scores)
        spared = sorted(range(len(shares)), key=lambda id: -shares[id])[: self.min_keep]
        self._keep(lambda id: shares[id] >= p * max(shares) or id in spared)

    def typical_p(self, p):
        if p >= 1:
            return
        shares = softmax(self.scores)
        entropy = -sum(share * math.log(share) for share in shares if share > 0)
        far = [abs(-math.log(share) - entropy) if share > 0 else math.inf for share in shares]
        order = sorted(range(len(far)), key=far.__getitem__)
        total, last = 0.0, 0
        for id in order:
            total += shares[id]
            if total >= p:
                break
            last += 1
        line = far[order[min(last, len(order) - 1)]]
        spared = order[: self.min_keep]
        self._keep(lambda id: far[id] <= line or id in spared)


_MASK = 2**64 - 1


def splitmix64(state):
    """(next state, number)"""
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return state, z ^ (z >> 31)


def uniform(seed, counter):
    """Number `counter` of the stream that begins at splitmix64's first number for the seed."""
    state = splitmix64(seed & _MASK)[1]
    for _ in range(counter + 1):
        state, number = splitmix64(state)
    return (number >> 11) / 2**53
