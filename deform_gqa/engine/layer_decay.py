"""Learning rates that fall from the heads of a detector to the stem of its backbone."""

from numbers import Real

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

__all__ = ['LayerDecayOptimWrapperConstructor']

_PREFIX = 'backbone.'
_TYPES = ('layer_wise', 'stage_wise')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise or stage-wise decay of learning rates, beside mmengine's own rules.

    ``paramwise_cfg`` holds two options more than that of mmengine's constructor, named
    as those of mmdet's LearningRateDecayOptimizerConstructor, which knows ConvNeXt
    alone:

    - ``decay_rate``: in (0, 1]. The learning rate of a layer is that of the next one
      times this rate; what comes after the backbone keeps the whole rate.
    - ``decay_type``: 'layer_wise' (the default), where each block is a layer, or
      'stage_wise', where each stage is one.

    All other options, such as ``norm_decay_mult`` and ``custom_keys``, act as ever; a
    ``lr_mult`` is multiplied with the decay. The number of layers and the layer of each
    parameter come from ``backbone.get_layer_depth``, which DAT has, and also the
    backbones of mmpretrain, for 'layer_wise'.

    Raises:
        TypeError: If ``decay_rate`` is no number, or the backbone has no
            ``get_layer_depth``.
        ValueError: If ``decay_rate`` is missing or out of range, ``decay_type`` is
            unknown, or the optimizer has no ``lr``.

    Source: Bao et al., BEiT (arXiv 2106.08254), and Liu et al., ConvNeXt (arXiv
    2201.03545).
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        rate = self.paramwise_cfg.get('decay_rate')
        if rate is None:
            raise ValueError(
                f'paramwise_cfg needs decay_rate, got {self.paramwise_cfg}'
            )
        if isinstance(rate, bool) or not isinstance(rate, Real):
            raise TypeError(f'decay_rate must be a number, got {rate!r}')
        if not 0 < rate <= 1:
            raise ValueError(f'decay_rate must be in (0, 1], got {rate}')
        kind = self.paramwise_cfg.get('decay_type', _TYPES[0])
        if kind not in _TYPES:
            raise ValueError(f'decay_type must be one of {_TYPES}, got {kind!r}')
        if self.base_lr is None:
            raise ValueError(f'optimizer needs lr, got {self.optimizer_cfg}')

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = '', **options
    ) -> None:
        """mmengine's groups, one for each parameter, with the decayed rates."""
        super().add_params(params, module, prefix=prefix, **options)
        if prefix:
            return  # a module within the model, which has its turn at the end
        backbone = getattr(module, 'backbone', None)
        if not hasattr(backbone, 'get_layer_depth'):
            raise TypeError(
                'layer decay needs a backbone that has get_layer_depth, got '
                f'{type(backbone).__name__}'
            )
        by_stage = self.paramwise_cfg.get('decay_type') == 'stage_wise'
        own_options = dict(by_stage=True) if by_stage else {}
        names = {id(value): name for name, value in module.named_parameters()}
        for group in params:
            [parameter] = group['params']
            depth, num_layers = backbone.get_layer_depth(
                names[id(parameter)], _PREFIX, **own_options
            )
            scale = self.paramwise_cfg['decay_rate'] ** (num_layers - 1 - depth)
            group['lr'] = group.get('lr', self.base_lr) * scale
