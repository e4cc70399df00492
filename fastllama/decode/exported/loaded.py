"""ExportedStep: a package of `fastllama.export` with a cache of its own, for people who write their own loop.

Legend: B rows of the package, R rows of a call, T padded prompt length, Q query tokens, V vocabulary.
"""

import json
from pathlib import Path

import torch

from fastllama.cache.budget import require
from fastllama.decode.exported.package import FORMAT
from fastllama.decode.prompt import unpad


def load_step(path: str | Path) -> "ExportedStep":
    """Loads a file that `fastllama.export` wrote, with a cache for it.

    Raises `ValueError` for another file, or one whose device is not there, and `MemoryError` where the cache does not
    fit.
    """
    return ExportedStep(path)


class ExportedStep:
    """What a package can be asked for: `prefill` and `step` as a model has them, on the package's own code.

    `batch_size`, `cache_length` and `vocab_size` are the package's; `valid_past_index` (int64 [B]) counts the tokens
    that each row of the cache holds.
    """

    def __init__(self, path: str | Path):
        path = Path(path).expanduser()
        if not path.is_file():
            raise ValueError(f"path={str(path)!r} cannot be loaded: there is no such file")
        try:
            self._run = torch._inductor.aoti_load_package(str(path))
            said = self._run.get_metadata()
        except Exception as fault:
            why = (str(fault).splitlines() or [type(fault).__name__])[0]
            raise ValueError(f"path={str(path)!r} cannot be loaded: {why}") from fault
        if said.get("fastllama_step") != FORMAT:
            raise ValueError(f"path={str(path)!r} is no step that this version of fastllama.export wrote")
        names = ("batch_size", "cache_length", "vocab_size", "bucket", "prefill_chunk")
        self.batch_size, self.cache_length, self.vocab_size, self._bucket, self._chunk = (int(said[n]) for n in names)
        size, layers = json.loads(said["cache_shape"]), int(said["num_layers"])
        dtype, device = getattr(torch, said["dtype"]), torch.device(said["device"])
        nbytes = 2 * layers * torch.Size(size).numel() * dtype.itemsize
        require(nbytes, device, f"a cache of {self.batch_size} x {self.cache_length} positions")
        self._keys, self._values = (
            [torch.zeros(size, dtype=dtype, device=device) for _ in range(layers)] for _ in range(2)
        )
        self._positions = torch.arange(self.cache_length, device=device)
        self.valid_past_index = torch.zeros(self.batch_size, dtype=torch.int64, device=device)
        self._rows = self._used = 0

    @torch.no_grad()
    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Starts anew with prompts [R, T]; returns the logits [R, V] after each row's last token.

        R is at most `batch_size`. Rows may be padded on the left (`attention_mask` [R, T], 0 at padding). Raises
        `ValueError` for too many rows, a row without a token, or a prompt longer than the cache.
        """
        prompt = unpad(input_ids, attention_mask)
        rows = len(input_ids)
        if rows > self.batch_size:
            raise ValueError(f"the package takes {self.batch_size} rows at most and was given {rows}")
        if prompt.longest > self.cache_length:
            raise ValueError(f"the prompt has {prompt.longest} tokens and the package's cache {self.cache_length}")
        for storage in (*self._keys, *self._values):
            storage.zero_()
        self.valid_past_index.zero_()
        self._rows, self._used = rows, 0
        logits_RV = self._keys[0].new_zeros(rows, self.vocab_size)
        for tokens_RQ in prompt.tokens.split(self._chunk, dim=1):
            left_R = prompt.lengths - self._used
            here_RV = self._call(tokens_RQ, left_R.clamp(0, tokens_RQ.shape[1]))
            logits_RV = torch.where((left_R > 0)[:, None].to(here_RV.device), here_RV, logits_RV)
        return logits_RV

    @torch.no_grad()
    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Appends tokens [R, Q] to the rows of the last prefill; returns the logits [R, V] after the last of them.

        Raises `ValueError` before any prefill, for another number of rows, without a token, or when the cache is full.
        """
        rows, tokens = input_ids.shape
        if not self._used:
            raise ValueError("step() continues a prefill: call prefill() first")
        if rows != self._rows:
            raise ValueError(f"step() was given {rows} rows and the prefill had {self._rows}")
        if tokens == 0:
            raise ValueError("step() was given no token")
        if self._used + tokens > self.cache_length:
            raise ValueError(f"the package's cache of {self.cache_length} positions is full: export a longer one")
        return self._call(input_ids, torch.full((rows,), tokens))

    def _call(self, tokens_RQ: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        rows, tokens = tokens_RQ.shape
        ids_BQ = self._positions.new_zeros(self.batch_size, tokens)
        lengths_B = self._positions.new_zeros(self.batch_size)
        ids_BQ[:rows], lengths_B[:rows] = tokens_RQ, lengths_R
        used = self._used + tokens
        read = self._positions[: -(-used // self._bucket) * self._bucket]
        logits_BV = self._run(ids_BQ, lengths_B, self.valid_past_index, read, self._keys, self._values)
        self._used = used
        return logits_BV[:rows]
