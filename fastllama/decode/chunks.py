"""How many prompt tokens of a row one prefill pass takes, where nobody says."""

# A prompt's passing tensors grow with the pass. On a CPU passes of 256 to 2048 tokens are no slower than one over all
# of 4096; an accelerator, which has more to fill, keeps longer prompts whole.
_WHOLE = {"cpu": 2048}
_WHOLE_ELSEWHERE = 8192
_TOKENS = 512  # of one pass, over all rows
_LEAST = 128  # of each row


def automatic_chunk(rows: int, tokens: int, device_type: str) -> int:
    """Tokens of each row in one pass over `rows` prompts of `tokens`: all of them, unless they are many."""
    if tokens <= _WHOLE.get(device_type, _WHOLE_ELSEWHERE):
        return tokens
    return max(_TOKENS // rows, _LEAST)
