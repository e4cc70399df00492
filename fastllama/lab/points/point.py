"""A point: one workload on one model, and how it is to be run and measured."""

import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import fastllama
from fastllama.decode.context.choose import shifts
from fastllama.lab.points.assistance import LATER, Assistance
from fastllama.lab.points.workload import Workload

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Point:
    """Everything that a measurement needs; as JSON (`asdict`) it goes to another process and comes back.

    switches: the `FastConfig` fields that were given. Without `preallocate` transformers' own model runs, and
    of the switches only `compile` and `prefill_chunk` mean something: any other raises `ValueError`, as does a
    cache_length, or one that is too short for prompt and new tokens. With `static_cache` transformers' model
    generates from its own StaticCache, which is what reserves cache_length positions then. With `assistance` ours is
    timed assisted and unassisted, in turns. `world_size` processes hold the model together (tensor parallelism), and
    each measures this point at the same time.
    """

    model: str
    dtype: str
    device: str
    workload: Workload
    preallocate: bool = False
    switches: dict = field(default_factory=dict)
    cache_length: int | None = None
    static_cache: bool = False
    assistance: Assistance = field(default_factory=Assistance)
    runs: int = 5
    warmup: int = 2
    world_size: int = 1

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        if self.runs < 1 or self.warmup < 0:
            raise ValueError(f"runs must be at least 1 and warmup at least 0, not {self.runs} and {self.warmup}")
        if self.preallocate:
            self._config()
            if self.static_cache:
                raise ValueError("--static-cache is transformers' own cache: leave out --preallocate")
        else:
            self._require_vanilla()
        if self.world_size > 1:
            self._require_spread()
        # What shifts needs a position beside the prompt.
        new_tokens = 1 if self.preallocate and shifts(self.config) else self.workload.new_tokens
        if self.cache_length is not None and self.cache_length < self.workload.prompt_length + new_tokens:
            raise ValueError(
                f"a cache of {self.cache_length} positions is too short for a prompt of "
                f"{self.workload.prompt_length} and {self.workload.new_tokens} new tokens"
            )
        self.assistance.check(self.preallocate, self.positions, self.workload.prompt_length)

    def _require_vanilla(self) -> None:
        """Refuses what transformers' own model cannot do."""
        if self.switches.get("compile") == "native":
            raise ValueError("--compile native needs --preallocate: the native step is ours")
        if self.static_cache and self.compile != "no":
            raise ValueError("--static-cache says nothing new beside --compile, which brings a static cache")
        given = sorted(self.switches.keys() - {"compile", "prefill_chunk"})
        given += ["cache_length"] * (self.cache_length is not None and not self.static_cache)
        if given:
            flags = ", ".join(_flag(name) for name in given)
            raise ValueError(f"{flags} needs --preallocate: transformers' own model has no such switch")
        fastllama.FastConfig(**self.switches)

    def _require_spread(self) -> None:
        """Refuses what a model that is spread over processes cannot do."""
        for name, value in (("--compile", "native"), ("--products", "packed")):
            if self.switches.get(name[2:]) == value:
                raise ValueError(f"{name} {value} cannot be honoured beside --tensor-parallel: it is for one process")
        if self.weights is not None:
            raise ValueError("--weights cannot be honoured beside --tensor-parallel: whole weights are quantised")
        if self.assistance.active:
            raise ValueError("assistance cannot be honoured beside --tensor-parallel: it follows one process's clock")

    @classmethod
    def from_dict(cls, values: dict) -> "Point":
        """The point that `asdict` was taken of."""
        held = {"workload": Workload.from_dict(values["workload"]), "assistance": Assistance(**values["assistance"])}
        return cls(**{**values, **held})

    def _config(self):
        known = fastllama.FastConfig.__dataclass_fields__
        unknown = sorted(self.switches.keys() - known.keys())
        if unknown:
            raise ValueError(f"{_flag(unknown[0])} is not a switch of this version; it has {', '.join(known)}")
        return fastllama.FastConfig(**self.switches)

    @property
    def config(self):
        """The `FastConfig` of a preallocated run."""
        return self._config()

    @property
    def weights(self) -> str | None:
        """The few bits in which ours holds its weights; None for floats."""
        return self.config.weights if self.preallocate else None

    @property
    def compile(self) -> str:
        """What is compiled; "fullgraph" is another word for "static"."""
        mode = self.config.compile if self.preallocate else self.switches.get("compile", "no")
        return "static" if mode == "fullgraph" else mode

    @property
    def lossy_switches(self) -> dict:
        """The switches given that may change tokens in fp32 as well, with their values."""
        known = fastllama.FastConfig.__dataclass_fields__
        given = {name: value for name, value in self.switches.items() if not known[name].metadata["lossless"]}
        return {name: value for name, value in given.items() if value != known[name].default}

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def cache_formats(self) -> tuple[str | None, str | None]:
        """How the subject stores keys and values; None is the model's dtype."""
        return (self.config.cache_k, self.config.cache_v) if self.preallocate else (None, None)

    @property
    def contestants(self) -> tuple[str, ...]:
        """Who runs: the subject first, then what it is compared with."""
        if self.preallocate:
            return ("ours", "vanilla")
        if self.static_cache:
            return ("static", "vanilla")
        return ("vanilla",) if self.compile == "no" else ("compiled", "vanilla")

    @property
    def timed(self) -> tuple[str, ...]:
        """The contestants, and ours without its assistance where it has one."""
        return (*self.contestants, *["unassisted"] * self.assistance.active)

    @property
    def positions(self) -> int:
        """Cache positions a row reserves."""
        return self.cache_length or self.workload.total_length

    @property
    def model_name(self) -> str:
        """The model without a path: the name of its folder, or what it is called."""
        return _name(self.model)

    @property
    def name(self) -> str:
        """Its sizes, and the switches and sampler options that were given: "batch_size=8,prompt_length=128"."""
        work = asdict(self.workload)
        named = {field: work[field] for field in ("batch_size", "prompt_length", "new_tokens")}
        named |= {"static_cache": True} if self.static_cache else {}
        named |= {field: value for field, value in sorted(self.switches.items()) if field != "compile"}
        named |= self.workload.sampler.given
        named |= {field: self._assisted()[field] for field in self.assistance.given}
        return ",".join(f"{field}={value}" for field, value in named.items())

    def identity(self) -> dict:
        """What names this point in its record; transformers' own model has none of our switches."""
        config = asdict(self.config) if self.preallocate else self._of_vanilla(self.prefill_chunk, True)
        assisted = {"assisted": self._assisted()} if self.assistance.active else {}
        return {
            "model": self.model_name,
            "dtype": self.dtype,
            "device": torch.device(self.device).type,
            "batch_size": self.workload.batch_size,
            "prompt_length": self.workload.prompt_length,
            "new_tokens": self.workload.new_tokens,
            "cache_length": self.positions,
            "seed": self.workload.seed,
            "sampler": self.workload.sampler.arguments,
            "switches": {"preallocate": self.preallocate, **config, "compile": self.compile},
            **assisted,
            **({"world_size": self.world_size} if self.world_size > 1 else {}),
        }

    def _assisted(self) -> dict:
        """The options of the assistance, no path among them; those that came later only where they are given."""
        held = {
            name: value for name, value in asdict(self.assistance).items() if value is not None or name not in LATER
        }
        return {**held, "draft": None if held["draft"] is None else _name(held["draft"])}

    def switch_defaults(self) -> dict:
        """The default of each switch that `identity` names."""
        config = asdict(fastllama.FastConfig()) if self.preallocate else self._of_vanilla(None, False)
        return {"preallocate": Point.preallocate, **config, "compile": fastllama.FastConfig.compile}

    @property
    def prefill_chunk(self) -> int | None:
        """Prompt tokens per prefill pass, where that was given."""
        return self.switches.get("prefill_chunk")

    def _of_vanilla(self, prefill_chunk: int | None, static_cache: bool) -> dict:
        """Those of transformers' own switches that were given, with these values."""
        given = {"prefill_chunk": prefill_chunk} if self.prefill_chunk is not None else {}
        return given | ({"static_cache": static_cache} if self.static_cache else {})

    def command(self) -> str:
        """The command line that measures this point alone; a path is given by its last part."""
        words = ["python", "run_llama.py"]
        if self.world_size > 1:
            words = ["torchrun", "--nproc-per-node", str(self.world_size), "run_llama.py", "--tensor-parallel"]
        words += ["--model", self.model_name, "--dtype", self.dtype, "--device", self.device]
        words += ["--preallocate"] if self.preallocate else []
        words += ["--static-cache"] if self.static_cache else []
        words += ["--compile", self.compile]
        for name, value in sorted(self.switches.items()):
            if name != "compile" and value is not None and value is not False:
                words += [_flag(name)] if value is True else [_flag(name), str(value)]
        sizes = asdict(self.workload)
        del sizes["prompt_file"], sizes["sampler"]
        sizes["cache_length"] = self.cache_length
        for name, value in {**sizes, "runs": self.runs, "warmup": self.warmup}.items():
            words += [_flag(name), str(value)] if value is not None else []
        for name, value in self.workload.sampler.given.items():
            words += [_flag(name)] if value is True else [_flag(name), str(value)]
        for name in self.assistance.given:
            words += [_flag(name), str(self._assisted()[name])]
        if self.workload.prompt_file is not None:
            words += ["--prompt-file", Path(self.workload.prompt_file).name]
        return shlex.join(words)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _name(model: str) -> str:
    # A folder's path is this machine's business; its name is not.
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model
