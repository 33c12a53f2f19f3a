"""Multi-head latent attention with rotary positions in two dimensions."""

import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

from deform_gqa.checks import check_int, check_number
from deform_gqa.ops.common import checks

from .base_attention import BaseAttention
from .dense_attention import attend_heads, causal_mask, check_cache

FORMS = ('auto', 'expanded', 'absorbed')
Cache = tuple[Tensor, Tensor]


@MODELS.register_module()
class MultiHeadLatentAttention(BaseAttention):
    """Dense attention with compressed keys and values, (B, C, H, W) -> (B, C, H, W).

    Keys and values of all heads are linear maps of one latent vector of ``kv_rank``
    channels a token. Positions are apart from it: a further part of the queries, and
    one of the keys that all heads share, are rotated by the row and the column. A
    decoder caches the latent vectors and the rotated keys only.

    There are two ways to compute it, equal but for rounding. The expanded form makes
    keys and values of all heads. The absorbed form multiplies the queries by the map
    that makes the keys, so that they attend to the latent vectors themselves as to one
    kv head, and maps the outputs to values. 'auto' takes the one with fewer products:
    expanded for a whole map, absorbed for a few queries with a long past.

    Args:
        dim: Number of channels C.
        num_heads: Heads.
        kv_rank: Channels of the latent vector of keys and values; None for that of four
            heads, as in the paper, but at most ``dim``.
        q_rank: Channels of the latent vector of the queries; None for none.
        rope_dim: Rotated channels of a head, a multiple of 4; None for about half a
            head.
        rope_base: Ratio of the highest to the lowest frequency, more than 1. The
            highest one is a radian a pixel.
        form: 'auto', 'expanded' or 'absorbed'.
        attn_drop: Dropout of the attention weights, in [0, 1).
        proj_drop: Dropout of the output, in [0, 1).

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For head counts that do not divide, a rank below 1, a ``rope_dim``
            that is no multiple of 4, a base of at most 1, an unknown form, or a rate
            out of range.

    Source: DeepSeek-AI, "DeepSeek-V2" (arXiv 2405.04434), section 2.1; rotary positions
    along two axes as in Heo et al. (arXiv 2403.13298).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kv_rank: int | None = None,
        q_rank: int | None = None,
        rope_dim: int | None = None,
        rope_base: float = 100.0,
        form: str = 'auto',
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim, num_heads, None, attn_drop, proj_drop)
        kv_rank = min(4 * self.head_dim, dim) if kv_rank is None else kv_rank
        rope_dim = max(self.head_dim // 8, 1) * 4 if rope_dim is None else rope_dim
        check_int('kv_rank', kv_rank, 1)
        check_int('rope_dim', rope_dim, 1)
        if rope_dim % 4:
            raise ValueError(f'rope_dim must be a multiple of 4, got {rope_dim}')
        check_number('rope_base', rope_base)
        if not rope_base > 1:
            raise ValueError(f'rope_base must be more than 1, got {rope_base}')
        if form not in FORMS:
            raise ValueError(f'form must be one of {FORMS}, got {form!r}')
        self.kv_rank, self.rope_dim = kv_rank, rope_dim
        self.rope_base, self.form = rope_base, form
        self.proj_q = self._query_projection(q_rank)
        self.kv_down = nn.Linear(dim, kv_rank + rope_dim)
        self.kv_norm = nn.RMSNorm(kv_rank)
        self.proj_k = nn.Linear(kv_rank, dim, bias=False)
        self.proj_v = nn.Linear(kv_rank, dim, bias=False)
        self.proj_out = nn.Linear(dim, dim)

    def _query_projection(self, q_rank: int | None) -> nn.Module:
        width = self.dim + self.num_heads * self.rope_dim
        if q_rank is None:
            return nn.Linear(self.dim, width)
        check_int('q_rank', q_rank, 1)
        return nn.Sequential(
            nn.Linear(self.dim, q_rank), nn.RMSNorm(q_rank), nn.Linear(q_rank, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        size = tuple(x.shape[2:])
        tokens = x.flatten(2).transpose(1, 2)
        out = self.forward_tokens(tokens, pixel_positions(size, x.device))
        return out.transpose(1, 2).unflatten(2, size)

    def forward_tokens(
        self, x: Tensor, positions: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Self-attention of tokens.

        Args:
            x: (B, N, C).
            positions: (N, 2) in (y, x), pixels; None for those of one row.
            is_causal: Query i attends to keys 0 to i only.

        Returns:
            (B, N, C).

        Raises:
            TypeError: If ``positions`` is no tensor.
            ValueError: For tokens or positions of another shape.
        """
        positions = self._check(x, positions, past=0)
        return self._attend(x, *self._latents(x, positions), positions, is_causal)

    def decode(
        self, x: Tensor, cache: Cache | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Cache]:
        """The next tokens of a sequence, which attend to the past and themselves.

        The outputs of all steps together are those of ``forward_tokens`` with
        ``is_causal=True``.

        Args:
            x: (B, n, C), n >= 1.
            cache: What the previous step returned; None at the first.
            positions: (n, 2) of the new tokens in (y, x), pixels; None for the next
                ones of a row.

        Returns:
            Outputs (B, n, C), and the cache: latent vectors (B, S + n, kv_rank) and
            rotated keys (B, S + n, rope_dim).

        Raises:
            TypeError: If ``positions`` is no tensor.
            ValueError: For tokens or positions of another shape, or a cache of another
                batch.
        """
        past = 0 if cache is None else cache[0].shape[1]
        positions = self._check(x, positions, past)
        check_cache(cache, len(x))
        new = self._latents(x, positions)
        if cache is not None:
            new = tuple(torch.cat(pair, dim=1) for pair in zip(cache, new, strict=True))
        return self._attend(x, *new, positions, True), new

    def _check(self, x: Tensor, positions: Tensor | None, past: int) -> Tensor:
        checks.check_tensor('x', x, 'B N C')
        checks.check_shape('x', x, (*x.shape[:2], self.dim), '(B, N, dim)')
        if positions is None:
            return pixel_positions((1, past + x.shape[1]), x.device)[past:]
        if not isinstance(positions, Tensor):
            raise TypeError(
                f'positions must be a tensor, got {type(positions).__name__}'
            )
        checks.check_shape('positions', positions, (x.shape[1], 2), '(N, 2)')
        return positions

    def _latents(self, x: Tensor, positions: Tensor) -> Cache:
        """Latent vectors (B, S, kv_rank) and rotated keys (B, S, rope_dim)."""
        latent, k_rope = self.kv_down(x).split((self.kv_rank, self.rope_dim), dim=2)
        return self.kv_norm(latent), rotate(k_rope, positions, self.rope_base)

    def _attend(self, x, latent, k_rope, positions, is_causal: bool) -> Tensor:
        q = self.proj_q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        q_nope, q_rope = q.split((self.head_dim, self.rope_dim), dim=3)
        q_rope = rotate(q_rope, positions, self.rope_base)
        length = x.shape[1]
        past = latent.shape[1] - length
        mask = causal_mask(length, past, x.device) if is_causal and past else None
        options = dict(
            attn_mask=mask,
            is_causal=is_causal and not past,
            dropout_p=self.dropout_p,
            scale=(self.head_dim + self.rope_dim) ** -0.5,
        )
        k_rope = k_rope.unsqueeze(1)
        attend = self._absorbed if self._absorbs(length, past) else self._expanded
        out = attend(q_nope, q_rope, latent, k_rope, options)
        return self.proj_drop(self.proj_out(out.transpose(1, 2).flatten(2)))

    def _absorbs(self, length: int, past: int) -> bool:
        """Whether the absorbed form is to be used; 'auto' counts multiply-adds."""
        if self.form != 'auto':
            return self.form == 'absorbed'
        keys, rank = past + length, self.kv_rank
        maps = 2 * rank * self.dim  # of one token, those that make k and v
        width = self.num_heads * self.rope_dim
        expanded = keys * maps + length * keys * (2 * self.dim + width)
        latents = self.num_heads * 2 * rank
        return length * maps + length * keys * (latents + width) < expanded

    def _expanded(self, q_nope, q_rope, latent, k_rope, options) -> Tensor:
        k, v = (
            proj(latent).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.proj_k, self.proj_v)
        )
        k_rope = k_rope.to(k.dtype).expand(-1, self.num_heads, -1, -1)
        q = torch.cat([q_nope, q_rope], dim=3)
        return attend_heads(q, torch.cat([k, k_rope], dim=3), v, **options)

    def _absorbed(self, q_nope, q_rope, latent, k_rope, options) -> Tensor:
        to_k, to_v = (
            proj.weight.unflatten(0, (self.num_heads, -1))
            for proj in (self.proj_k, self.proj_v)
        )
        q = torch.einsum('bhnd,hdr->bhnr', q_nope, to_k)
        q = torch.cat([q, q_rope.to(q.dtype)], dim=3)
        latent = latent.unsqueeze(1).to(q.dtype)
        k = torch.cat([latent, k_rope.to(q.dtype)], dim=3)
        out = attend_heads(q, k, latent, **options)
        return torch.einsum('bhnr,hdr->bhnd', out, to_v)


