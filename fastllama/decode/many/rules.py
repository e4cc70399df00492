"""Rules: how the tokens of a prompt are chosen and when it ends, as the parent's `generate` would have it."""

import copy
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from fastllama.decode import together
from fastllama.decode.assisted.processing import Processing
from fastllama.decode.cache_name import CACHE_NAMES
from fastllama.decode.sampling import call as sampling_call
from fastllama.decode.sampling.options import Sampling
from fastllama.decode.support import call_obstacle

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_NEVER: tuple[str, ...] = (
    "streamer",
    "assistant_model",
    "inputs",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
)
_NEVER += (*CACHE_NAMES, "custom_generate", "synced_gpus", "token_healing")


class Rules(NamedTuple):
    """What the parent made of a call's arguments for one prompt.

    `criteria` are those beside a length and an end of text. `most_new`: the limit of the row. `by_row`: whether a
    processor looks at more than the scores, or is this row's alone.
    """

    processors: Any  # a LogitsProcessorList, whose annotations ask for a class of tensors that none is of
    by_row: bool
    do_sample: bool
    eos: frozenset[int]
    criteria: tuple
    most_new: int


class Asked:
    """A call's arguments: the parent's own `generate` is asked what they mean for each prompt, and runs nothing.

    `limits`: most new tokens of each prompt, None where the generation config says it. `sampling` has a row for each
    prompt. Raises `ValueError` for what
    the fast path cannot do.
    """

    def __init__(
        self,
        model: nn.Module,
        generation_config: GenerationConfig | None,
        arguments: dict,
        limits: list[int | None],
        sampling: Sampling | None = None,
    ):
        self.model, self.sampling = model, sampling
        if sampling is not None and sampling.rows not in (None, len(limits)):
            raise ValueError(f"sampling has options for {sampling.rows} rows, and there are {len(limits)} prompts")
        given = next((name for name in _NEVER if arguments.get(name) not in (None, False)), None)
        if given is not None:
            raise ValueError(f"generate_many cannot run: {given} is for one prompt at a time")
        self.config, self.arguments = copy.deepcopy(generation_config), dict(arguments)
        self._move_stop_strings()
        most = max((limit for limit in limits if limit is not None), default=None)
        self._probe = self._of(0, [0], most)
        # What looks at neither ids nor lengths is the same for all prompts.
        self._alike = sampling is None and most is not None and not self._probe.criteria and not self._probe.by_row

    def rules(self, index: int, ids: list[int], most_new: int | None) -> Rules:
        """Of a prompt. `most_new` None: as the generation config says. `ValueError` where the parent refuses it."""
        if self._alike and most_new is not None:
            return self._probe._replace(most_new=most_new)
        return self._of(index, ids, most_new)

    def _move_stop_strings(self) -> None:
        # The parent drops the tokenizer on the way to a caller's own decoding.
        tokenizer = self.arguments.pop("tokenizer", None)
        strings = self.arguments.pop("stop_strings", None)
        if strings is None and self.config is not None:
            strings, self.config.stop_strings = self.config.stop_strings, None
        if strings is None:
            return
        if tokenizer is None:
            raise ValueError("stop_strings need the model's tokenizer: pass tokenizer=...")
        criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)
        self.arguments["stopping_criteria"] = [*(self.arguments.get("stopping_criteria") or []), criterion]

    def _of(self, index: int, ids: list[int], most_new: int | None) -> Rules:
        found: dict[str, Any] = {}

        def note(model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **inputs):
            found.update(processors=logits_processor, criteria=stopping_criteria, config=generation_config)
            found["inputs"] = inputs
            return input_ids

        arguments, config = dict(self.arguments), self.config
        if most_new is not None and config is not None:
            config = copy.deepcopy(config)
            config.max_new_tokens = most_new
        elif most_new is not None:
            arguments["max_new_tokens"] = most_new
        if self.sampling is not None:
            own = self.sampling.of_row(index)
            arguments = sampling_call.arguments(self.model, own, (), arguments | {"generation_config": config})
            config = arguments.pop("generation_config")
        input_ids = torch.tensor([ids], device=self.model.device)
        mask = torch.ones_like(input_ids)  # else the parent would take a pad token within a prompt for padding
        GenerationMixin.generate(self.model, input_ids, config, attention_mask=mask, custom_generate=note, **arguments)
        self._require(found["config"], found["inputs"])
        sampling_call.begin(found["processors"], input_ids, None)
        eos, others = set(), []
        for criterion in found["criteria"]:
            if type(criterion) is EosTokenCriteria:
                eos.update(criterion.eos_token_id.reshape(-1).tolist())
            elif type(criterion) is not MaxLengthCriteria:
                others.append(criterion)
        processing = Processing(found["processors"], self.model.device)
        return Rules(
            found["processors"],
            self.sampling is not None or len(processing.warpers) != len(processing.all),
            bool(found["config"].do_sample),
            frozenset(eos),
            tuple(others),
            found["criteria"].max_length - len(ids),
        )

    def _require(self, config: GenerationConfig, inputs: dict) -> None:
        together.require(self.model, config)
        obstacle, mode = None, config.get_generation_mode()
        if mode not in _MODES:
            obstacle = f"the decoding mode is {mode.value.replace('_', ' ')}"
        elif config.num_return_sequences not in (None, 1):
            obstacle = f"num_return_sequences is {config.num_return_sequences}: give the prompt as often"
        elif config.token_healing:
            obstacle = "token_healing is on"
        elif config.return_dict_in_generate:
            obstacle = "return_dict_in_generate is on"
        inputs = {name: value for name, value in inputs.items() if name not in ("attention_mask", *CACHE_NAMES)}
        obstacle = obstacle or call_obstacle(self.model, config, False, inputs)
        if obstacle is not None:
            raise ValueError(f"generate_many cannot run: {obstacle}")
