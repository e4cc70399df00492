"""What is known of the quality of small weights and caches: the scores that the repository keeps."""

from dataclasses import dataclass
from pathlib import Path

from fastllama.kernels.small_weights import canonical
from fastllama.lab.quality import score_file


@dataclass(frozen=True)
class Quality:
    """A score of `model`: perplexity and its reference's, and the mean KL divergence in nats."""

    model: str
    perplexity: float
    reference_perplexity: float
    mean_kl: float


class Known:
    """Scores by model and switches; of one scored twice, the later line counts."""

    def __init__(self, lines: list[dict]):
        self._scores: dict[tuple, Quality] = {}
        for line in lines:
            score = line["score"]
            found = Quality(line["model"], score["perplexity"], score["reference_perplexity"], score["mean_kl"])
            self._scores[_key(line["model"], line["switches"])] = found

    def of(self, model: str, switches: dict) -> Quality | None:
        """The score of these switches on this model, or else on the demo; None where neither was measured."""
        return self._scores.get(_key(model, switches)) or self._scores.get(_key("demo", switches))


def _key(model: str, switches: dict) -> tuple:
    weights = switches.get("weights")
    return model, weights and canonical(weights), switches.get("cache_k"), switches.get("cache_v")


def read(root: Path) -> Known:
    """The scores in a repository. Raises `ValueError` naming the file and the line that is none."""
    return Known([line for lines in score_file.kept(root).values() for line in lines])


def words(found: Quality | None) -> str:
    """A score for people."""
    if found is None:
        return "not measured"
    change = found.perplexity / found.reference_perplexity - 1
    return f"{found.model}: {change:+.2%} perplexity, KL {found.mean_kl:.2g}"
