"""Attention inside each sequence of a packed batch, registered with transformers under the name "packed"."""

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

SHORT = {"cpu": 128, "cuda": 512}  # tokens; up to here one attention call with a mask is faster than one per sequence
MOST_PADDING = 2  # times the tokens; with more there is a call per sequence


def packed_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, packing=None, sliding_window=None, **kwargs
) -> tuple[torch.Tensor, None]:
    """Attention inside each sequence of a PackedBatch: query [1, heads, T or kB, d] → [1, T or kB, heads, d].

    A query of kB rows is one row a sequence. sliding_window: a token attends to those less than so many places away
    (ModernBERT). Without `packing` it is plain padded attention, as SDPA gives it.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    one_row_each = query.shape[2] != key.shape[2]
    reach = sliding_window - 1 if sliding_window else None
    if dropout == 0.0 and has_varlen(query.device, query.dtype, query.shape[-1]):
        return _varlen_attention(query, key, value, packing, one_row_each, reach, scaling)[None], None
    return _without_varlen(query, key, value, packing, one_row_each, reach, dropout_p=dropout, scale=scaling), None


@torch.compiler.disable  # of every batch the lengths are others: a compiled layer runs around it
def _without_varlen(query, key, value, packing, one_row_each: bool, reach: int | None, **settings) -> torch.Tensor:
    """A call for each sequence, or one for all if they are short: [1, heads, T or kB, d] → [1, T or kB, heads, d]."""
    if reach is not None and reach >= packing.max_seqlen - 1:
        reach = None
    padded = len(packing.lengths) * packing.max_seqlen
    if packing.max_seqlen <= SHORT[query.device.type] and padded <= MOST_PADDING * key.shape[2]:
        return _masked_attention(query, key, value, packing, one_row_each, reach, **settings)
    rows = [1] * len(packing.lengths) if one_row_each else packing.lengths
    # Cut with the tokens in front, as they lie in memory: the gradient is then joined by plain copies.
    lengths = (rows, packing.lengths, packing.lengths)
    cut = [states.transpose(1, 2).split(each, 1) for states, each in zip((query, key, value), lengths, strict=True)]
    near = None if reach is None else within_reach(packing.max_seqlen, reach, query.device)
    out = [
        F.scaled_dot_product_attention(
            *(states.transpose(1, 2) for states in sequence),
            attn_mask=None if near is None else near[:length, :length],
            **settings,
        ).transpose(1, 2)
        for length, *sequence in zip(packing.lengths, *cut, strict=True)
    ]
    return torch.cat(out, 1)


def within_reach(longest: int, reach: int, device) -> torch.Tensor:
    """[longest, longest] which tokens are at most `reach` places from each other."""
    place = torch.arange(longest, device=device)
    return (place[:, None] - place).abs() <= reach


def _varlen_attention(query, key, value, packing, one_row_each: bool, reach: int | None, scaling) -> torch.Tensor:
    """FlashAttention's variable-length kernel: [1, heads, T or kB, d] → [T or kB, heads, d]."""
    ends, longest = packing.cu_seqlens, packing.max_seqlen
    query_ends = torch.arange(len(ends), device=ends.device, dtype=ends.dtype) if one_row_each else ends
    query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    rows = 1 if one_row_each else longest
    window = {} if reach is None else {"window_size": (reach, reach)}
    return varlen_attn(query, key, value, query_ends, ends, rows, longest, scale=scaling, **window)


def _masked_attention(query, key, value, packing, one_row_each: bool, reach: int | None, **settings) -> torch.Tensor:
    """All sequences in one padded and masked call, for short ones."""
    count, longest, (place, filled) = len(packing.lengths), packing.max_seqlen, packing.grid

    def pad(states: torch.Tensor) -> torch.Tensor:  # [1, heads, T, d] → [kB, heads, longest, d]
        rows = states[0].transpose(0, 1).flatten(1)
        grid = rows.new_zeros(count * longest, rows.shape[1]).index_copy(0, place, rows)
        return grid.view(count, longest, *states.shape[1::2]).transpose(1, 2)

    query, key, value = query.transpose(0, 2) if one_row_each else pad(query), pad(key), pad(value)
    mask = filled[:, None, None]
    if reach is not None:  # rows of padding look at every token: without any, their gradient would not be a number
        mask = (mask & within_reach(longest, reach, mask.device)) | ~filled[:, None, :, None]
    out = F.scaled_dot_product_attention(query, key, value, mask, **settings).transpose(1, 2).flatten(2)
    rows = out.flatten(0, 1) if one_row_each else out.flatten(0, 1).index_select(0, place)
    return rows.view(1, len(rows), key.shape[1], -1)


def has_varlen(device: torch.device, dtype: torch.dtype | None, width: int) -> bool:
    """Whether the variable-length kernel takes heads of this width (half precision, Ampere or newer)."""
    half = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    return half and width % 8 == 0 and width <= 256 and torch.cuda.get_device_capability(device) >= (8, 0)


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)
