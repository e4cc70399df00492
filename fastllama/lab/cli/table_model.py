"""Options of the model, and of how much it writes."""

from fastllama.lab.cli.option import NAME, STRING, Option, choice, within
from fastllama.lab.cli.run import INTERACTIVE_LENGTH, NEW_TOKENS

_MOST = 2**31 - 1
_LENGTH = within(2, _MOST, 0, words=f"0 (the model's own) or a whole number from 2 to {_MOST}")
_NEW = within(
    1,
    _MOST,
    -1,
    -2,
    words=f"a whole number from 1 to {_MOST}, -1 (until the text ends) or -2 (until the cache is full)",
)

GROUPS = {
    "the model": (
        Option(
            "model",
            "run",
            "model",
            NAME,
            ("-m", "--model"),
            ("--model", "--model-name-or-path", "--pretrained-model-name-or-path"),
            "demo, random:NAME, inflated:NAME, a checkpoint's folder or hub name; no .gguf file",
            default="demo",
        ),
        Option(
            "dtype",
            "run",
            "dtype",
            choice("auto", "fp32", "bf16", "fp16"),
            (),
            ("--dtype", "--torch-dtype"),
            "auto, fp32, bf16 or fp16",
            default="auto",
        ),
        Option(
            "device",
            "run",
            "device",
            NAME,
            ("-dev", "--device"),
            ("--device",),
            "auto, cpu, cuda, cuda:1, ... (llama.cpp's CUDA0 is cuda:0)",
            default="auto",
        ),
        Option(
            "weights",
            "config",
            "weights",
            NAME,
            (),
            (),
            "hold the weights in fewer bits: int8, int4, int4-g32 to int4-g256 or float8",
            own=("--weights",),
        ),
        Option(
            "compile",
            "config",
            "compile",
            NAME,
            (),
            (),
            "no, static, dynamic, or native: one C++ call a step, for CPUs",
            own=("--compile",),
            default="no",
        ),
        Option("threads", "run", "threads", within(1, 1024), ("-t", "--threads"), (), "threads of torch for this run"),
        Option(
            "no_kv_offload",
            "run",
            "no_kv_offload",
            None,
            ("-nkvo", "--no-kv-offload"),
            (),
            "the cache stays on the CPU; says so where that is no difference",
        ),
    ),
    "how much": (
        Option(
            "n_predict",
            "run",
            "n_predict",
            _NEW,
            ("-n", "--n-predict", "--predict"),
            ("--max-new-tokens",),
            "new tokens at most (of each answer). -1, which transformers does not have: until the text ends; -2: until "
            f"the cache is full. Default: {NEW_TOKENS}, with --defaults llama.cpp -1",
        ),
        Option(
            "cache_length",
            "run",
            "cache_length",
            _LENGTH,
            ("-c", "--ctx-size"),
            ("--max-cache-len",),
            "positions to reserve; 0: as many as the model was made for. Default: what prompt and new tokens need, "
            f"and at most {INTERACTIVE_LENGTH} where nobody knows",
            own=("--cache-length",),
        ),
        Option(
            "ignore_eos", "run", "ignore_eos", None, ("--ignore-eos",), (), "the text does not end before it is so long"
        ),
        Option(
            "stop_strings",
            "run",
            "stop_strings",
            STRING,
            ("-r", "--reverse-prompt"),
            ("--stop-strings",),
            "the text (or the answer) ends behind this; several may be given",
            repeats=True,
        ),
        Option(
            "sequences",
            "run",
            "sequences",
            within(1, _MOST),
            ("-ns", "--sequences"),
            ("--num-return-sequences",),
            "texts for the prompt, printed with --- between them",
            default="1",
        ),
        Option(
            "parallel",
            "run",
            "parallel",
            within(1, _MOST),
            ("-np", "--parallel"),
            (),
            "so many of them at a time; default: all",
        ),
    ),
}
