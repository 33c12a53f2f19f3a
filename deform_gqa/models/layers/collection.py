"""Names of a public collection of attention modules, and what they are called here.

The collection writes each kind of attention for a sequence of words, one head after the
other, and the einsum forms of "Fast Transformer Decoding" as functions. ``MODULES`` is
the table of the modules' names; :func:`from_collection` builds one by its name and
arguments there. The functions stand here under their names there.

What differs: modules here end with one projection to ``dim`` channels, those of the
collection to ``embed_dim``, that is the width of one head, and its grouped queries have
two projections one after the other, whose product is one. A single head of the
collection has none; here it has one like the others. Masks mean the same: True where
attention is allowed.
"""

from typing import Any

from torch import nn

from .dense_attention import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiQueryAttention,
    SingleHeadAttention,
)
from .linformer import LinformerAttention
from .projected_attention import (
    dot_product_attention,
    projected_attention,
    projected_attention_step,
)

_WIDTHS = {
    'word_size': 'dim',
    'd_model': 'dim',
    'embed_dim': 'head_dim',
    'head_dim': 'head_dim',
}
# Arguments without a default, there as here
_REQUIRED = {
    'LinearSelfAttention': ('n',),
    'Linformer': ('proj_E', 'proj_F'),
    'MultiheadLinformer': ('proj_E', 'proj_F'),
}
_PROJECTIONS = {'proj_E': 'proj_E', 'proj_F': 'proj_F'}
# name -> (class here, {argument there: option here}, further options here)
MODULES: dict[str, tuple[type[nn.Module], dict[str, str], dict[str, Any]]] = {
    'Attention': (SingleHeadAttention, _WIDTHS, {}),
    'MultiheadAttention': (
        MultiHeadAttention,
        {**_WIDTHS, 'n_head': 'num_heads'},
        dict(num_heads=8),
    ),
    'MultiQueryAttention': (
        MultiQueryAttention,
        {**_WIDTHS, 'n_query': 'n_query'},
        dict(n_query=8),
    ),
    'GroupedQueryAttention': (
        GroupedQueryAttention,
        {
            **_WIDTHS,
            'n_grouped': 'n_grouped',
            'n_query_each_group': 'n_query_each_group',
        },
        dict(n_grouped=4, n_query_each_group=2),
    ),
    'LinearSelfAttention': (
        LinformerAttention,
        {**_WIDTHS, 'n': 'n', 'k': 'k'},
        dict(num_heads=1),
    ),
    'Linformer': (LinformerAttention, {**_WIDTHS, **_PROJECTIONS}, dict(num_heads=1)),
    'MultiheadLinformer': (
        LinformerAttention,
        {**_WIDTHS, **_PROJECTIONS, 'n_head': 'num_heads', 'sharing': 'sharing'},
        dict(num_heads=12, sharing='not-share'),
    ),
}


def from_collection(name: str, **arguments: Any) -> nn.Module:
    """The module that is called so in the collection, by its arguments there.

    Args:
        name: A key of ``MODULES``.
        arguments: Those of the collection, by name. ``word_size`` (or ``d_model``)
            defaults to 512 and ``embed_dim`` (or ``head_dim``) to 64, as there.

    Raises:
        TypeError: For an argument that the collection's module does not take, or one
            that it needs and is missing.
        ValueError: For an unknown name, or numbers that do not fit.
    """
    if name not in MODULES:
        raise ValueError(f'name must be one of {tuple(MODULES)}, got {name!r}')
    module_class, names, defaults = MODULES[name]
    unknown = sorted(set(arguments) - set(names))
    if unknown:
        raise TypeError(f'{name} takes {tuple(names)}, got {unknown[0]!r}')
    for needed in _REQUIRED.get(name, ()):
        if needed not in arguments:
            raise TypeError(f'{name} needs {needed}')
    options = dict(dim=512, head_dim=64, **defaults)
    options |= {names[key]: value for key, value in arguments.items()}
    if name == 'LinearSelfAttention':
        options.setdefault('k', options['n'] // 4)
    if name == 'MultiheadLinformer':
        options |= _sizes_of_projections(options)
    return module_class(**options)


def _sizes_of_projections(options: dict[str, Any]) -> dict[str, Any]:
    """There, projections are always given, and tell the sizes of those made inside."""
    proj_E = options['proj_E']
    changed = dict(n=proj_E.size, k=proj_E.k)
    if options['sharing'] != 'headwise':
        changed['proj_F'] = None
    if options['sharing'] == 'not-share':
        changed['proj_E'] = None
    return changed


def multiheadAttentionBatched(X, M, mask, P_q, P_k, P_v, P_o):
    """:func:`.projected_attention` with the mask in the collection's place."""
    return projected_attention(X, M, P_q, P_k, P_v, P_o, mask)


# The other functions take the same arguments in the same order.
dotProductAttention = dot_product_attention
multiheadAttention = projected_attention
multiheadSelfAttentionIncremental = projected_attention_step
multiqueryAttentionBatched = multiheadAttentionBatched
multiquerySelfAttentionIncremental = projected_attention_step
