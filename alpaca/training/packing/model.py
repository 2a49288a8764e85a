"""Computes padding-free passes: `install` teaches a model `model(packed=Pass) -> loss`.

Attention stays within each document of a pass and sees the prefix that several of them share. It is registered with
transformers' AttentionInterface: on a GPU PyTorch's own variable-length FlashAttention, or `flex_attention` where that
does not fit; on a CPU one SDPA call per document. Logits are computed only for supervised tokens, in chunks.
"""

import dataclasses
import functools
import inspect
import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

ATTENTION = "alpaca_packed"  # packed_attention's name in transformers
# Logits of one chunk, as float32 numbers: 256 MiB, and about four times that while their gradient is computed.
CHUNK_LOGITS = 2**26


@dataclasses.dataclass
class Layout:
    """Where the segments of a pass are: the shared prefixes first, then the rest of each document.

    The queries of a segment see the keys of its prefix, if it has one, then the segment's own keys up to themselves.
    For variable-length attention, keys and values are gathered as [prefix keys, own keys] for each segment.

    Example: a prefix of 2 tokens and two documents that go on with 3 and 1 tokens. Tokens 0-5 are P0 P1 A0 A1 A2 B0.

        lengths       [2, 3, 1]
        parents       [-1, 0, 0]
        cu_seqlens_q  [0, 2, 5, 6]        segments in the tokens
        kv_index      P0 P1 | P0 P1 A0 A1 A2 | P0 P1 B0 = [0, 1, 0, 1, 2, 3, 4, 0, 1, 5]
        cu_seqlens_k  [0, 2, 7, 10]       segments in the gathered keys
        first_copy    [0, 1, 4, 5, 6, 9]  where P0 P1 A0 A1 A2 B0 are in kv_index, outside of documents' prefixes
        copies        [[[0, 1], [2, 3], [7, 8]]]  where all copies of P0 P1 are

    Attributes:
        lengths: Length of each segment.
        parents: For each segment the number of the segment that is its prefix; -1 for none.
        cu_seqlens_q: Start of each segment in the tokens, and the end, int32 [segments + 1].
        cu_seqlens_k: Likewise in the gathered keys.
        max_q: Upper bound of the lengths.
        max_k: Upper bound of the gathered lengths.
        kv_index: For each gathered key the token that it copies; None without prefixes, when nothing is copied.
        first_copy: For each token the place of its first copy in the gathered keys; None without prefixes.
        copies: For each prefix the places of all its copies, [its documents + 1, its length].
    """

    lengths: list[int]
    parents: list[int]
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_q: int
    max_k: int
    kv_index: torch.Tensor | None = None
    first_copy: torch.Tensor | None = None
    copies: list[torch.Tensor] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def block_mask(self) -> Any:
        """The same rule for `flex_attention`, which needs no gathered keys."""
        from torch.nn.attention.flex_attention import create_block_mask

        device = self.cu_seqlens_q.device
        lengths = torch.tensor(self.lengths, device=device)
        segment = torch.repeat_interleave(torch.arange(len(self.lengths), device=device), lengths)
        parent = torch.tensor(self.parents, device=device)[segment]

        def sees(_batch, _head, query, key):
            return (segment[key] == parent[query]) | ((segment[key] == segment[query]) & (key <= query))

        tokens = sum(self.lengths)
        make = torch.compile(create_block_mask, dynamic=True) if device.type == "cuda" else create_block_mask
        return make(sees, None, None, tokens, tokens, device=device)


@dataclasses.dataclass
class Pass:
    """What one forward and backward pass computes: the sum of `weights` times the cross-entropies of `targets`.

    Attributes:
        input_ids: The tokens, [1, tokens].
        position_ids: The place of each token in its example, [1, tokens].
        layout: The segments.
        supervised: The tokens that predict a supervised one, [supervised].
        targets: What they should predict, [supervised].
        weights: What each of these predictions weighs in the loss, float64 [supervised].
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: Layout
    supervised: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


def to_device(value: Any, device: torch.device) -> Any:
    """Moves all tensors of a dataclass to a device; Apple's GPUs have no float64."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return type(value)(*(to_device(getattr(value, field.name), device) for field in fields))
    if isinstance(value, list):
        return [to_device(one, device) for one in value]
    if not isinstance(value, torch.Tensor):
        return value
    value = value.float() if device.type == "mps" and value.dtype == torch.float64 else value
    return value.to(device, non_blocking=True)


