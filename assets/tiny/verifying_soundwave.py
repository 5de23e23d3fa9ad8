"""Drafted greedy decoding of a batch: every row accepts what it can, and the cache is packed anew after each block.

Letters: B rows of the batch, b rows not finished yet, L positions of the expanded prompt, Q drafted tokens of the
longest block, S cached positions, V vocabulary.
"""

import torch
from transformers import DynamicCache, MaxLengthCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput

from .drafting_soundwave import TOKENS_PER_FORWARD, Draft, Drafting

FEWEST_PER_ROW = 16  # drafted tokens of a row that one forward verifies, however many rows there are


class Row:
    """One row's answer so far."""

    def __init__(self, place: int, prompt: torch.Tensor, length: int, draft: Draft):
        self.place = place  # in the batch
        self.prompt = prompt  # (L,) expanded ids, padding included
        self.length = length  # cached positions, padding left out
        self.draft = draft
        self.ids: list[int] = []  # the answer; all but the newest are cached
        self.block: list[int] = []  # drafted tokens that are being verified

    def all_ids(self, tokens: list[int]) -> torch.Tensor:
        """Prompt, answer so far and ``tokens``: (1, n) ids for processors and criteria of the library."""
        return torch.cat([self.prompt, self.prompt.new_tensor(self.ids + tokens)])[None]

    def fed(self) -> list[int]:
        """What the LLM reads next: the token that is not cached yet (none beside the prompt) and a block to verify."""
        return self.ids[-1:] + self.block

    def accept(self, chosen: list[int], stop: "StopRule") -> tuple[list[int], int, bool]:
        """Take over what the LLM would have said itself and its own next token.

        Returns:
            The new tokens, how many drafted tokens were wrong, and whether the answer ends.
        """
        agreed = self.draft.agreed(self.block, chosen)
        tokens = self.block[:agreed] + [chosen[agreed]]
        end = stop.first(self, tokens)
        self.length += len(self.ids[-1:]) + agreed
        self.ids += tokens[:end]
        self.draft.advance(tokens[:end])
        return tokens[:end], len(self.block) - agreed, end is not None


class StopRule:
    """The library's stopping criteria, asked after every single token of a block, as plain decoding asks them."""

    def __init__(self, criteria: StoppingCriteriaList):
        self.max_length = min(c.max_length for c in criteria if isinstance(c, MaxLengthCriteria))  # prompt included
        self.eos: set[int] = set()
        self.others = StoppingCriteriaList()
        for criterion in criteria:
            if isinstance(criterion, EosTokenCriteria):
                self.eos |= set(criterion.eos_token_id.tolist())
            elif not isinstance(criterion, MaxLengthCriteria):
                self.others.append(criterion)

    def first(self, row: Row, tokens: list[int]) -> int | None:
        """How many of the new tokens there are up to the one that ends the answer; ``None`` = it goes on."""
        length = len(row.prompt) + len(row.ids)
        for n, token in enumerate(tokens, start=1):
            if token in self.eos or length + n >= self.max_length:
                return n
            if self.others and bool(self.others(row.all_ids(tokens[:n]), None).all()):
                return n
        return None


def can_verify(cache, text_config) -> bool:
    """Whether every layer of a cache can be rolled back and packed anew: full and sliding-window attention.

    Raises:
        ValueError: for a cache that was asked for and is no dynamic one.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        raise ValueError(
            f"ctc_draft rolls the cache back, which needs a dynamic one on the device, not a {type(cache).__name__}; "
            "leave out cache_implementation or ctc_draft."
        )
    known = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    return known and getattr(text_config, "attention_chunk_size", None) is None


def repack(cache: DynamicCache, kept: list[int], surplus: list[int], length: int) -> None:
    """Drop finished rows and every row's newest ``surplus`` positions; what stays ends together, without holes.

    Holes would move a sliding window and break kernels that take a row's positions to be next to each other.

    Args:
        cache: all rows' keys and values (B, heads, S, d) per layer.
        kept: the b rows that stay.
        surplus: positions at the end of each of them that were not accepted (b,).
        length: positions of the longest row that stays; shorter rows are padded on the left.
    """
    device = cache.layers[0].keys.device
    rows, dropped = torch.tensor(kept, device=device), torch.tensor(surplus, device=device)
    for layer in cache.layers:
        B, heads, S, _ = layer.keys.shape
        here, width = layer.keys.device, length
        if isinstance(layer, DynamicSlidingWindowLayer):
            width = min(length, layer.sliding_window - 1)
            layer.cumulative_length = length
        start = S - width - dropped.to(here)  # (b,) negative: the row has padding there
        column = (start[:, None] + torch.arange(width, device=here)).clamp(min=0)[:, None, :, None]
        for name in ("keys", "values"):
            states = getattr(layer, name)
            states = states if len(kept) == B else states[rows.to(here)]
            if len(set(surplus)) == 1:  # rows in step: no copy
                states = states[:, :, S - width - surplus[0] : S - surplus[0]]
            else:
                states = states.gather(2, column.expand(len(kept), heads, width, states.shape[-1]))
            setattr(layer, name, states)


def _forward(model, cache, rows: list[Row], past: int, prompt: tuple | None) -> torch.Tensor:
    """One forward of the LLM over the rows' blocks, behind ``prompt`` or ``past`` cached positions: (b, Q + 1, V)."""
    fed = [row.fed() for row in rows]
    width = max(map(len, fed))
    device = rows[0].prompt.device  # a device map may have put the speech side elsewhere
    ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in fed], dtype=torch.long, device=device)
    lengths = torch.tensor([row.length for row in rows], device=device)[:, None]
    ends = torch.tensor([past + len(tokens) for tokens in fed], device=device)[:, None]
    column = torch.arange(past + width, device=device)
    inputs = {
        "attention_mask": ((column >= past - lengths) & (column < ends)).long(),
        "position_ids": lengths + torch.arange(width, device=device),
    }
    if prompt is None:
        inputs["input_ids"] = ids
    else:
        inputs_embeds, position_ids = prompt
        drafted = model.get_input_embeddings()(ids).to(inputs_embeds.dtype)
        inputs["inputs_embeds"] = torch.cat([inputs_embeds, drafted], dim=1)
        inputs["position_ids"] = torch.cat([position_ids, inputs["position_ids"]], dim=1)
    verified = 1 + max(len(row.block) for row in rows)
    output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=verified)
    return output.logits[:, -verified:]


