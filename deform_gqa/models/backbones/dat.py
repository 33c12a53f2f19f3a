"""DAT and DAT++ backbones with grouped-query heads."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deform_gqa.archs import NUM_STAGES, resolve_arch
from deform_gqa.checks import check_int, check_rate
from deform_gqa.ops.common.backends import check_backend

from ..layers.linformer import share_projections
from ..layers.norm import ChannelLayerNorm
from .blocks import check_letters, resolve_overrides
from .dat_checkpoint import load_dat_checkpoint
from .dat_stage import DATStage

MIN_IMAGE_SIDE = 32  # pixels


@MODELS.register_module()
class DAT(BaseModule):
    """Vision transformer with deformable attention: images to maps at strides 4 to 32.

    Takes images (B, 3, H, W) of 32 x 32 pixels and more, square or not, padded or not,
    and returns a tuple of maps (B, C_i, H / 4 / 2^i, W / 4 / 2^i), one for each of
    ``out_indices`` (sides round up with ``conv_stem``, down without).

    Args:
        arch: 't', 's', 'b' (DAT), 't++', 's++', 'b++' (DAT++) or 'mini' (a DAT++ of 2
            million parameters, for small images), or a dict with the options of
            ``deform_gqa.archs.ARCH_DEFAULTS``. Block letters are L (window), S (shifted
            window), N (neighborhood), D (deformable), P (pyramid), X (depthwise
            convolution), or new ones that ``attention`` defines.
        num_kv_heads: Key/value heads of every attention block: None for as many as
            query heads, one number, or one for each stage.
        attention: Maps a block letter to what its blocks build,
            ``dict(type=..., ...)``. If the letter keeps its default class, the options
            are added to those of the arch; another class gets only dim, num_heads,
            num_kv_heads, the drop rates, the backend and its own options.
        out_indices: Stages whose (normalised) maps are returned, of 0 to 3, in rising
            order. Stages after the last of them are not built.
        drop_rate: Dropout of projections and MLPs, in [0, 1).
        attn_drop_rate: Dropout of attention weights, in [0, 1).
        drop_path_rate: Stochastic depth of the last block, in [0, 1); it rises linearly
            from 0 at the first block.
        with_cp: Activation checkpointing of every block, or one flag for each stage:
            the first stages hold most of the activations.
        frozen_stages: -1 for none, 0 for the stem, n for the stem and n stages.
        norm_eval: Keep the batch norms that attention classes of your own may have in
            eval mode.
        backend: Backend of the attention ops: 'auto', 'naive', 'torch' or 'triton'.
        init_cfg: As in mmengine. ``dict(type='Pretrained', checkpoint=...)`` also loads
            official DAT checkpoints of the classification and the detection repository;
            it takes mmengine's ``prefix`` and ``map_location``, and ``convert_heads``
            for weights of more kv heads than the backbone has: the ``merge`` of
            :func:`deform_gqa.conversion.convert_state_dict`, such as 'mean', or a dict
            with options of that function. In a list of several initialisations it is
            mmengine's own, which neither resamples bias tables nor converts heads.

    Raises:
        TypeError: For an attention option that its class does not take, or an option
            of the wrong type.
        ValueError: For any other option out of range, naming it and its value; in
            ``forward`` for images of less than 32 x 32 pixels.

    Source: Xia et al. (arXiv 2201.00520, 2309.01430), LeapLabTHU/DAT and
    LeapLabTHU/DAT-Detection.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 't++',
        num_kv_heads: int | Sequence[int] | None = None,
        attention: Mapping[str, Any] | None = None,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        with_cp: bool | Sequence[bool] = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        backend: str = 'auto',
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        self.arch = resolve_arch(arch)
        attention = resolve_overrides(attention)
        check_letters(self.arch['block_types'], attention)
        kv_heads = self._by_stage('num_kv_heads', num_kv_heads, 'integer')
        checkpointed = self._by_stage('with_cp', with_cp, 'flag')
        self._check(out_indices, frozen_stages)
        for name, rate in (
            ('drop_rate', drop_rate),
            ('attn_drop_rate', attn_drop_rate),
            ('drop_path_rate', drop_path_rate),
        ):
            check_rate(name, rate)
        check_backend(backend)
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

        dims, depths = self.arch['embed_dims'], self.arch['depths']
        num_stages = self.out_indices[-1] + 1
        last = max(sum(depths) - 1, 1)
        rates = [drop_path_rate * block / last for block in range(sum(depths))]
        self.patch_proj = self._stem(self.arch['stem_dim'])
        self.stages = nn.ModuleList(
            DATStage(
                self.arch,
                i,
                dim_in=dims[i] if i else self.arch['stem_dim'],
                attention=attention,
                drop_path_rates=rates[sum(depths[:i]) : sum(depths[: i + 1])],
                drop_rate=drop_rate,
                with_cp=checkpointed[i],
                num_kv_heads=kv_heads[i],
                attn_drop=attn_drop_rate,
                proj_drop=drop_rate,
                backend=backend,
            )
            for i in range(num_stages)
        )
        self.norms = nn.ModuleList(
            ChannelLayerNorm(dims[i]) if i in self.out_indices else nn.Identity()
            for i in range(num_stages)
        )
        kernel = (3, 2, 1) if self.arch['conv_stem'] else (2, 2, 0)
        self.down_projs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dims[i], dims[i + 1], *kernel, bias=False),
                ChannelLayerNorm(dims[i + 1]),
            )
            for i in range(num_stages - 1)
        )
        share_projections(self)
        self._freeze()

    @staticmethod
    def _by_stage(name: str, value, kind: str) -> Sequence:
        """One entry for each stage, from one value for all or from a list."""
        if value is None or isinstance(value, Integral):
            return (value,) * NUM_STAGES
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(
                f'{name} must be one {kind} or a list of {NUM_STAGES}, got {value!r}'
            )
        if len(value) != NUM_STAGES:
            raise ValueError(f'{name} must be one value or {NUM_STAGES}, got {value}')
        return value

    @staticmethod
    def _check(out_indices: Sequence[int], frozen_stages: int) -> None:
        if not isinstance(out_indices, Sequence):
            raise TypeError(f'out_indices must be a list, got {out_indices!r}')
        for index in out_indices:
            check_int('out_indices', index)
        if not out_indices or not set(out_indices) <= set(range(NUM_STAGES)):
            raise ValueError(
                f'out_indices must be among 0 to {NUM_STAGES - 1}, got {out_indices}'
            )
        if list(out_indices) != sorted(set(out_indices)):
            raise ValueError(
                f'out_indices must rise, as the maps come in that order, got '
                f'{out_indices}'
            )
        check_int('frozen_stages', frozen_stages, -1)
        num_stages = out_indices[-1] + 1
        if frozen_stages > num_stages:
            raise ValueError(
                f'frozen_stages must be from -1 to {num_stages}, the stages up to the '
                f'last of out_indices={out_indices}, got {frozen_stages}'
            )

    def _stem(self, dim: int) -> nn.Sequential:
        if not self.arch['conv_stem']:
            return nn.Sequential(nn.Conv2d(3, dim, 4, 4), ChannelLayerNorm(dim))
        return nn.Sequential(
            nn.Conv2d(3, dim // 2, 3, 2, 1),
            ChannelLayerNorm(dim // 2),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, 2, 1),
            ChannelLayerNorm(dim),
        )

    def init_weights(self) -> None:
        """Loads ``init_cfg``'s checkpoint, or initialises as ``init_cfg`` says.

        Raises:
            ValueError: For an option of 'Pretrained' that is missing or unknown, or a
                checkpoint that does not fit.
        """
        cfg = self.init_cfg
        if not isinstance(cfg, Mapping) or cfg.get('type') != 'Pretrained':
            super().init_weights()
            return
        options = {name: value for name, value in cfg.items() if name != 'type'}
        known = {'checkpoint', 'prefix', 'map_location', 'convert_heads'}
        if 'checkpoint' not in options or not set(options) <= known:
            raise ValueError(
                "init_cfg of type 'Pretrained' takes checkpoint and, if needed, "
                f'prefix, map_location and convert_heads, got {dict(cfg)}'
            )
        load_dat_checkpoint(self, **options)
        self._is_init = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        least = MIN_IMAGE_SIDE
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < least:
            raise ValueError(
                f'images must be (B, 3, H, W) of at least {least} x {least}, got '
                f'{tuple(x.shape)}'
            )
        x = self.patch_proj(x)
        outs = []
        for i, stage in enumerate(self.stages):
            if i > 0:
                x = self.down_projs[i - 1](x)
            x = stage(x)
            if i in self.out_indices:
                outs.append(self.norms[i](x).contiguous())
        return tuple(outs)

    def get_layer_depth(
        self, param_name: str, prefix: str = '', by_stage: bool = False
    ) -> tuple[int, int]:
        """The layer that a parameter belongs to, for layer-wise learning rates.

        Args:
            param_name: Its name in the detector, or in the backbone.
            prefix: What the names of the backbone's parameters begin with.
            by_stage: Whether a layer is a whole stage rather than a block.

        Returns:
            The number of its layer, and that of all layers. The stem is layer 0; what
            comes after the backbone, and the norms of the maps that it returns, which
            no classifier has trained, are the last layer.
        """
        depths = [len(stage.letters) for stage in self.stages]
        num_layers = (len(depths) if by_stage else sum(depths)) + 2
        name = param_name.removeprefix(prefix)
        part, *rest = name.split('.')
        outside = not param_name.startswith(prefix)
        if outside or part not in ('patch_proj', 'down_projs', 'stages'):
            return num_layers - 1, num_layers
        if part == 'patch_proj':
            return 0, num_layers
        stage, block = int(rest[0]), 0
        if part == 'down_projs':
            stage += 1  # it leads to the next stage
        elif rest[1] != 'proj':
            each = 2 if rest[1] in ('layer_norms', 'layer_scales') else 1
            block = int(rest[2]) // each
        return (stage if by_stage else sum(depths[:stage]) + block) + 1, num_layers

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen = [self.patch_proj]
        for i in range(self.frozen_stages):
            frozen += [self.stages[i], self.norms[i]]
            if i > 0:
                frozen.append(self.down_projs[i - 1])
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> 'DAT':
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self
