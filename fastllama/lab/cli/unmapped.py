"""llama.cpp's options that have nothing to go to here: how many values each takes, and why."""

_GPU = "layers on a GPU: use --device"
_PASSES = "how a prompt is cut into passes changes no text, and is chosen by itself"
_GRAMMAR = "grammars are not built"
_ADAPTER = "adapters are loaded in Python, by PEFT"
_LOADING = "weights are loaded by transformers"
_ROPE = "positions come from the checkpoint's own config"
_CHAT = "the tokenizer's own chat template is used, by --interactive"
_SCREEN = "about the terminal, and no text depends on it"
_LOG = "words go to standard error; --quiet leaves them out"
_SAMPLER = "this sampler is not built"
_SPREAD = "one device holds the model: use --device"
_PLACE = "which processors run: use --threads"
_DISK = "no cache is kept on disk"
_HUB = "names a .gguf file: name a checkpoint with --model"
_DRAFTS = "how many tokens are drafted is chosen by --draft-schedule"

_TABLE = (
    (1, _GPU, "-ngl --gpu-layers --n-gpu-layers -ngld --gpu-layers-draft --n-gpu-layers-draft"),
    (1, _SPREAD, "-sm --split-mode -ts --tensor-split -mg --main-gpu --rpc -ot --override-tensor"),
    (1, _PASSES, "-b --batch-size -ub --ubatch-size"),
    (1, _GRAMMAR, "--grammar --grammar-file -j --json-schema -jf --json-schema-file"),
    (1, _ADAPTER, "--lora --lora-base --control-vector"),
    (2, _ADAPTER, "--lora-scaled --control-vector-scaled --control-vector-layer-range"),
    (0, _LOADING, "--mlock --no-mmap --check-tensors --no-repack -nr"),
    (1, _LOADING, "--override-kv"),
    (1, _PLACE, "--numa -tb --threads-batch -td --threads-draft -tbd --threads-batch-draft --prio --poll"),
    (1, _PLACE, "-C --cpu-mask -Cr --cpu-range --cpu-strict --prio-batch --poll-batch -Cb --cpu-mask-batch"),
    (1, _ROPE, "--rope-freq-base --rope-freq-scale --rope-scale --rope-scaling -gqa --gqa -eps --rms-norm-eps"),
    (1, _ROPE, "--yarn-orig-ctx --yarn-ext-factor --yarn-attn-factor --yarn-beta-slow --yarn-beta-fast"),
    (1, "guidance is not built", "--cfg-scale --cfg-negative-prompt --cfg-negative-prompt-file"),
    (1, "a logit bias is a logits processor, in Python", "-l --logit-bias"),
    (1, _CHAT, "--chat-template --chat-template-file --chat-template-kwargs --in-prefix --in-suffix"),
    (0, _CHAT, "--jinja --no-jinja -ins --instruct -cml --chatml --in-prefix-bos"),
    (0, "without --prompt a session waits for the first line by itself", "-if --interactive-first"),
    (0, "one answer is what comes without --interactive", "-st --single-turn"),
    (1, _CHAT, "--reasoning-format --reasoning-budget -sysf --system-prompt-file"),
    (0, _SCREEN, "-co --color --simple-io -mli --multiline-input -sp --special"),
    (0, _LOG, "-v --verbose --verbose-prompt --log-enable --log-prefix --log-timestamps --log-colors --log-test"),
    (0, _LOG, "--log-new --log-append --perf --show-timings --no-show-timings"),
    (1, _LOG, "-lv --verbosity --log-verbosity --log-file -ld --logdir"),
    (1, _SAMPLER, "--dry-multiplier --dry-base --dry-allowed-length --dry-penalty-last-n --dry-sequence-breaker"),
    (1, _SAMPLER, "--xtc-probability --xtc-threshold --top-nsigma --top-n-sigma --dynatemp-range --dynatemp-exp"),
    (0, "every token counts alike in penalties", "--penalize-nl --no-penalize-nl"),
    (1, _DISK, "--prompt-cache --slot-save-path"),
    (0, _DISK, "--prompt-cache-all --prompt-cache-ro"),
    (1, _HUB, "-mu --model-url -hf -hfr --hf-repo -hff --hf-file -hfv --hf-repo-v --hf-token -hfd --hf-repo-draft"),
    (1, _DRAFTS, "--draft-min --draft-n-min --draft-p-min"),
    (1, "the draft's cache is as long as the model's", "-cd --ctx-size-draft"),
    (1, "the draft's cache holds floats", "-ctkd --cache-type-k-draft -ctvd --cache-type-v-draft"),
    (1, "only text goes in", "--image --mmproj -bf --binary-file --audio"),
    (0, "continuous batching is generate_many, in Python and by run_llama.py --prompts", "-cb --cont-batching"),
    (0, "continuous batching is generate_many, in Python and by run_llama.py --prompts", "-nocb --no-cont-batching"),
    (1, "the cache has no holes to close", "-dt --defrag-thold"),
    (0, "there is nothing to warm up for one text", "--warmup --no-warmup"),
    (0, "it is for looking into llama.cpp", "-dkvc --dump-kv-cache --version --completion-bash --list-devices"),
    (1, "cached tokens are not grouped like that", "--slot-prompt-similarity --cache-reuse --chunks"),
    (0, "fill-in-the-middle is not built", "--infill --spm-infill"),
)
_FLASH = "attention never makes an N x N mask here, so there is nothing to switch"
UNMAPPED = {name: (count, reason) for count, reason, names in _TABLE for name in names.split()}
# Older versions give it no value.
UNMAPPED |= dict.fromkeys(("-fa", "--flash-attn"), (0, _FLASH))
OPTIONAL = {"-fa": ("on", "off", "auto", "0", "1"), "--flash-attn": ("on", "off", "auto", "0", "1")}
