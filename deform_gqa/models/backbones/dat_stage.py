"""One stage of DAT: blocks of attention and MLP on maps of one size."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmcv.cnn.bricks import DropPath
from mmcv.cnn.bricks.scale import LayerScale
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers.mlp import MLP, ConvMLP
from ..layers.norm import ChannelLayerNorm
from .blocks import build_attention


class DATStage(nn.Module):
    """(B, dim_in, H, W) -> (B, dim, H, W). Parameter names are the official ones.

    Args:
        arch: Complete arch dict (see ``deform_gqa.archs``).
        index: Index of the stage.
        dim_in: Channels of the input.
        attention: Overrides by block letter.
        drop_path_rates: One rate for each block, in [0, 1).
        drop_rate: Dropout of the MLPs, in [0, 1).
        with_cp: Recompute each block in backward instead of keeping its activations.
        shared: Further options of every attention module (see ``blocks.py``).

    Source: ``TransformerStage`` of LeapLabTHU/DAT.
    """

    def __init__(
        self,
        arch: Mapping[str, Any],
        index: int,
        dim_in: int,
        attention: Mapping[str, Any],
        drop_path_rates: Sequence[float],
        drop_rate: float,
        with_cp: bool,
        **shared: Any,
    ):
        super().__init__()
        dim, depth = arch['embed_dims'][index], arch['depths'][index]
        letters = arch['block_types'][index]
        self.with_cp = with_cp
        self.letters = tuple(letters)
        self.proj = nn.Conv2d(dim_in, dim, 1) if dim_in != dim else nn.Identity()
        # X blocks are those of ConvNeXt: one norm, between convolution and MLP.
        self.ln_cnvnxt = nn.ModuleDict(
            {str(d): ChannelLayerNorm(dim) for d in range(depth) if letters[d] == 'X'}
        )
        self.layer_norms = nn.ModuleList(
            ChannelLayerNorm(dim) if letters[d // 2] != 'X' else nn.Identity()
            for d in range(2 * depth)
        )
        mlp_class = ConvMLP if arch['dwconv_mlp'][index] else MLP
        self.mlps = nn.ModuleList(
            mlp_class(dim, arch['mlp_ratio'][index], drop_rate) for _ in range(depth)
        )
        self.attns = nn.ModuleList(
            build_attention(
                letter,
                arch,
                index,
                attention.get(letter, {}),
                dim=dim,
                num_heads=arch['num_heads'][index],
                **shared,
            )
            for letter in letters
        )
        scale = arch['layer_scale'][index]
        self.layer_scales = nn.ModuleList(
            LayerScale(dim, data_format='channels_first', scale=scale)
            if scale > 0
            else nn.Identity()
            for _ in range(2 * depth)
        )
        self.local_perception_units = nn.ModuleList(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
            if arch['lpu'][index]
            else nn.Identity()
            for _ in range(depth)
        )
        self.use_lpu = arch['lpu'][index]
        self.drop_path = nn.ModuleList(
            DropPath(rate) if rate > 0 else nn.Identity() for rate in drop_path_rates
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        for d in range(len(self.letters)):
            if self.with_cp and x.requires_grad:
                x = checkpoint(self._block, x, d, use_reentrant=False)
            else:
                x = self._block(x, d)
        return x

    def _block(self, x: Tensor, d: int) -> Tensor:
        if self.use_lpu:
            x = self._add_lpu(x, d)
        drop_path = self.drop_path[d]
        if self.letters[d] == 'X':
            out = self.mlps[d](self.ln_cnvnxt[str(d)](self.attns[d](x)))
            return x + drop_path(out)
        out = self.attns[d](self.layer_norms[2 * d](x))
        x = x + drop_path(self.layer_scales[2 * d](out))
        out = self.mlps[d](self.layer_norms[2 * d + 1](x))
        return x + drop_path(self.layer_scales[2 * d + 1](out))

    def _add_lpu(self, x: Tensor, d: int) -> Tensor:
        out = self.local_perception_units[d](x)
        # Under autocast, the convolution returns half precision; the maps stay float32.
        return out.add_(x) if out.dtype == x.dtype else out + x
