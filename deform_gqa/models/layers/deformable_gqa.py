"""Block letter D: deformable attention with grouped-query heads."""

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from torch import Tensor, nn

from deform_gqa.checks import check_int, check_number, check_size
from deform_gqa.ops import deform_attn, deform_sample
from deform_gqa.ops.common.heads import repeat_kv

from .base_attention import BaseAttention, check_offset_groups
from .heads import merge_heads, split_heads
from .norm import ChannelLayerNorm
from .pointwise import PointwiseConv
from .position_bias import POSITION_BIASES, build_position_bias, log_cpb_attention


def reference_points(size: tuple[int, int], like: Tensor) -> Tensor:
    """Centres of a grid's cells: (h * w, 2) in (y, x), [-1, 1] with align_corners=True.

    The centre of cell i of n is 2 (i + 0.5) / (n - 1) - 1, as in the official code:
    half a cell beyond where align_corners=True puts cell i. Where n is 1 it is 0.
    """
    axes = []
    for side in size:
        if side == 1:
            axes.append(like.new_zeros(1))
        else:
            cell = torch.arange(side, dtype=like.dtype, device=like.device)
            axes.append((cell + 0.5) * (2 / (side - 1)) - 1)
    return torch.stack(torch.meshgrid(*axes, indexing='ij'), dim=-1).flatten(0, 1)