def pixel_positions(size: tuple[int, int], device: torch.device) -> Tensor:
    """(H * W, 2) in (y, x), pixels, row by row; float32."""
    axes = (torch.arange(side, device=device, dtype=torch.float32) for side in size)
    return torch.stack(torch.meshgrid(*axes, indexing='ij'), dim=-1).flatten(0, 1)


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary positions of two dimensions.

    The first half of the channels turns with y, the second with x; of each half,
    channel i and the one half of a half further on are a pair. Products of two vectors
    then depend on the difference of their positions only.

    Args:
        x: (..., N, R), R a multiple of 4.
        positions: (N, 2) in (y, x), pixels.
        base: Ratio of the highest to the lowest frequency.

    Returns:
        As x; angles are computed in float32 at least.

    Source: Su et al., "RoFormer" (arXiv 2104.09864).
    """
    pairs = x.shape[-1] // 4
    dtype = torch.promote_types(x.dtype, torch.float32)
    exponent = torch.arange(pairs, device=x.device, dtype=dtype) / pairs
    angle = positions.to(dtype).unsqueeze(-1) * base**-exponent  # (N, 2, R / 4)
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(dtype).unflatten(-1, (2, 2, pairs)).unbind(-2)
    turned = torch.stack(
        [first * cos - second * sin, first * sin + second * cos], dim=-2
    )
    return turned.flatten(-3).to(x.dtype)