def _process(logits: torch.Tensor, rows: list[Row], processors, batch_size: int) -> None:
    """Process the scores (b, Q + 1, V) of each row after every token of its block in place, as plain decoding would.

    Rows with as many ids so far are processed together, in their own places of a whole batch (some processors know
    rows by their number); the other places are filled with whatever row.
    """
    ids = [row.all_ids(row.block)[0] for row in rows]
    steps: dict[int, dict[int, tuple[int, int]]] = {}  # ids so far -> place in the batch -> where its scores are
    for i, row in enumerate(rows):
        for n in range(len(row.block) + 1):
            steps.setdefault(len(ids[i]) - len(row.block) + n, {})[row.place] = (i, n)
    for length, places in steps.items():
        anyone = next(iter(places.values()))
        seats = [places.get(place, anyone) for place in range(batch_size)]
        at = torch.tensor(seats, device=logits.device).T
        processed = processors(torch.stack([ids[i][:length] for i, _ in seats]), logits[at[0], at[1]])
        for place, (i, n) in places.items():
            logits[i, n] = processed[place]


def verify_drafts(
    model,
    input_ids: torch.Tensor,
    processors,
    criteria: StoppingCriteriaList,
    generation_config,
    synced_gpus: bool,
    streamer,
    drafting: Drafting,
    inputs_embeds: torch.Tensor,
    past_key_values: DynamicCache,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs,
):
    """Greedy answers of a batch with drafts verified in blocks: (B, L) -> (B, L + new), as plain greedy gives them.

    Takes what the library hands to a way of decoding. Each forward takes the newest token of every row and a block of
    its draft. Whatever it wrote of tokens that the LLM did not agree to is squeezed out of the cache.

    Raises:
        ValueError: for scores and the like (rows are at different steps), or with ``synced_gpus``.
    """
    outputs = [f"output_{name}" for name in ("scores", "logits", "attentions", "hidden_states")]
    if asked := [name for name in outputs if getattr(generation_config, name)]:
        raise ValueError(f"{asked} with ctc_draft need a single row without draft_confidence or stopping criteria.")
    if synced_gpus:
        raise ValueError("ctc_draft of a batch takes each rank another number of forwards: not with synced_gpus.")
    L = input_ids.shape[1]
    lengths = [L] * len(input_ids) if attention_mask is None else attention_mask.sum(dim=1).tolist()
    everyone = [Row(i, input_ids[i], lengths[i], draft) for i, draft in enumerate(drafting.drafts or ())]
    stop, cache = StopRule(criteria), past_key_values
    cache.activate_past_recording()  # a sliding window must be able to roll back
    rows, past = everyone, L
    prompt: tuple | None = (inputs_embeds, position_ids)
    while rows:
        limit = max(FEWEST_PER_ROW, TOKENS_PER_FORWARD // len(rows))
        for row in rows:
            row.block = row.draft.block(min(limit, stop.max_length - L - len(row.ids) - 1))
        logits = _forward(model, cache, rows, past, prompt)
        drafting.forwards += 1
        kept, surplus = [], []
        if logits.dtype == torch.float64 or processors:
            logits = logits.to(input_ids.device, torch.float32, copy=True)  # as plain decoding compares them
        if processors:
            _process(logits, rows, processors, len(everyone))
        for i, (row, chosen) in enumerate(zip(rows, logits.argmax(dim=-1).tolist(), strict=True)):
            tokens, wrong, ended = row.accept(chosen, stop)
            if streamer is not None:
                streamer.put(torch.tensor(tokens))
            if not ended:
                kept.append(i)
                surplus.append(logits.shape[1] - 1 - len(row.block) + wrong)
        rows, prompt = [rows[i] for i in kept], None
        if rows:
            past = max(row.length for row in rows)
            repack(cache, kept, surplus, past)
    if streamer is not None:
        streamer.end()
    longest = max(len(row.ids) for row in everyone)
    pad = 0 if generation_config._pad_token_tensor is None else int(generation_config._pad_token_tensor)
    answers = [row.ids + [pad] * (longest - len(row.ids)) for row in everyone]
    sequences = torch.cat([input_ids, input_ids.new_tensor(answers)], dim=1)
    return GenerateDecoderOnlyOutput(sequences=sequences) if generation_config.return_dict_in_generate else sequences