@MODELS.register_module()
class DeformableGQA(BaseAttention):
    """Deformable attention of DAT with grouped-query heads.

    A small network predicts from the queries, for each cell of a strided grid and each
    offset group, where to sample the map; keys and values are projections of these
    samples, shared by all queries. (B, C, H, W) -> (B, C, H, W), any H and W.

    With ``num_kv_heads=num_heads`` the names and shapes of the parameters are those of
    the official code, and so are outputs and gradients.

    Args:
        dim: Number of channels C.
        num_heads: Query heads Hq; ``dim`` is a multiple.
        num_kv_heads: Key/value heads Hkv that divide ``num_heads``; None for
            ``num_heads``.
        offset_groups: Number G of groups of channels and query heads, each of which has
            its own samples; divides ``num_heads``.
        stride: Pixels between the cells of the sampled grid.
        offset_kernel_size: Side of the offset network's depthwise convolution.
        offset_range_factor: Largest offset, in half cells of the sampled grid, which
            tanh enforces; if negative, offsets have no limit and positions are clamped
            to the map.
        table_size: (H0, W0), or one number for both: the map size for which the bias
            table is made; needed by the position biases 'table' and 'fixed'.
        position_bias: 'table' (a (num_heads, 2 * H0 - 1, 2 * W0 - 1) parameter
            ``rpe_table``, interpolated at any map size), 'log_cpb' (an MLP of the
            signed log displacement), 'fixed' (a dense bias, for maps of ``table_size``
            alone), 'dwc' (a depthwise convolution of q added to the output), or None.
        use_offset: If False, the map is pooled instead of sampled, and there is no
            position bias, as in the official code.
        attn_drop: Dropout of the attention weights, in [0, 1).
        proj_drop: Dropout of the output, in [0, 1).
        backend: Backend of :func:`deform_gqa.ops.deform_attn` and ``deform_sample``.

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For counts that do not divide, an unknown ``position_bias`` or
            ``backend``, a missing ``table_size``, a stride or kernel below 1, or a rate
            out of range; in ``forward`` for a map of another size than the 'fixed'
            bias, or one smaller than the kernel of an unpadded offset convolution.

    Source: Xia et al. (arXiv 2201.00520, 2309.01430), ``DAttentionBaseline`` of
    LeapLabTHU/DAT; Ainslie et al., "GQA" (arXiv 2305.13245).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        offset_groups: int = 1,
        stride: int = 1,
        offset_kernel_size: int = 5,
        offset_range_factor: float = -1,
        table_size: int | tuple[int, int] | None = None,
        position_bias: str | None = 'table',
        use_offset: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = 'auto',
    ):
        super().__init__(dim, num_heads, num_kv_heads, attn_drop, proj_drop, backend)
        check_offset_groups(num_heads, offset_groups)
        check_int('stride', stride, 1)
        check_int('offset_kernel_size', offset_kernel_size, 1)
        check_number('offset_range_factor', offset_range_factor)
        if position_bias not in POSITION_BIASES:
            raise ValueError(
                f'position_bias must be one of {POSITION_BIASES}, got {position_bias!r}'
            )
        self.offset_groups = offset_groups
        self.stride = stride
        self.offset_kernel_size = offset_kernel_size
        self.offset_range_factor = offset_range_factor
        self.use_offset = use_offset
        self.position_bias = position_bias if use_offset else None
        if table_size is not None:
            table_size = check_size('table_size', table_size)
        self.table_size = table_size

        group_dim = dim // offset_groups
        self.conv_offset = nn.Sequential(
            nn.Conv2d(
                group_dim,
                group_dim,
                offset_kernel_size,
                stride,
                offset_kernel_size // 2 if offset_kernel_size != stride else 0,
                groups=group_dim,
            ),
            ChannelLayerNorm(group_dim),
            nn.GELU(),
            nn.Conv2d(group_dim, 2, 1, bias=False),
        )
        self.conv_offset.requires_grad_(use_offset)
        self.proj_q = PointwiseConv(dim, dim)
        self.proj_k = PointwiseConv(dim, self.kv_dim)
        self.proj_v = PointwiseConv(dim, self.kv_dim)
        self.proj_out = PointwiseConv(dim, dim)
        self.rpe_table = build_position_bias(
            self.position_bias,
            dim,
            num_heads,
            offset_groups,
            table_size,
            self.key_grid,
        )

    def key_grid(self, map_size: tuple[int, int]) -> tuple[int, int]:
        """Size of the sampled grid: what the offset convolution makes of a map."""
        self._check_map_size(map_size)
        extra = 2 * self.conv_offset[0].padding[0] - self.offset_kernel_size
        height, width = ((side + extra) // self.stride + 1 for side in map_size)
        return height, width

    def _check_map_size(self, map_size: tuple[int, int]) -> None:
        kernel = self.offset_kernel_size
        if kernel == self.stride and min(map_size) < kernel:
            raise ValueError(
                f'the map {map_size} is smaller than the unpadded offset kernel '
                f'(offset_kernel_size = stride = {kernel})'
            )

    def forward(self, x: Tensor) -> Tensor:
        grid_size = tuple(x.shape[2:])
        q_map = self.proj_q(x)
        q, k, v, pos = self.attention_inputs(x, q_map)
        out = merge_heads(self.attend(q, k, v, pos, grid_size), grid_size)
        if self.position_bias == 'dwc':
            out = out + self.rpe_table(q_map)
        return self.proj_drop(self.proj_out(out))

    def attention_inputs(
        self, x: Tensor, q_map: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What ``attend`` takes: q (B, Hq, N, D), k, v (B, Hkv, S, D) and positions.

        Args:
            x: (B, C, H, W).
            q_map: (B, C, H, W), ``proj_q`` of x.
        """
        pos = self.sampling_positions(q_map) if self.use_offset else None
        sampled = self._pool(x) if pos is None else self._sample(x, pos)
        q = split_heads(q_map, self.num_heads)
        k = split_heads(self.proj_k(sampled), self.num_kv_heads)
        v = split_heads(self.proj_v(sampled), self.num_kv_heads)
        return q, k, v, pos

    def sampling_positions(self, q_map: Tensor) -> Tensor:
        """Where keys are sampled: (B, G, S, 2) in (y, x); the map spans [-1, 1].

        Args:
            q_map: (B, C, H, W), the projected queries.

        Returns:
            float32 whatever the autocast dtype (float64 for float64 queries).
        """
        self._check_map_size(tuple(q_map.shape[2:]))
        dtype = torch.float64 if q_map.dtype == torch.float64 else torch.float32
        # bf16 offsets would move a sample by up to a third of a pixel of a wide map.
        with torch.autocast(q_map.device.type, enabled=False):
            offset = self._offset_maps(q_map).to(dtype)
        size = tuple(offset.shape[1:3])
        offset = offset.flatten(1, 2).transpose(1, 2)  # (B, G, S, 2)
        if self.offset_range_factor >= 0:
            cells = offset.new_tensor([max(side - 1, 1) for side in size])
            offset = offset.tanh() * (self.offset_range_factor / cells)
        pos = offset + reference_points(size, offset)
        if self.offset_range_factor < 0:
            pos = pos.clamp(-1, 1)
        return pos

    def _offset_maps(self, q_map: Tensor) -> Tensor:
        """``conv_offset`` of each group of channels: (B, Sy, Sx, G, 2).

        The convolution has one filter per channel. Its filters, repeated for each
        group, are therefore one convolution of the map as it lies in memory. Moving the
        groups to the batch would need a copy, and a map with channels first is several
        times slower on a CPU.
        """
        conv, norm, act, proj = self.conv_offset
        groups = self.offset_groups
        x = F.conv2d(
            q_map.to(conv.weight.dtype),
            conv.weight.repeat(groups, 1, 1, 1),
            conv.bias.repeat(groups),
            conv.stride,
            conv.padding,
            groups=q_map.shape[1],
        )
        x = x.permute(0, 2, 3, 1).unflatten(3, (groups, -1))
        return F.linear(act(norm.norm(x)), proj.weight.flatten(1))

    def _sample(self, x: Tensor, pos: Tensor) -> Tensor:
        """(B, C, 1, S) samples of x."""
        return deform_sample(x, pos, backend=self.backend).unsqueeze(2)

    def _pool(self, x: Tensor) -> Tensor:
        """(B, C, Hk, Wk): means of x over cells, which the border may cut off."""
        return F.avg_pool2d(
            x, self.stride, self.stride, ceil_mode=True, count_include_pad=False
        )

    def attend(self, q, k, v, pos, grid_size) -> Tensor:
        """(B, Hq, N, D), the attention without projections, of ``attention_inputs``."""
        if self.position_bias == 'log_cpb':
            return log_cpb_attention(
                q, k, v, pos, self.rpe_table, grid_size, self.dropout_p
            )
        if self.position_bias == 'fixed':
            return self._attend_fixed(q, k, v, grid_size)
        table = self.rpe_table if self.position_bias == 'table' else None
        return deform_attn(
            q,
            k,
            v,
            pos,
            table,
            grid_size=grid_size,
            dropout_p=self.dropout_p,
            pos_in_range=self.offset_range_factor < 0,
            backend=self.backend,
        )

    def _attend_fixed(self, q, k, v, grid_size) -> Tensor:
        if grid_size != self.table_size:
            raise ValueError(
                f"position_bias='fixed' is made for maps of table_size="
                f'{self.table_size}, got a map {grid_size}'
            )
        k, v = (repeat_kv(t, self.num_heads) for t in (k, v))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.rpe_table.to(q.dtype), dropout_p=self.dropout_p
        )
