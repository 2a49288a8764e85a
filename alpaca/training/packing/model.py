"""A model that computes padding-free passes: `install` teaches it `model(packed=Pass) -> loss`.

Attention stays within each document of a pass, and sees the prefix that several of them share. It is registered with
transformers' AttentionInterface: on a GPU PyTorch's own variable-length FlashAttention, or `flex_attention` where that
does not fit; on a CPU one SDPA call per document. Logits are computed where a token is learned, in chunks.
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
from transformers.utils import is_liger_kernel_available

ATTENTION = "alpaca_packed"  # the name under which transformers knows packed_attention
# Logits of one chunk, in float32 numbers: 256 MiB, and about four times that while their gradient is made.
CHUNK_LOGITS = 2**26


@dataclasses.dataclass
class Layout:
    """Where the documents of a pass stand: prefixes first, then what is left of each document.

    A segment is one of these stretches; its queries see the keys of its prefix, if it has one, then its own up to
    themselves. Keys and values are gathered so: [prefix keys, own keys] for each segment.
    """

    lengths: list[int]  # of the segments
    parents: list[int]  # which segment is the prefix of this one; -1: none
    cu_seqlens_q: torch.Tensor  # [segments + 1], int32
    cu_seqlens_k: torch.Tensor  # [segments + 1], int32
    max_q: int
    max_k: int
    kv_index: torch.Tensor | None  # [gathered keys], the token that each is a copy of; None: every token once, in order
    own: torch.Tensor | None  # [tokens], where in the gathered keys a token's first copy stands
    copies: list[torch.Tensor]  # for each prefix [its documents + 1, its length]: all its copies

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
    """What one forward and backward pass computes: the sum of `weights` times the cross-entropies of `targets`."""

    input_ids: torch.Tensor  # [1, tokens]
    position_ids: torch.Tensor  # [1, tokens]
    layout: Layout
    supervised: torch.Tensor  # [supervised], the token that predicts
    targets: torch.Tensor  # [supervised], what it should predict
    weights: torch.Tensor  # [supervised], float64


def to_device(value: Any, device: torch.device) -> Any:
    """Moves the tensors of a dataclass, and of what it holds; Apple's GPUs have no float64."""
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
    """Lays segments end to end; `lengths` and `parents` as in Layout."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    spans = [n + (lengths[p] if p >= 0 else 0) for n, p in zip(lengths, parents, strict=True)]
    cu_seqlens_k = torch.tensor([0, *spans]).cumsum(0)
    kv_index = own = None
    copies = []
    if any(parent >= 0 for parent in parents):
        tokens = [torch.arange(a, b) for a, b in itertools.pairwise(starts)]
        gathered = [
            (tokens[parent], own) if parent >= 0 else (own,) for own, parent in zip(tokens, parents, strict=True)
        ]
        kv_index = torch.cat([part for parts in gathered for part in parts])
        own = torch.cat([torch.arange(end - n, end) for n, end in zip(lengths, cu_seqlens_k[1:].tolist(), strict=True)])
        for prefix in sorted({p for p in parents if p >= 0}):
            users = [prefix, *(i for i, p in enumerate(parents) if p == prefix)]
            copies.append(cu_seqlens_k[users][:, None] + torch.arange(lengths[prefix]))
    return Layout(
        lengths,
        parents,
        starts.to(torch.int32),
        cu_seqlens_k.to(torch.int32),
        # Upper bounds for the kernel's grid. Rounded, so that compiled layers are not compiled again for each pass.
        _rounded(max(lengths)),
        _rounded(max(spans)),
        kv_index,
        own,
        copies,
    )


def _rounded(length: int, step: int = 128) -> int:
    return -(-length // step) * step


# ---------------------------------------------------------------------------------------------------------------------
# Attention functions


class _Gather(torch.autograd.Function):
    """Copies keys or values [tokens, heads, head_dim] to where documents need them.

    A prefix's gradient is the sum over all its copies, taken in float32 at least and always in the same order. The
    gradient of `index_select` would add them one by one in the tensor's own type: 100 documents in bfloat16 would lose
    most of a bit that matters.
    """

    @staticmethod
    def forward(states: torch.Tensor, kv_index: torch.Tensor, own: torch.Tensor, copies: list) -> torch.Tensor:
        return states.index_select(0, kv_index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, own, copies = inputs
        ctx.save_for_backward(own, *copies)

    @staticmethod
    def backward(ctx, gradient):
        own, *copies = ctx.saved_tensors
        parts, start = [], 0
        for rows in copies:  # prefixes come first and in this order
            total = gradient[rows].sum(0, dtype=torch.promote_types(gradient.dtype, torch.float32))
            parts.append(total.to(gradient.dtype))
            start += rows.shape[1]
        return torch.cat((*parts, gradient.index_select(0, own[start:]))), None, None, None


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
        module: the attention layer, asked for nothing but what SDPA needs.
        query: [1, heads, tokens, head_dim]; `key` and `value` may have fewer heads.
        key: see `query`.
        value: see `query`.
        attention_mask: of padded batches; with a layout it is ignored.
        dropout: of padded batches.
        scaling: of the scores.
        packed_layout: what `model(packed=...)` hands down through the layers.
        kwargs: what the layers hand down besides.

    Returns:
        [1, tokens, heads, head_dim] and None, as transformers' AttentionInterface wants it.
    """
    if packed_layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout:
        raise ValueError("packed attention has no dropout")
    # Autocast leaves rotated queries and keys in float32; SDPA would cast them itself.
    query, key = query.to(value.dtype), key.to(value.dtype)
    attend = _per_document
    if query.device.type == "cuda" and query.dtype != torch.float64:
        attend = _varlen if _has_varlen(query) else _flex
    return attend(query, key, value, packed_layout, scaling), None


