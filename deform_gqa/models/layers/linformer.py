"""Linformer: dense attention to a fixed number of projected keys and values."""

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from torch import Tensor, nn

from deform_gqa.checks import check_bool, check_int, check_size
from deform_gqa.ops.common import checks

from .base_attention import BaseAttention
from .dense_attention import attend_heads

SHARING = ('not-share', 'headwise', 'key-value', 'layerwise')


class Projection(nn.Module):
    """Projects n tokens to k, and any other number of tokens by resampling.

    Another number of tokens, or a map of another size, is first brought to the size n
    by the transpose of bilinear resampling (with antialiasing), which is the same as to
    resample the columns of the weight matrix as images. Its sums are one: each of the n
    is a weighted mean of the tokens that lie there, and a constant map is projected
    alike at all sizes. At n tokens nothing is resampled.

    Args:
        n: Length of the sequence, or (height, width) of the map, for which the
            projection is made.
        k: Number of projected tokens.
        bias: Whether each projected token has a bias.

    Raises:
        TypeError: For a number of the wrong type.
        ValueError: For a number below 1.

    Source: Wang et al., "Linformer" (arXiv 2006.04768).
    """

    def __init__(self, n: int | tuple[int, int], k: int, bias: bool = True):
        super().__init__()
        if not isinstance(n, (list, tuple)):
            check_int('n', n, 1)
            n = (1, n)
        self.size = check_size('n', n)
        check_int('k', k, 1)
        check_bool('bias', bias)
        self.n, self.k = self.size[0] * self.size[1], k
        self.proj = nn.Linear(self.n, k, bias=bias)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Projects the last dimension.

        Args:
            x: (..., N), tokens last.
            size: (H, W) with H * W == N; None for a sequence, (1, N).

        Returns:
            (..., k).

        Raises:
            ValueError: If ``size`` does not fit N.
        """
        size = (1, x.shape[-1]) if size is None else tuple(size)
        if size[0] * size[1] != x.shape[-1]:
            raise ValueError(
                f'size must be (H, W) with H * W = {x.shape[-1]} tokens, got {size}'
            )
        if size == self.size:
            return self.proj(x)
        # Rows and columns apart: their matrices are small, that of the map is not.
        x = x.unflatten(-1, size)
        to_rows = _resampling(self.size[0], size[0], x)
        to_cols = _resampling(self.size[1], size[1], x)
        return self.proj((to_rows.mT @ (x @ to_cols)).flatten(-2))


def _resampling(side: int, new_side: int, like: Tensor) -> Tensor:
    """(new_side, side) weights of the new pixels in each of the old; they sum to 1."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    eye = torch.eye(side, dtype=dtype, device=like.device)
    matrix = F.interpolate(
        eye[None, None],
        (new_side, side),
        mode='bilinear',
        align_corners=False,
        antialias=True,
    )[0, 0]
    return (matrix / matrix.sum(0)).to(like.dtype)


