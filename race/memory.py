"""Micro-batches that fit into memory: of how many tokens, and what is done where they do not fit after all."""

from collections.abc import Callable

import torch
from torch.cuda import max_memory_allocated, memory_reserved

from race import MAX_LEN, OPTIONS, RaceError
from race.encoder import most_padding

CPU_TOKENS = 4096  # in a micro-batch on CPU: enough for its matrix products, and little memory


def in_parts(module, batch, run: Callable, undo: Callable | None = None, stop: Callable | None = None) -> list:
    """run(part, is_last) for each micro-batch of a PackedBatch, of at most module.token_budget tokens → the results.

    stop() is called before each part, and may raise. On a GPU whose memory is full, all parts are run again with half
    the token budget, after undo(). Raises RaceError if one question does not fit, or if processes exchange gradients.
    """
    while True:
        parts, results = list(batch.micro_batches(module.token_budget, module.padded)), []
        try:
            for part in parts:
                if stop is not None:
                    stop()
                results.append(run(part, part is parts[-1]))
            return results
        except torch.OutOfMemoryError as error:
            part = parts[len(results)]
            tokens, single = part.tokens(module.padded), len(part) == 1
            if single or (undo is not None and module.processes > 1 and part is parts[-1]):
                what = "one question" if single else "a micro-batch, while processes exchange their gradients,"
                mend = "MAX_LEN" if single else f"TOKEN_BUDGET (now {module.token_budget})"
                raise RaceError(
                    f"the GPU's memory is full: {what} of {tokens:,} tokens does not fit. Set a smaller {mend}; other "
                    f"programs may use this GPU ({error})"
                ) from error
        module.token_budget = tokens // 2
        print(f"the GPU's memory was full: the batch is run again with TOKEN_BUDGET = {tokens // 2:,}", flush=True)
        if undo is not None:  # out of the except clause, which still holds what did not fit
            undo()
        torch.cuda.empty_cache()


def free_unused(device: torch.device, batch_idx: int) -> None:
    """Every 16 batches, give memory back if a GPU's cache has blocks that steps of these sizes do not use."""
    now = device.type == "cuda" and batch_idx % 16 == 15
    if now and memory_reserved(device) > 1.25 * max_memory_allocated(device):
        torch.cuda.empty_cache()


def fit_memory(module, device: torch.device, half: bool = False) -> None:
    """Choose a RaceModule's token budget for a device, if none was given; half: under autocast."""
    if module.token_budget is None and device.type == "cuda":
        torch.cuda.empty_cache()  # what this process keeps, and does not use, is free too
        free, parameters = torch.cuda.mem_get_info(device)[0], sum(it.numel() for it in module.parameters())
        config = module.model.config
        padding = most_padding(config, device, torch.bfloat16 if half else torch.float32)
        module.token_budget = token_budget_for(config, parameters, free, half, module.padded, padding)
    module.token_budget = module.token_budget or CPU_TOKENS


def token_budget_for(config, parameters: int, free: int, half: bool, padded: bool = False, padding: int = 1) -> int:
    """Tokens of a micro-batch with `free` bytes: nine tenths of them, less weights and optimizer state.

    Kept for the backward pass, a token and layer, in float32: input, query, key, value, context twice, two layer-norm
    inputs and one output (9 hidden of 4 bytes), feed-forward before and after its activation (2 intermediate). Under
    autocast: layer-norm inputs in float32, 7 hidden and 2 intermediate of 2 bytes. One layer's gradients need about as
    much again. Padded families keep maps of attention; with `padding`, query, key, value and context are filled up.
    """
    layers, hidden = config.num_hidden_layers * getattr(config, "inner_group_num", 1), config.hidden_size
    names = ("intermediate_size", "hidden_dim", "d_inner")  # as families call the width of the feed-forward layers
    intermediate = next((size for name in names if (size := getattr(config, name, None))), 4 * hidden)
    layer, width = (22 * hidden + 4 * intermediate, 2) if half else (36 * hidden + 8 * intermediate, 4)
    if getattr(config, "rope_parameters", None):  # ModernBERT: rotated queries and keys, and a gated feed-forward
        layer += width * (3 * hidden + 2 * intermediate)
    layer += width * 4 * (padding - 1) * hidden
    if padded:  # six maps of [tokens, tokens] of each head: scores, softmax, dropout, positions
        layer += width * 6 * config.num_attention_heads * MAX_LEN
    fixed = 20 * parameters + (1 << 29)  # weights, gradients, two moments, casts or buckets; context and workspace
    return int(max(OPTIONS * MAX_LEN, (0.9 * free - fixed) / (layer * (layers + 1) + 32 * hidden)))
