"""Run: what is asked of one start of the command, beside how tokens are drawn, cached and drafted."""

from dataclasses import dataclass

NEW_TOKENS = 128  # where nobody says, with transformers' defaults
INTERACTIVE_LENGTH = 4096  # positions that a session reserves at most, where nobody says


@dataclass(frozen=True)
class Run:
    """`n_predict`: -1 until the text ends, -2 until the cache is full. `cache_length` 0 is the model's own.

    `seed` -1 is another one at each start.
    """

    prompt: str | None = None
    file: str | None = None
    escape: bool = False
    interactive: bool = False
    system_prompt: str | None = None
    chat_template: bool = True
    model: str = "demo"
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    no_kv_offload: bool = False
    n_predict: int | None = None
    cache_length: int | None = None
    ignore_eos: bool = False
    stop_strings: tuple[str, ...] = ()
    sequences: int = 1
    parallel: int | None = None
    defaults: str = "transformers"
    do_sample: bool = False
    seed: int = -1
    stream: bool = True
    json: bool = False
    display_prompt: bool = False
    quiet: bool = False
    debug: bool = False
    dry_run: bool = False
    from_llama_cpp: str | None = None

    @property
    def new_tokens(self) -> int:
        """`n_predict`, or what the defaults have."""
        if self.n_predict is not None:
            return self.n_predict
        return NEW_TOKENS if self.defaults == "transformers" else -1
