"""Deformable attention as its 1-D, 2-D and 3-D packages have it, with grouped heads.

``DeformableAttention2D`` has the arguments and the state_dict of
https://github.com/AbelHutten/deformable-grouped-query-attention; the other two are
those of its ancestor, https://github.com/lucidrains/deformable-attention. The official
block of DAT, with the fused kernel, is ``DeformableGQA``.
"""

from mmdet.registry import MODELS
from torch import nn

from .baked_bias import BakeableAttention
from .deformable_base import DeformableAttentionBase, PerAxis


@MODELS.register_module()
class DeformableAttention1D(BakeableAttention):
    """Deformable attention of a sequence, (B, dim, N) -> (B, dim, N).

    Args:
        dim: Number of channels.
        dim_head: Channels of a head.
        heads: Query heads Hq.
        dropout: Dropout of the attention weights in training, in [0, 1).
        downsample_factor: Positions between the cells of the sampled grid.
        offset_scale: Largest offset, in cells; None for ``downsample_factor``.
        offset_groups: Number G of groups of channels and heads with samples of their
            own; None for ``heads``.
        offset_kernel_size: Kernel of the offset network.
        cpb_log_distance: Whether the bias network sees logarithms of displacements.
        group_queries: Whether the query projection is one for each offset group.
        group_key_values: Whether those of keys and values are.
        num_groups: Key/value heads Hkv; None for ``heads``.
        backend: Backend of ``deform_sample``, and of ``deform_attn`` if the bias is
            baked.

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For counts that do not divide, a kernel that is smaller than
            ``downsample_factor`` or larger by an odd number, or a rate out of range.

    Source: https://github.com/lucidrains/deformable-attention.
    """

    conv = nn.Conv1d
    order = (0,)
    shape = 'B C N'

    def __init__(
        self,
        *,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        dropout: float = 0.0,
        downsample_factor: int = 4,
        offset_scale: float | None = None,
        offset_groups: int | None = None,
        offset_kernel_size: int = 6,
        cpb_log_distance: bool = True,
        group_queries: bool = True,
        group_key_values: bool = True,
        num_groups: int | None = None,
        backend: str = 'auto',
    ):
        super().__init__(
            dim,
            dim_head,
            heads,
            num_groups,
            dropout,
            downsample_factor,
            offset_scale,
            offset_groups,
            offset_kernel_size,
            group_queries,
            group_key_values,
            cpb_log_distance,
            backend,
        )


@MODELS.register_module()
class DeformableAttention2D(BakeableAttention):
    """Deformable grouped-query attention of a map, (B, dim, H, W) -> (B, dim, H, W).

    The state_dict is that of the published module, and so are outputs and gradients on
    square maps. On others, each axis has its own size here.

    Args:
        dim: Number of channels.
        dim_head: Channels of a head.
        heads: Query heads Hq.
        num_groups: Key/value heads Hkv; divides ``heads``.
        dropout: Dropout of the attention weights in training, in [0, 1).
        downsample_factor: Pixels between the cells of the sampled grid; one number or
            (height, width).
        offset_scale: Largest offset, in cells; None for ``downsample_factor``.
        offset_groups: Number G of groups of channels and heads with samples of their
            own; None for ``heads``.
        offset_kernel_size: Kernel of the offset network.
        group_queries: Whether the query projection is one for each offset group.
        group_key_values: Whether those of keys and values are.
        backend: Backend of ``deform_sample``, and of ``deform_attn`` if the bias is
            baked.

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For counts that do not divide, a kernel that is smaller than
            ``downsample_factor`` or larger by an odd number, or a rate out of range.

    Source: https://github.com/AbelHutten/deformable-grouped-query-attention, after
    Xia et al. (arXiv 2201.00520) and Ainslie et al. (arXiv 2305.13245).
    """

    conv = nn.Conv2d
    order = (1, 0)
    shape = 'B C H W'

    def __init__(
        self,
        *,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        num_groups: int = 2,
        dropout: float = 0.0,
        downsample_factor: PerAxis = 4,
        offset_scale: float | tuple[float, float] | None = None,
        offset_groups: int | None = None,
        offset_kernel_size: PerAxis = 6,
        group_queries: bool = True,
        group_key_values: bool = True,
        backend: str = 'auto',
    ):
        super().__init__(
            dim,
            dim_head,
            heads,
            num_groups,
            dropout,
            downsample_factor,
            offset_scale,
            offset_groups,
            offset_kernel_size,
            group_queries,
            group_key_values,
            True,
            backend,
        )


@MODELS.register_module()
class DeformableAttention3D(DeformableAttentionBase):
    """Deformable attention of a video, (B, dim, T, H, W) -> (B, dim, T, H, W).

    The state_dict is that of the published module. Keys are sampled at their frame,
    height and width; the published one reads these as x, y and frame.

    Args:
        dim: Number of channels.
        dim_head: Channels of a head.
        heads: Query heads Hq.
        dropout: Dropout of the attention weights in training, in [0, 1).
        downsample_factor: Cells of the map between those of the sampled grid; one
            number or (frames, height, width).
        offset_scale: Largest offset, in cells; None for ``downsample_factor``.
        offset_groups: Number G of groups of channels and heads with samples of their
            own; None for ``heads``.
        offset_kernel_size: Kernel of the offset network.
        group_queries: Whether the query projection is one for each offset group.
        group_key_values: Whether those of keys and values are.
        num_groups: Key/value heads Hkv; None for ``heads``.

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For counts that do not divide, a kernel that is smaller than
            ``downsample_factor`` or larger by an odd number, or a rate out of range.

    Source: https://github.com/lucidrains/deformable-attention.
    """

    conv = nn.Conv3d
    order = (0, 1, 2)
    shape = 'B C T H W'
    scale_is_stored = True

    def __init__(
        self,
        *,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        dropout: float = 0.0,
        downsample_factor: PerAxis = 4,
        offset_scale: float | tuple[float, float, float] | None = None,
        offset_groups: int | None = None,
        offset_kernel_size: PerAxis = 6,
        group_queries: bool = True,
        group_key_values: bool = True,
        num_groups: int | None = None,
    ):
        super().__init__(
            dim,
            dim_head,
            heads,
            num_groups,
            dropout,
            downsample_factor,
            offset_scale,
            offset_groups,
            offset_kernel_size,
            group_queries,
            group_key_values,
            True,
            'auto',
        )
