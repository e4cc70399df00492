"""llama.cpp beside ours: the same checkpoint written as GGUF, and steps of it timed in the same turns.

It needs the packages `gguf` and `llama-cpp-python`, which are no dependencies of fastllama.
"""

import ctypes
import functools
import gc
import importlib
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from safetensors import safe_open

from fastllama.lab.measuring.checkpoint import Checkpoint
from fastllama.lab.points.workload import Prompt

_STEPS = 8
# What the format calls the tensors of a Llama, by what transformers calls them.
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_OF_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def require() -> tuple:
    """(gguf, llama_cpp), or `ValueError` that names what is missing."""
    found = []
    for module, package in (("gguf", "gguf"), ("llama_cpp", "llama-cpp-python")):
        try:
            found.append(importlib.import_module(module))
        except (ImportError, OSError) as fault:
            raise ValueError(f"llama.cpp cannot be measured beside ours without {package}: {fault}") from fault
    return tuple(found)


def _name(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    _, _, layer, *middle, kind = name.split(".")
    return f"blk.{layer}.{_OF_LAYER['.'.join(middle)]}.{kind}"


def _interleaved(weight_NK: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys in llama.cpp's order: its rotation turns neighbours, transformers' turns halves."""
    rows, columns = weight_NK.shape
    return weight_NK.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _tensors(found: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(Path(found.place).glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                yield name, tensors.get_tensor(name)


def write(found: Checkpoint, quantisation: str, path: Path) -> None:
    """The checkpoint as GGUF: matrices of layers in `quantisation` (Q8_0 or Q4_0), embedding and head in Q8_0.

    That gives the head as many bits as our small weights give it. There is no vocabulary in the file.
    """
    gguf, _ = require()
    config, kind = found.config, gguf.GGMLQuantizationType
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in _tensors(found):
        tensor = tensor.float()
        if "q_proj" in name or "k_proj" in name:
            tensor = _interleaved(tensor, heads if "q_proj" in name else kv_heads)
        if tensor.dim() == 1:
            writer.add_tensor(_name(name), tensor.numpy())
            continue
        type_ = kind.Q8_0 if name in _WHOLE else kind[quantisation]
        writer.add_tensor(_name(name), gguf.quants.quantize(tensor.numpy(), type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@functools.cache  # llama.cpp keeps the address
def _silent(library):
    return library.llama_log_callback(lambda level, text, data: None)


class Neighbour:
    """A lane of llama.cpp: one row, as many threads as torch has, beginning anew when its context is full."""

    def __init__(self, name: str, path: Path, prompt: Prompt, cache_length: int):
        _, self._library = require()
        self.name, self.prompt, self.cache_length = name, prompt.input_ids[0].tolist(), cache_length
        self.used: int | None = None
        library, threads = self._library, torch.get_num_threads()
        library.llama_log_set(_silent(library), ctypes.c_void_p(0))
        library.llama_backend_init()
        how = library.llama_model_default_params()
        how.use_mmap = False
        self._model = library.llama_model_load_from_file(str(path).encode(), how)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load what was written for it in {path.name}")
        how = library.llama_context_default_params()
        how.n_ctx = how.n_batch = -(-cache_length // 256) * 256
        how.n_threads = how.n_threads_batch = threads
        self._context = library.llama_init_from_model(self._model, how)
        if not self._context:
            raise MemoryError("llama.cpp cannot reserve its context")

    def decode(self, tokens: list[int]) -> None:
        """Appends tokens; the logits of the last are then `logits`. Raises `RuntimeError` where llama.cpp fails."""
        library = self._library
        held = (library.llama_token * len(tokens))(*tokens)
        failed = library.llama_decode(self._context, library.llama_batch_get_one(held, len(tokens)))
        if failed:
            raise RuntimeError(f"llama_decode failed with code {failed}")

    def logits(self, vocabulary: int) -> torch.Tensor:
        """fp32 [V] of the newest token."""
        first = self._library.llama_get_logits_ith(self._context, -1)
        numbers = ctypes.cast(first, ctypes.POINTER(ctypes.c_float * vocabulary)).contents
        return torch.frombuffer(numbers, dtype=torch.float32).clone()

    def begin(self) -> None:
        """Starts anew from the prompt."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self.decode(self.prompt)
        self.used = len(self.prompt)

    def seconds(self, steps: int = _STEPS) -> float:
        """The median of `steps` tokens, as `rounds.Lane.seconds`."""
        if self.used is None or self.used + steps + 1 > self.cache_length:
            self.begin()
            self.decode(self.prompt[-1:])
            self.used += 1
        taken = []
        for _ in range(steps):
            start = time.perf_counter()
            self.decode(self.prompt[-1:])
            self._library.llama_get_logits_ith(self._context, -1)  # which waits for them
            taken.append(time.perf_counter() - start)
        self.used += steps
        return median(taken)

    def close(self) -> None:
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)


@contextmanager
def neighbour(found: Checkpoint, quantisation: str, prompt: Prompt, cache_length: int) -> Iterator[Neighbour]:
    """A `Neighbour` on a file of its own, which is gone at the end."""
    require()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{quantisation}.gguf"
        write(found, quantisation, path)
        gc.collect()
        lane = Neighbour(quantisation, path, prompt, cache_length)
    try:
        yield lane
    finally:
        lane.close()
