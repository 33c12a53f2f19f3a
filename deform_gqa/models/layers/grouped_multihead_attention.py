"""torch's multi-head attention, with grouped queries."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from torch import Tensor, nn

from deform_gqa.checks import check_int, check_rate
from deform_gqa.ops.common import checks
from deform_gqa.ops.gqa.api import attend_grouped

from .attention_mask import merge_masks
from .base_attention import resolve_kv_heads


@MODELS.register_module()
class GroupedMultiheadAttention(nn.Module):
    """``nn.MultiheadAttention`` whose keys and values have fewer heads than queries.

    Options, call, results, initialisation and names of parameters are those of the
    original, and with as many kv heads its checkpoints load. ``in_proj_weight`` is
    (C + 2 Hkv D, C), or ``k_proj_weight`` (Hkv D, kdim) and ``v_proj_weight``
    (Hkv D, vdim) if these widths differ from C. Differences: a query that may attend to
    nothing gets zeros from the attention, not NaN; nested tensors are not taken.

    Args:
        embed_dim: Channels C of query and output.
        num_heads: Query heads Hq; divides ``embed_dim``.
        num_kv_heads: Key/value heads Hkv; divides ``num_heads``. None for
            ``num_heads``.
        dropout: Dropout of the attention weights in training, in [0, 1).
        bias: Whether the projections have biases.
        kdim: Channels of the key input; None for C.
        vdim: Channels of the value input; None for C.
        batch_first: Whether tensors are (B, L, C), not (L, B, C).
        device: Device of the parameters.
        dtype: dtype of the parameters.
        value_heads: For each query head h, the head of the values that it reads; None
            for h // (Hq / Hkv), as that of the keys.

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For counts below 1 or that do not divide, a dropout out of range, or
            ``value_heads`` that are not Hq numbers from 0 to Hkv - 1.

    Source: ``torch.nn.MultiheadAttention``; Ainslie et al., "GQA" (arXiv 2305.13245).
    """

    # torch's encoder layers bypass ``forward`` with a fused kernel for equal heads,
    # unless these attributes of the original say that it does not apply.
    _qkv_same_embed_dim = False
    bias_k = bias_v = None
    add_zero_attn = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        value_heads: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.num_kv_heads = resolve_kv_heads(embed_dim, num_heads, num_kv_heads)
        check_rate('dropout', dropout)
        self.value_heads = self._check_value_heads(num_heads, value_heads)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        check_int('kdim', self.kdim, 1)
        check_int('vdim', self.vdim, 1)
        self.head_dim = embed_dim // num_heads
        self.dropout, self.batch_first = dropout, batch_first

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        rows = embed_dim + 2 * self.kv_dim
        if self.kdim == self.vdim == embed_dim:
            self.in_proj_weight = parameter(rows, embed_dim)
            names = ('q_proj_weight', 'k_proj_weight', 'v_proj_weight')
            for name in names:
                self.register_parameter(name, None)
        else:
            self.q_proj_weight = parameter(embed_dim, embed_dim)
            self.k_proj_weight = parameter(self.kv_dim, self.kdim)
            self.v_proj_weight = parameter(self.kv_dim, self.vdim)
            self.register_parameter('in_proj_weight', None)
        self.register_parameter('in_proj_bias', parameter(rows) if bias else None)
        self.out_proj = nn.Linear(
            embed_dim, embed_dim, bias=bias, device=device, dtype=dtype
        )
        self.reset_parameters()

    def _check_value_heads(
        self, num_heads: int, value_heads: Sequence[int] | None
    ) -> tuple[int, ...] | None:
        if value_heads is None:
            return None
        value_heads = tuple(value_heads)
        known = set(range(self.num_kv_heads))
        if len(value_heads) != num_heads or not set(value_heads) <= known:
            raise ValueError(
                f'value_heads must be {num_heads} numbers from 0 to '
                f'{self.num_kv_heads - 1}, got {value_heads}'
            )
        return value_heads

    @classmethod
    def from_module(
        cls, module: nn.MultiheadAttention, num_kv_heads: int | None = None
    ) -> 'GroupedMultiheadAttention':
        """A new module with the options of torch's; its weights are not copied.

        Raises:
            ValueError: As :meth:`check_original`.
        """
        cls.check_original(module)
        weight = module.out_proj.weight
        new = cls(
            module.embed_dim,
            module.num_heads,
            num_kv_heads,
            dropout=module.dropout,
            bias=module.in_proj_bias is not None,
            kdim=module.kdim,
            vdim=module.vdim,
            batch_first=module.batch_first,
            device=weight.device,
            dtype=weight.dtype,
        )
        return new.train(module.training)

    @staticmethod
    def check_original(module: nn.MultiheadAttention) -> None:
        """Checks that torch's module can be replaced by one of this class.

        Raises:
            ValueError: If the module appends learnt or zero keys.
        """
        if module.bias_k is not None or module.add_zero_attn:
            raise ValueError(
                'nn.MultiheadAttention with add_bias_kv or add_zero_attn has no '
                f'grouped counterpart, got add_bias_kv={module.bias_k is not None}, '
                f'add_zero_attn={module.add_zero_attn}'
            )

    @property
    def kv_dim(self) -> int:
        """Channels of the keys, and of the values."""
        return self.num_kv_heads * self.head_dim

    def reset_parameters(self) -> None:
        """As torch's: Xavier uniform projections, zero biases."""
        for weight in (
            self.in_proj_weight,
            self.q_proj_weight,
            self.k_proj_weight,
            self.v_proj_weight,
        ):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from every query to the keys.

        Args:
            query: (L, B, C), (B, L, C) with ``batch_first``, or (L, C) without a batch.
            key: The same with S and ``kdim``.
            value: The same with S and ``vdim``.
            key_padding_mask: (B, S), or (S,) without a batch. Boolean: True for keys to
                ignore; floating: added to the logits.
            need_weights: Also return the attention weights, which then have to be in
                memory all at once.
            attn_mask: (L, S) or (B * Hq, L, S). Boolean: True where attention is NOT
                allowed; floating: added to the logits.
            average_attn_weights: Average the returned weights over the heads.
            is_causal: A hint that ``attn_mask`` is the causal mask.

        Returns:
            Output like ``query``, and weights (B, L, S), (B, Hq, L, S) if not averaged
            (without B if there is no batch), or None.

        Raises:
            TypeError: For a mask that is neither boolean nor floating.
            ValueError: For shapes that do not fit, or ``is_causal`` without a mask.
        """
        if is_causal and attn_mask is None:
            raise ValueError('is_causal=True needs the attn_mask that it describes')
        batched = query.ndim == 3
        inputs = self._batch_first(query, key, value)
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        self._check_inputs(*inputs)
        q, k, v = self.project(*inputs)
        mask = merge_masks(
            attn_mask,
            key_padding_mask,
            batch=q.shape[0],
            num_heads=self.num_heads,
            length=q.shape[1],
            num_keys=k.shape[1],
        )
        if self.value_heads is not None:
            k = k.repeat_interleave(self.num_heads // self.num_kv_heads, dim=2)
            v = v[:, :, list(self.value_heads)]
        out, weights = attend_grouped(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=False,
            dropout=self.dropout if self.training else 0.0,
            scale=self.head_dim**-0.5,
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
        )
        out = self.out_proj(out.flatten(2))
        if weights is not None and not average_attn_weights:
            weights = weights.permute(0, 3, 1, 2)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def project(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, L, Hq, D), keys and values (B, S, Hkv, D) of (B, ., .) inputs."""
        rows = (self.embed_dim, self.kv_dim, self.kv_dim)
        biases = (None,) * 3
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.split(rows)
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = self.in_proj_weight.split(rows)
        return tuple(
            F.linear(x, weight, bias).unflatten(-1, (-1, self.head_dim))
            for x, weight, bias in zip(
                (query, key, value), weights, biases, strict=True
            )
        )

    def _batch_first(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The inputs as (B, L, C)."""
        if inputs[0].ndim == 2:
            return tuple(x.unsqueeze(0) for x in inputs)
        if self.batch_first:
            return inputs
        return tuple(x.transpose(0, 1) for x in inputs)

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        checks.check_tensor('query', query, 'B L C')
        checks.check_tensor('key', key, 'B S C')
        checks.check_tensor('value', value, 'B S C')
        batch, length, _ = query.shape
        num_keys = key.shape[1]
        for name, x, shape in (
            ('query', query, (batch, length, self.embed_dim)),
            ('key', key, (batch, num_keys, self.kdim)),
            ('value', value, (batch, num_keys, self.vdim)),
        ):
            checks.check_shape(name, x, shape, 'with the batch first')
