"""Chances that proposed tokens stand, by how sure their proposer is of them and as the target has judged before."""

_CLASSES = 10  # of sureness, equally wide
_WEIGHT = 4.0  # of the proposer's own guess, in trials
_FORGET = 0.99  # of a class's evidence, kept from one token of that class to the next


class Chances:
    """Learns from what became of a proposer's tokens how far its guesses can be trusted.

    A guess is a number from 0 to 1: how likely a token stands after others that stood.
    """

    def __init__(self):
        self.hits, self.trials = [0.0] * _CLASSES, [0.0] * _CLASSES

    def of(self, guess: float) -> float:
        """The chance of a token of which its proposer says `guess`."""
        place = self._class(guess)
        return (self.hits[place] + _WEIGHT * guess) / (self.trials[place] + _WEIGHT)

    def learn(self, guesses: list[float], stood: int) -> None:
        """Of a row's proposals the first `stood` were right, and the next one, where there is one, was not."""
        for number, guess in enumerate(guesses[: stood + 1]):
            place = self._class(guess)
            self.trials[place] = _FORGET * self.trials[place] + 1
            self.hits[place] = _FORGET * self.hits[place] + (number < stood)

    @staticmethod
    def _class(guess: float) -> int:
        return min(int(guess * _CLASSES), _CLASSES - 1)
