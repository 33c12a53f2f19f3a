"""Another attention in a detector that names its attention classes in code."""

import copy
import functools
import inspect
import re

from mmdet.registry import MODELS
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn

from deform_gqa.checks import describe

from .layers.grouped_multihead_attention import GroupedMultiheadAttention
from .layers.registered import describe_kinds

# What the types are made to stand for, unless a rule says otherwise
REPLACES = {
    'MSDeformAttn': 'MultiScaleDeformableAttention',
    'GroupedMultiheadAttention': 'MultiheadAttention',
    'GroupedWindowMSA': 'WindowMSA',
}
KEEP_WEIGHTS = (True, False, 'fitting')


@MODELS.register_module()
def swap_attention(model: dict | nn.Module, rules: list[dict]) -> nn.Module:
    """Builds a model, and puts modules of other classes in the place of some.

    It stands in a config as a type, around the model's own dict; nothing is added to
    the names of parameters. What a module and its successor have in common, options
    and weights, is kept.

    Args:
        model: Config of the model, or the model itself, which is then changed.
        rules: For each, ``pattern``, a regular expression that is searched for in the
            names of modules; ``type``, a class in MODELS; further keys are its
            options. ``replaces`` names the class of the modules to be swapped, with or
            without the package that it comes from: 'WindowMSA',
            'mmcv.MultiheadAttention', 'torch.MultiheadAttention'. By default it is
            'MultiScaleDeformableAttention' for MSDeformAttn, 'MultiheadAttention' for
            GroupedMultiheadAttention, 'WindowMSA' for GroupedWindowMSA, and
            'ShiftWindowMSA' of Swin for classes that take ``dim``, as those of DAT's
            blocks do, which have other weights (``keep_weights=False``). mmcv's
            MultiheadAttention is a shell around torch's, in which the swap then takes
            place. ``keep_weights`` says what becomes of the old weights: True (the
            default), they are all kept or it is an error; 'fitting', those that fit are
            kept, and the log lists the others; False, all are drawn anew. What is kept
            stays frozen if it was.

    Returns:
        The model, or the new module if the model itself is to be swapped (its name is
        ''). A module that stands in several places stays one. A successor is made
        by its class's ``from_module`` or, where there is none, with each option of its
        class that the old module has as an attribute. If both are OpenMMLab's
        BaseModules, it is an instance of the old class as well: detectors initialise
        their attention modules by class.

    Raises:
        TypeError: For an option that a class does not take, or a model or a rule of the
            wrong type.
        ValueError: For a rule without ``pattern`` or ``type``, with a pattern that is
            no regular expression, an unknown type or ``keep_weights``, or one that fits
            no module; or if the weights do not fit, as with fewer kv heads. Each says
            what there is.
    """
    model = MODELS.build(model) if isinstance(model, dict) else model
    if not isinstance(model, nn.Module):
        raise TypeError(f'model must be a dict or a module, got {describe(model)}')
    if not isinstance(rules, (list, tuple)):
        raise TypeError(f'rules must be dicts in a list, got {describe(rules)}')
    for rule in rules:
        model = _apply(model, rule)
    return model


def _apply(model: nn.Module, rule: dict) -> nn.Module:
    if not isinstance(rule, dict):
        raise TypeError(f'rules must be dicts in a list, got {describe(rule)}')
    options = dict(rule)
    for name in ('pattern', 'type'):
        if name not in options:
            raise ValueError(f'a rule of swap_attention needs {name!r}, got {rule}')
    pattern = _compile(options.pop('pattern'))
    keep_weights = options.pop('keep_weights', True)
    if keep_weights not in KEEP_WEIGHTS:
        raise ValueError(
            f'keep_weights must be one of {KEEP_WEIGHTS}, got {keep_weights!r}'
        )
    kind = options.pop('type')
    cls = MODELS.get(kind) if isinstance(kind, str) else kind
    if cls is None:
        raise ValueError(f'{kind!r} is not registered in MODELS; {describe_kinds()}')
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f'type must be a class of modules, got {describe(kind)}')
    replaced = options.pop('replaces', _default_of(cls))
    if not isinstance(replaced, str):
        raise TypeError(f'replaces must name a class, got {describe(replaced)}')
    names = _find(model, pattern, replaced)
    if not names:
        raise ValueError(
            f'no {replaced} of the model has a name that fits {rule}; '
            f'{_attention_of(model)}'
        )
    found = [(name, model.get_submodule(name)) for name in names]
    made: dict[nn.Module, nn.Module] = {}
    for name, old in found:
        if old not in made:
            made[old] = _replacement(name, old, cls, options, keep_weights)
        if name == '':
            return made[old]
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, made[old])
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # which torch's own attention alone takes
    return model


def _compile(pattern: str) -> re.Pattern:
    if not isinstance(pattern, str):
        raise TypeError(f'pattern must be a string, got {describe(pattern)}')
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f'pattern must be a regular expression, got {pattern!r}: {error}'
        ) from error


def _default_of(cls: type) -> str:
    """The class that a type stands for."""
    if _maps(cls):
        return 'ShiftWindowMSA'
    return REPLACES.get(cls.__name__, 'MultiScaleDeformableAttention')


def _maps(cls: type) -> bool:
    """Whether a class has the interface of DAT's blocks: ``dim``, maps in and out."""
    return 'dim' in inspect.signature(cls).parameters


