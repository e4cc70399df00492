"""Prompt: rows of different length without their padding.

Legend: B batch, T padded prompt length, P longest real prompt, Q tokens of one pass, E hidden size.
"""

from typing import NamedTuple

import torch


class Prompt(NamedTuple):
    """Rows moved to the left: row b's real tokens at 0 .. lengths[b] - 1, leftovers behind them.

    `tokens` is ids [B, P] or embeddings [B, P, E]; `lengths` int64 [B]; `columns` [B, P] says where each token stood
    in the padded prompt of `width` columns, None when nothing moved.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    longest: int
    width: int
    columns: torch.Tensor | None


def unpad(tokens: torch.Tensor, attention_mask: torch.Tensor | None) -> Prompt:
    """Takes the padding off. `tokens` [B, T] or [B, T, E]; `attention_mask` [B, T], nonzero where real, or None.

    Raises `ValueError` when the prompt is empty or a row has no real token.
    """
    batch, width = tokens.shape[:2]
    if width == 0:
        raise ValueError("the prompt is empty")
    if attention_mask is None:
        return Prompt(tokens, torch.full((batch,), width, device=tokens.device), width, width, None)
    real_BT = attention_mask.to(tokens.device) != 0
    lengths = real_BT.sum(1)
    counts = lengths.tolist()
    if min(counts) == 0:
        raise ValueError(f"row {counts.index(0)} of the prompt is nothing but padding")
    longest = max(counts)
    if min(counts) == width:
        return Prompt(tokens, lengths, width, width, None)
    columns_BP = torch.argsort((~real_BT).to(torch.int8), dim=1, stable=True)[:, :longest]
    index = columns_BP if tokens.dim() == 2 else columns_BP[..., None].expand(-1, -1, tokens.shape[2])
    return Prompt(tokens.gather(1, index), lengths, longest, width, columns_BP)


def recent(prompt: Prompt, most: int | None) -> Prompt:
    """Of rows of more than `most` tokens the first, which models lean on, and the last; all of them where None."""
    if most is None or prompt.longest <= most:
        return prompt
    kept = prompt.lengths.clamp(max=most)
    index_BP = torch.arange(most, device=kept.device) + (prompt.lengths - kept)[:, None]
    index_BP[:, 0] = 0
    return Prompt(prompt.tokens.gather(1, index_BP), kept, most, most, None)


def at_ends(last_BX: torch.Tensor | None, part_BQX: torch.Tensor, lengths: torch.Tensor, past: int) -> torch.Tensor:
    """What belongs to each row's last token, of the tokens from `past` on; what came before where it ended earlier."""
    ends = (lengths - 1 - past).clamp(0, part_BQX.shape[1] - 1)
    here_BX = part_BQX[torch.arange(len(part_BQX), device=part_BQX.device), ends]
    return here_BX if last_BX is None else torch.where((lengths - 1 >= past)[:, None], here_BX, last_BX)
