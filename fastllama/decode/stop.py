"""When to stop, without making the host wait for the device."""

from collections import deque

import torch
from transformers.generation import logits_process as processors
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from fastllama.decode.sampling.processor import SamplingProcessor, StatelessSamplingProcessor

# Pure functions of (ids, scores): calling one for a step that is undone later leaves nothing behind.
_OF_TRANSFORMERS = tuple(
    getattr(processors, name)
    for name in (
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "TemperatureLogitsWarper",
        "RepetitionPenaltyLogitsProcessor",
        "TopPLogitsWarper",
        "TopKLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "NoRepeatNGramLogitsProcessor",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "SuppressTokensLogitsProcessor",
    )
    if hasattr(processors, name)
)
STATELESS = (*_OF_TRANSFORMERS, StatelessSamplingProcessor)
_LAG_ON_GPU = 2


def lag_for(device: torch.device, logits_processor, stopping_criteria, streamer, stateful_rotary: bool) -> int:
    """How many steps may be in flight behind the last stop check: 0 means that each step is checked at once.

    A stateful rotary module asks the device at each step by itself, and remembers the steps that it was shown.
    """
    if device.type != "cuda" or streamer is not None or stateful_rotary:
        return 0
    if any(type(criterion) not in (MaxLengthCriteria, EosTokenCriteria) for criterion in stopping_criteria):
        return 0
    # What a SamplingProcessor remembers is taken back with the step.
    if any(type(processor) not in (*STATELESS, SamplingProcessor) for processor in logits_processor):
        return 0
    return _LAG_ON_GPU


class StopCheck:
    """Learns whether all rows are finished, `lag` steps late; `surplus` says how many steps to undo.

    Each verdict is copied to pinned memory behind the step that made it, and read once it is `lag` steps old.
    """

    def __init__(self, lag: int, device: torch.device):
        self.lag, self.device = lag, device
        self.surplus = 0
        self._flights: deque = deque()

    def finished(self, unfinished_B: torch.Tensor) -> bool:
        """Takes this step's unfinished rows; answers for the step `lag` steps ago."""
        any_left = unfinished_B.max()
        if self.lag == 0:
            return any_left.item() == 0
        self._flights.append(self._send(any_left))
        if len(self._flights) <= self.lag:
            return False
        return self._land()

    def _land(self) -> bool:
        host, event = self._flights.popleft()
        if event is not None:
            event.synchronize()
        if host.item() == 0:
            self.surplus = len(self._flights)
            return True
        return False

    def drain(self) -> bool:
        """Reads what is still in flight, where the loop ends for its length or what follows cannot be undone.

        Returns whether all rows were finished.
        """
        while self._flights:
            if self._land():
                return True
        return False

    def _send(self, any_left: torch.Tensor):
        if self.device.type != "cuda":
            return any_left.clone(), None
        host = torch.empty((), dtype=any_left.dtype, pin_memory=True)
        with torch.cuda.device(self.device):
            host.copy_(any_left, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return host, event


class DrawState:
    """Where torch's generator stood before each recent draw, so that surplus draws can be taken back."""

    def __init__(self, lag: int, device: torch.device, do_sample: bool):
        self.active = lag > 0 and do_sample
        self.device = device
        self._states: deque = deque(maxlen=lag + 1)

    def remember(self) -> None:
        """Call before a draw."""
        if self.active:
            self._states.append(self._read())

    def undo(self, draws: int) -> None:
        """Takes the last `draws` draws back."""
        if not self.active or draws == 0:
            return
        state = self._states[-draws]
        if self.device.type == "cuda":
            _cuda_generator(self.device).set_offset(state)
        else:
            torch.set_rng_state(state)

    def _read(self):
        if self.device.type == "cuda":
            return _cuda_generator(self.device).get_offset()
        return torch.get_rng_state()


def _cuda_generator(device: torch.device) -> torch.Generator:
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]