def _find(model: nn.Module, pattern: re.Pattern, replaced: str) -> list[str]:
    """Names of the modules to be swapped, none of them within another."""
    package, _, class_name = replaced.rpartition('.')
    found = []
    for name, module in model.named_modules(remove_duplicate=False):
        cls = type(module)
        fits = cls.__name__ == class_name and pattern.search(name)
        if not fits or package not in ('', cls.__module__.split('.')[0]):
            continue
        if not any(name.startswith(outer and f'{outer}.') for outer in found):
            found.append(name)
    return found


def _attention_of(model: nn.Module) -> str:
    """What could be swapped: attention by its class, and one name of each."""
    examples = {}
    for name, module in model.named_modules():
        if re.search('Attention|Attn|MSA', type(module).__name__):
            examples.setdefault(type(module).__name__, name)
    listed = ', '.join(f'{cls} (as {name})' for cls, name in sorted(examples.items()))
    return f'its attention modules are {listed or "none"}'


class WithoutWeights(GroupedMultiheadAttention):
    """In the shell of mmcv, which drops the attention weights: they are not made."""

    def forward(self, *args, **kwargs) -> tuple[Tensor, None]:
        return super().forward(*args, **kwargs, need_weights=False)


class MapAttention(nn.Module):
    """Attention of maps where Swin's blocks have ShiftWindowMSA.

    Args:
        attention: Maps (B, C, H, W) to (B, C, H, W).
        drop: The stochastic depth of the block.
    """

    def __init__(self, attention: nn.Module, drop: nn.Module):
        super().__init__()
        self.attention, self.drop = attention, drop

    def forward(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Tokens (B, H * W, C) -> (B, H * W, C)."""
        out = self.attention(query.transpose(1, 2).unflatten(2, tuple(hw_shape)))
        return self.drop(out.flatten(2).transpose(1, 2))


def _replacement(
    name: str, old: nn.Module, cls: type, options: dict, keep_weights
) -> nn.Module:
    if issubclass(cls, GroupedMultiheadAttention):
        inner = getattr(old, 'attn', None)
        if isinstance(inner, nn.MultiheadAttention):
            old.attn = _new_module(
                f'{name}.attn', inner, WithoutWeights, options, keep_weights
            )
            return old
        if not isinstance(old, nn.MultiheadAttention):
            raise ValueError(
                f"{cls.__name__} stands for torch's MultiheadAttention or mmcv's, but "
                f'{name} is a {type(old).__name__}'
            )
    return _new_module(name, old, cls, options, keep_weights)


def _new_module(
    name: str, old: nn.Module, cls: type, options: dict, keep_weights
) -> nn.Module:
    new = _successor(old, cls, options)
    if keep_weights:
        _copy_weights(name, old, new, all_of_them=keep_weights != 'fitting')
    return new


def _successor(old: nn.Module, cls: type, options: dict) -> nn.Module:
    options = copy.deepcopy(options)
    if hasattr(cls, 'from_module'):
        new = cls.from_module(old, **options)
    elif type(old).__name__ == 'ShiftWindowMSA' and _maps(cls):
        window = old.w_msa
        options.setdefault('dim', window.embed_dims)
        if 'num_heads' in inspect.signature(cls).parameters:
            options.setdefault('num_heads', window.num_heads)
        new = MapAttention(cls(**options), old.drop)
        new.to(window.qkv.weight).train(old.training)
    else:
        for name in inspect.signature(cls).parameters:
            if hasattr(old, name):
                options.setdefault(name, _option(getattr(old, name)))
        new = cls(**options)
        parameter = next(old.parameters())
        new.to(parameter.device, parameter.dtype).train(old.training)
    if isinstance(old, BaseModule) and isinstance(new, BaseModule):
        new.__class__ = _instance_of_both(type(new), type(old))
    return new


def _option(attribute):
    """Dropout is kept as a module, and given as a rate."""
    return attribute.p if isinstance(attribute, nn.Dropout) else attribute


@functools.cache
def _instance_of_both(new: type, old: type) -> type:
    members = dict(__doc__=new.__doc__, __reduce__=_reduce)
    return type(new.__name__, (new, old), members)


def _reduce(module: nn.Module):
    """For pickle, which finds no class that is made at run time."""
    return _unpickled, type(module).__bases__, module.__dict__


def _unpickled(new: type, old: type) -> nn.Module:
    cls = _instance_of_both(new, old)
    return cls.__new__(cls)


def _copy_weights(name: str, old: nn.Module, new: nn.Module, all_of_them: bool) -> None:
    source, target = old.state_dict(), new.state_dict()
    fitting = {
        key: x
        for key, x in source.items()
        if key in target and target[key].shape == x.shape
    }
    misfits = [
        f'{key}: {_shape(source, key)} -> {_shape(target, key)}'
        for key in dict.fromkeys([*source, *target])
        if key not in fitting
    ]
    if misfits and all_of_them:
        raise ValueError(
            f'the weights of {name} do not fit {type(new).__name__}: '
            f"{'; '.join(misfits)}. A rule with keep_weights='fitting' keeps the "
            'others, one with keep_weights=False none'
        )
    new.load_state_dict(fitting, strict=False)
    for key, parameter in old.named_parameters():
        if key in fitting:
            new.get_parameter(key).requires_grad_(parameter.requires_grad)
    if misfits:
        text = f'swap_attention: new weights in {name}: {"; ".join(misfits)}'
        print_log(text, logger='current')


def _shape(state: dict, key: str) -> str:
    return str(tuple(state[key].shape)) if key in state else 'none'