def make_layout(lengths: list[int], parents: list[int]) -> Layout:
    """Lays segments end to end.

    Args:
        lengths: Length of each segment; prefixes come first.
        parents: For each segment the number of the segment that is its prefix; -1 for none.
    """
    gathered = [
        length + (lengths[parent] if parent >= 0 else 0) for length, parent in zip(lengths, parents, strict=True)
    ]
    starts_q, starts_k = torch.tensor([0, *lengths]).cumsum(0), torch.tensor([0, *gathered]).cumsum(0)
    layout = Layout(
        lengths,
        parents,
        cu_seqlens_q=starts_q.to(torch.int32),
        cu_seqlens_k=starts_k.to(torch.int32),
        # Upper bounds for the kernel's grid. Rounded, so that compiled layers are not compiled again for each pass.
        max_q=_round_up(max(lengths)),
        max_k=_round_up(max(gathered)),
    )
    prefixes = sorted({parent for parent in parents if parent >= 0})
    if not prefixes:
        return layout
    tokens = [torch.arange(start, end) for start, end in itertools.pairwise(starts_q)]
    ends_k = starts_k[1:].tolist()
    seen = [(tokens[parent], own) if parent >= 0 else (own,) for own, parent in zip(tokens, parents, strict=True)]
    firsts = [torch.arange(end - length, end) for length, end in zip(lengths, ends_k, strict=True)]
    copies = []
    for prefix in prefixes:
        users = [prefix, *(segment for segment, parent in enumerate(parents) if parent == prefix)]
        copies.append(starts_k[users][:, None] + torch.arange(lengths[prefix]))
    kv_index = torch.cat([part for parts in seen for part in parts])
    return dataclasses.replace(layout, kv_index=kv_index, first_copy=torch.cat(firsts), copies=copies)