@MODELS.register_module()
class LinformerAttention(BaseAttention):
    """Dense attention to k projections of all keys, (B, C, H, W) -> (B, C, H, W).

    Time and memory are linear in the number of pixels. The projections are made for
    maps of n pixels and adapt to maps of any size.

    Args:
        dim: Number of channels C.
        num_heads: Query heads Hq.
        num_kv_heads: Key/value heads that divide ``num_heads``; None for ``num_heads``.
        n: (height, width) of the map that the projections are made for, or the length
            of the sequence.
        k: Number of projected keys.
        sharing: Which projections there are: 'not-share', two for each kv head, of its
            keys and of its values; 'headwise', two for all heads; 'key-value', one for
            all keys and values; 'layerwise', the same, which :func:`share_projections`
            makes one for all layers of a model. The DAT backbone calls that.
        proj_E: Projection of the keys, instead of one made for ``n`` and ``k``; not
            with 'not-share'.
        proj_F: The same for the values; with 'headwise' alone.
        head_dim: Channels D of one head; None for ``dim // num_heads``.
        attn_drop: Dropout of the attention weights, in [0, 1).
        proj_drop: Dropout of the output, in [0, 1).

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For head counts that do not divide, an unknown ``sharing``, a
            projection given that it has no place for, two that do not fit each other, a
            number below 1, or a rate out of range.

    Source: Wang et al., "Linformer" (arXiv 2006.04768).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        n: int | tuple[int, int] = (16, 16),
        k: int = 64,
        sharing: str = 'headwise',
        proj_E: Projection | None = None,
        proj_F: Projection | None = None,
        head_dim: int | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(
            dim, num_heads, num_kv_heads, attn_drop, proj_drop, head_dim=head_dim
        )
        if sharing not in SHARING:
            raise ValueError(f'sharing must be one of {SHARING}, got {sharing!r}')
        self.sharing = sharing
        self.proj_q = nn.Linear(dim, self.head_dim * num_heads)
        self.proj_k = nn.Linear(dim, self.kv_dim)
        self.proj_v = nn.Linear(dim, self.kv_dim)
        self.proj_out = nn.Linear(self.head_dim * num_heads, dim)
        # Another layer's projection, in a list so that it is no submodule here
        self._borrowed: list[Projection] = []
        self._check_projections(proj_E, proj_F)
        count = self.num_kv_heads if sharing == 'not-share' else 1
        self.proj_E = _projections(proj_E, n, k, count)
        self.proj_F = None
        if sharing in ('not-share', 'headwise'):
            self.proj_F = _projections(proj_F, n, k, count)

    def _check_projections(
        self, proj_E: Projection | None, proj_F: Projection | None
    ) -> None:
        takes = {'not-share': '', 'headwise': 'EF'}.get(self.sharing, 'E')
        for letter, projection in (('E', proj_E), ('F', proj_F)):
            if projection is None:
                continue
            if not isinstance(projection, Projection):
                raise TypeError(
                    f'proj_{letter} must be a Projection, got '
                    f'{type(projection).__name__}'
                )
            if letter not in takes:
                raise ValueError(
                    f'proj_{letter} must be None with sharing={self.sharing!r}'
                )
        if proj_E is not None and proj_F is not None:
            sizes = [(p.size, p.k) for p in (proj_E, proj_F)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f'proj_E and proj_F must have the same n and k, got '
                    f'(n, k) = {sizes[0]} and {sizes[1]}'
                )

    def forward(self, x: Tensor) -> Tensor:
        size = tuple(x.shape[2:])
        out = self.forward_tokens(x.flatten(2).transpose(1, 2), size)
        return out.transpose(1, 2).unflatten(2, size)

    def forward_tokens(
        self,
        x: Tensor,
        size: tuple[int, int] | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Self-attention of tokens; a projection mixes past and future, so that there
        is no causal form.

        Args:
            x: (B, N, C).
            size: (H, W) with H * W == N; None for a sequence.
            key_padding_mask: (B, N), True for tokens that are left out of keys and
                values.

        Returns:
            (B, N, C).

        Raises:
            ValueError: For tokens, a size or a mask that do not fit each other.
        """
        checks.check_tensor('x', x, 'B N C')
        checks.check_shape('x', x, (*x.shape[:2], self.dim), '(B, N, dim)')
        q = self.proj_q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.proj_k(x), self.proj_v(x)
        if key_padding_mask is not None:
            checks.check_shape(
                'key_padding_mask', key_padding_mask, x.shape[:2], '(B, N)'
            )
            k, v = (t.masked_fill(key_padding_mask[..., None], 0) for t in (k, v))
        k = self._project(k, self._key_projections(), size)
        values = self._key_projections() if self.proj_F is None else self.proj_F
        v = self._project(v, values, size)
        out = attend_heads(q, k, v, dropout_p=self.dropout_p)
        return self.proj_drop(self.proj_out(out.transpose(1, 2).flatten(2)))

    def _key_projections(self) -> nn.ModuleList | list[Projection]:
        return self._borrowed if self._borrowed else self.proj_E

    def _project(self, x: Tensor, projections, size) -> Tensor:
        """Tokens (B, N, Hkv * D) -> (B, Hkv, k, D)."""
        heads = x.transpose(1, 2).unflatten(1, (self.num_kv_heads, -1))
        if len(projections) == 1:
            return projections[0](heads, size).mT
        parts = zip(projections, heads.unbind(1), strict=True)
        return torch.stack([proj(head, size) for proj, head in parts], dim=1).mT

    def borrow_projection(self, owner: 'LinformerAttention') -> None:
        """Uses the projection of another layer instead of its own, which is dropped."""
        self.proj_E = None
        self._borrowed = [owner.proj_E[0]]


def _projections(given: Projection | None, n, k, count: int) -> nn.ModuleList:
    if given is not None:
        return nn.ModuleList([given])
    return nn.ModuleList(Projection(n, k) for _ in range(count))


def share_projections(model: nn.Module) -> None:
    """Gives all layers of a model with ``sharing='layerwise'`` one projection.

    The first layer keeps it among its parameters; it appears once in the state_dict.

    Args:
        model: Any module; changed in place.

    Raises:
        ValueError: If the layers' projections are made for different n or k.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, LinformerAttention)
        and module.sharing == 'layerwise'
        and module.proj_E is not None
    ]
    for layer in layers[1:]:
        own, first = layer.proj_E[0], layers[0].proj_E[0]
        if (own.size, own.k) != (first.size, first.k):
            raise ValueError(
                "layers with sharing='layerwise' must have the same n and k, got "
                f'(n, k) = {(first.size, first.k)} and {(own.size, own.k)}'
            )
        layer.borrow_projection(layers[0])