def _per_document(query, key, value, layout: Layout, scaling: float | None) -> torch.Tensor:
    """One SDPA call per document: on a CPU as fast as a batched one, because nothing is padded."""
    keys, values = key.split(layout.lengths, 2), value.split(layout.lengths, 2)
    outputs = []
    for i, (part, parent) in enumerate(zip(query.split(layout.lengths, 2), layout.parents, strict=True)):
        k, v, mask = keys[i], values[i], None
        if parent >= 0:
            k, v = torch.cat((keys[parent], k), 2), torch.cat((values[parent], v), 2)
            # is_causal would align the first query with the first key; the last ones belong together.
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
    """FlashAttention over documents of different lengths; (-1, 0) is causal with the last query at the last key."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    if layout.kv_index is not None:
        key, value = (_Gather.apply(states, layout.kv_index, layout.own, layout.copies) for states in (key, value))
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
    """For float32 and head sizes that FlashAttention lacks. Not compiled into its layer: it is compiled itself."""
    gqa = key.shape[1] != query.shape[1]
    output = _compiled_flex()(query, key, value, block_mask=layout.block_mask, scale=scaling, enable_gqa=gqa)
    return output.transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# The model


def install(model: torch.nn.Module) -> None:
    """Teaches a causal language model of transformers, or one that peft wraps, `model(packed=Pass) -> loss`.

    Without `packed` it does what it did. It stays one call of the outermost module, so that FSDP2, DDP and DeepSpeed
    gather and reduce as ever. To be called before any of them wraps the model.
    """
    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # padded batches, in evaluation, still need theirs
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    model.set_attn_implementation(ATTENTION)
    original = model.forward

    def forward(self, *args, packed: Pass | None = None, **kwargs):
        return original(*args, **kwargs) if packed is None else _packed_loss(self, packed)

    forward.__signature__ = inspect.signature(type(model).forward)  # the Trainer reads which columns it takes
    model.forward = types.MethodType(forward, model)


def choose_kernels(args: Any, packed: bool) -> bool:
    """Decides what fuses the small operations of a layer: torch.compile, or Liger's kernels where they are installed.

    Args:
        args: train.py's; `use_liger_kernel` is set where Liger is chosen. Its own loss is left out, for it would take
            the place of the packed forward pass.
        packed: whether passes are padding-free.

    Returns:
        Whether to compile the layers.
    """
    on_gpu = args.device.type == "cuda"
    wanted = args.compile_layers.lower()
    compiles = wanted == "true" or (wanted == "auto" and on_gpu and packed and not args.use_liger_kernel)
    args.use_liger_kernel |= on_gpu and packed and not compiles and is_liger_kernel_available()
    if args.use_liger_kernel and packed:
        args.liger_kernel_config = {**(args.liger_kernel_config or {}), "fused_linear_cross_entropy": False}
    return compiles


def compile_layers(model: torch.nn.Module, backend: str = "inductor") -> None:
    """Compiles the decoder layers, each by itself and for any number of tokens.

    One compilation serves all layers. Only their forward passes are compiled: FSDP2's hooks and checkpointing stay
    outside, names in the state dict as they are. To be called before anything wraps the model.
    """
    torch._dynamo.config.suppress_errors = True  # a layer that cannot be compiled runs as it is, with a warning
    names = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in names:
            module.forward = torch.compile(module.forward, dynamic=True, backend=backend)


def _packed_loss(model: torch.nn.Module, batch: Pass) -> torch.Tensor:
    hidden_states = model.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        # A 4-D mask is handed through as it is. With None transformers would build one of tokens x tokens; with a
        # 2-D one, or with use_cache, documents would see each other in other attention functions.
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
    """The weighted sum of cross-entropies, in float32 at least, without ever holding all logits.

    Args:
        hidden_states: [supervised, hidden], of the tokens that predict a supervised one.
        lm_head: hidden states to logits; runs in the model's compute type, as in a padded batch.
        targets: [supervised].
        weights: [supervised].

    Returns:
        A scalar.
    """
    rows = max(1, CHUNK_LOGITS // lm_head.out_features)
    if hasattr(lm_head.weight, "ds_id"):  # ZeRO-3 gathers it at every call, and ranks have different numbers of chunks
        rows = len(targets)
    chunks = list(zip(hidden_states.split(rows), targets.split(rows), weights.split(rows), strict=True))
    if len(chunks) == 1:
        return _chunk_loss(lm_head, *chunks[0])
    # Chunks recompute their logits in the backward pass: 0.3 % of a 7B model's work, and 4 GiB of logits less.
    losses = [
        checkpoint(_chunk_loss, lm_head, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks
    ]
    return torch.stack(losses).sum()


def _chunk_loss(lm_head: Callable, hidden_states, targets, weights) -> torch.Tensor:
    logits = lm_head(hidden_states)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (F.cross_entropy(logits, targets, reduction="none") * weights.to(logits.dtype)).sum()