def _round_up(length: int, step: int = 128) -> int:
    return -(-length // step) * step


# ---------------------------------------------------------------------------------------------------------------------
# Attention functions


class _Gather(torch.autograd.Function):
    """Copies keys or values [tokens, heads, head_dim] to where documents need them.

    A prefix's gradient is the sum over all its copies, in float32 at least and always in the same order. The gradient
    of `index_select` would add them one by one in the tensor's own type. In bfloat16, with 8 bits of precision, adding
    the last of 100 similar gradients to the sum of the others would lose most of its bits.
    """

    @staticmethod
    def forward(states: torch.Tensor, kv_index: torch.Tensor, first_copy: torch.Tensor, copies: list) -> torch.Tensor:
        return states.index_select(0, kv_index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, first_copy, copies = inputs
        ctx.save_for_backward(first_copy, *copies)

    @staticmethod
    def backward(ctx, gradient):
        first_copy, *copies = ctx.saved_tensors
        parts, start = [], 0
        for rows in copies:  # the prefixes are the first tokens, in this order
            total = gradient[rows].sum(0, dtype=torch.promote_types(gradient.dtype, torch.float32))
            parts.append(total.to(gradient.dtype))
            start += rows.shape[1]
        return torch.cat((*parts, gradient.index_select(0, first_copy[start:]))), None, None, None


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document of a pass, and from it to its prefix; ordinary SDPA without a layout.

    Args:
        module: The attention layer; SDPA reads its settings.
        query: [1, heads, tokens, head_dim].
        key: Like `query`, perhaps with fewer heads.
        value: Like `key`.
        attention_mask: The mask of a padded batch; ignored if there is a layout.
        dropout: Dropout of a padded batch.
        scaling: Factor of the scores.
        packed_layout: The layout that `model(packed=...)` hands down through the layers.
        kwargs: What the layers hand down besides, for SDPA.

    Returns:
        [1, tokens, heads, head_dim] and None, as transformers' AttentionInterface expects.

    Raises:
        ValueError: Dropout with a layout.
    """
    if packed_layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout:
        raise ValueError("packed attention has no dropout")
    # Autocast leaves rotated queries and keys in float32. SDPA would cast them, the other functions do not.
    query, key = query.to(value.dtype), key.to(value.dtype)
    attend = _per_document
    if query.device.type == "cuda" and query.dtype != torch.float64:
        attend = _varlen if _has_varlen(query) else _flex
    return attend(query, key, value, packed_layout, scaling), None


def _per_document(query, key, value, layout: Layout, scaling: float | None) -> torch.Tensor:
    """Calls SDPA once per document. On a CPU that is as fast as one batched call, because nothing is padded."""
    keys, values = key.split(layout.lengths, 2), value.split(layout.lengths, 2)
    outputs = []
    for i, (part, parent) in enumerate(zip(query.split(layout.lengths, 2), layout.parents, strict=True)):
        k, v, mask = keys[i], values[i], None
        if parent >= 0:
            k, v = torch.cat((keys[parent], k), 2), torch.cat((values[parent], v), 2)
            # is_causal aligns the first query with the first key; here the last query belongs to the last key.
            shape = (part.shape[2], k.shape[2])
            mask = torch.ones(shape, dtype=torch.bool, device=part.device).tril(shape[1] - shape[0])
        gqa = {"enable_gqa": True} if k.shape[1] != part.shape[1] else {}
        outputs.append(
            F.scaled_dot_product_attention(part, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, **gqa)
        )
    return torch.cat(outputs, 2).transpose(1, 2)


def _has_varlen(query: torch.Tensor) -> bool:
    head_dim = query.shape[-1]
    return query.dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256


def _varlen(query, key, value, layout: Layout, scaling: float | None) -> torch.Tensor:
    """Runs FlashAttention over documents of different lengths; window (-1, 0) is causal, last query at last key."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    if layout.kv_index is not None:
        key, value = (
            _Gather.apply(states, layout.kv_index, layout.first_copy, layout.copies) for states in (key, value)
        )
    if key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    seqlens = (layout.cu_seqlens_q, layout.cu_seqlens_k, layout.max_q, layout.max_k)
    return varlen_attn(query, key, value, *seqlens, scale=scaling, window_size=(-1, 0))[None]


@functools.lru_cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@torch.compiler.disable
def _flex(query, key, value, layout: Layout, scaling: float | None) -> torch.Tensor:
    """Attends in float32 and with head sizes that FlashAttention lacks. It is compiled by itself, not in its layer."""
    gqa = key.shape[1] != query.shape[1]
    output = _compiled_flex()(query, key, value, block_mask=layout.block_mask, scale=scaling, enable_gqa=gqa)
    return output.transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# The model


def install(model: torch.nn.Module) -> None:
    """Teaches a causal language model of transformers, or one that peft wraps, `model(packed=Pass) -> loss`.

    Without `packed` the model does what it did before. A pass is one call of the outermost module, so FSDP2, DDP and
    DeepSpeed gather and reduce as always. Call this before any of them wraps the model.
    """
    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # evaluation still has padded batches, and needs their mask
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    model.set_attn_implementation(ATTENTION)
    original = model.forward

    def forward(self, *args, packed: Pass | None = None, **kwargs):
        return original(*args, **kwargs) if packed is None else _packed_loss(self, packed)

    forward.__signature__ = inspect.signature(type(model).forward)  # the Trainer reads the names of its columns from it
    model.forward = types.MethodType(forward, model)


def compile_layers(model: torch.nn.Module, backend: str = "inductor") -> None:
    """Compiles the decoder layers, each by itself and for any number of tokens.

    One compilation serves all layers. Only their forward passes are compiled: FSDP2's hooks and checkpointing stay
    outside, and the state dict keeps its names. Call this before anything wraps the model.
    """
    torch._dynamo.config.suppress_errors = True  # a layer that cannot be compiled runs uncompiled, with a warning
    names = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in names:
            module.forward = torch.compile(module.forward, dynamic=True, backend=backend)


def _packed_loss(model: torch.nn.Module, batch: Pass) -> torch.Tensor:
    hidden_states = model.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        # transformers hands a 4-D mask through unchanged. With None it would build one of tokens x tokens; with a 2-D
        # one, or with use_cache, documents would see each other in other attention functions.
        attention_mask=torch.empty(1, 1, 0, 0, dtype=torch.bool, device=batch.input_ids.device),
        use_cache=False,
        packed_layout=batch.layout,
    ).last_hidden_state
    return supervised_loss(
        hidden_states[0].index_select(0, batch.supervised), model.get_output_embeddings(), batch.targets, batch.weights
    )


def supervised_loss(
    hidden_states: torch.Tensor, lm_head: torch.nn.Module, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Computes the weighted sum of cross-entropies, in float32 at least, without ever holding all logits.

    Args:
        hidden_states: States of the tokens that predict a supervised one, [supervised, hidden].
        lm_head: The output layer; runs in the model's compute type, as in a padded batch.
        targets: The tokens to predict, [supervised].
        weights: The weight of each prediction, [supervised].

    Returns:
        A scalar.
    """
    rows = max(1, CHUNK_LOGITS // lm_head.out_features)
    if hasattr(lm_head.weight, "ds_id"):  # ZeRO-3 gathers it in every call, so all ranks need the same number of calls
        rows = len(targets)
    chunks = list(zip(hidden_states.split(rows), targets.split(rows), weights.split(rows), strict=True))
    if len(chunks) == 1:
        return _chunk_loss(lm_head, *chunks[0])
    # Chunks recompute their logits in the backward pass: 0.3 % more work for a 7B model, and 4 GiB of logits less.
    losses = [
        checkpoint(_chunk_loss, lm_head, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks
    ]
    return torch.stack(losses).sum()


def _chunk_loss(lm_head: Callable, hidden_states, targets, weights) -> torch.Tensor:
    logits = lm_head(hidden_states)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (F.cross_entropy(logits, targets, reduction="none") * weights.to(logits.dtype)).sum()
