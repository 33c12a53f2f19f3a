"""Pictures of tokens that attend within groups."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

_CELL_INCHES = 0.24
_ROOM_INCHES = 1.8  # for the labels
_LARGEST_INCHES = 20.0
_MAX_LABELS = 96  # beyond, they would not be legible
_NO_GROUP = '#B0B0B0'
# Of Okabe and Ito, colour-blind-safe; then again, with the number to tell them apart.
_COLOURS = (
    '#0072B2',
    '#E69F00',
    '#009E73',
    '#D55E00',
    '#56B4E9',
    '#CC79A7',
)


def visualize_attention(
    attention_scores: Tensor,
    input_ids: Sequence[str] | Sequence[int] | Tensor,
    group_ids: Sequence[int] | Tensor,
):
    """Attention weights of the tokens of a sequence, those of a group side by side.

    Tokens stand in the order of their groups, and within a group in that of the
    sequence. A group has a frame around the weights between its tokens, and its colour
    and number beside them; tokens of the group -1 come last, in grey.

    Args:
        attention_scores: (n, n), or (h, n, n), whose mean over the heads is drawn:
            attention weights, a row for each query. ``scaled_dot_product_gqa(q, k, v,
            mask=same_group, need_weights=True)`` gives those of
            :func:`deform_gqa.ops.group_attention`, with the heads in the last place.
        input_ids: n tokens, as text or as the numbers that a tokenizer gives them.
        group_ids: (n,) integers from -1, as :func:`deform_gqa.ops.group_queries`
            returns them for one sample.

    Returns:
        A matplotlib Figure, which needs no display.

    Raises:
        TypeError: For scores that are no tensor, or group ids that are not integers.
        ValueError: For shapes that do not fit, or ids below -1.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scores, tokens, groups = _check(attention_scores, input_ids, group_ids)
    last = np.where(groups < 0, groups.max(initial=0) + 1, groups)
    order = np.argsort(last, kind='stable')
    scores, groups = scores[np.ix_(order, order)], groups[order]
    side = min(_ROOM_INCHES + _CELL_INCHES * len(order), _LARGEST_INCHES)
    figure = Figure((side + 1, side), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    picture = axes.imshow(scores, cmap='Greys', vmin=0)
    figure.colorbar(picture, label='attention weight', shrink=0.6)
    axes.set(xlabel='key', ylabel='query')
    _frame_groups(axes, groups)
    _label_tokens(axes, [tokens[i] for i in order], groups)
    return figure


def _check(
    scores: Tensor, tokens: Sequence | Tensor, groups: Sequence | Tensor
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Scores (n, n), names of the tokens, and group ids (n,)."""
    if not isinstance(scores, Tensor):
        raise TypeError(
            f'attention_scores must be a torch.Tensor, got {type(scores).__name__}'
        )
    shape = tuple(scores.shape)
    if scores.ndim not in (2, 3) or shape[-1] != shape[-2] or 0 in shape:
        raise ValueError(
            f'attention_scores must have shape (n, n) or (h, n, n), got {shape}'
        )
    if scores.ndim == 3:
        scores = scores.mean(dim=0)
    tokens = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
    groups = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    for name, values in (('input_ids', tokens), ('group_ids', groups)):
        if len(values) != shape[-1]:
            raise ValueError(
                f'{name} must hold {shape[-1]} tokens, as attention_scores do, got '
                f'{len(values)}'
            )
    for group in groups:
        if not isinstance(group, int):
            raise TypeError(f'group_ids must be integers, got {group!r}')
        if group < -1:
            raise ValueError(f'group_ids must be at least -1, got {group}')
    return (
        scores.detach().float().cpu().numpy(),
        list(map(str, tokens)),
        np.array(groups),
    )


def _colour(group: int) -> str:
    return _NO_GROUP if group < 0 else _COLOURS[group % len(_COLOURS)]


def _frame_groups(axes, groups: np.ndarray) -> None:
    """A frame around the pairs of each group, with its number."""
    from matplotlib.patches import Rectangle

    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    for first, end in zip(starts, [*starts[1:], len(groups)], strict=True):
        group = int(groups[first])
        corner, side = (first - 0.5, first - 0.5), end - first
        colour = _colour(group)
        frame = Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=2)
        axes.add_patch(frame)
        name = 'no group' if group < 0 else f'group {group}'
        middle = first + (side - 1) / 2
        axes.text(
            len(groups), middle, name, color=colour, va='center', fontweight='bold'
        )


def _label_tokens(axes, tokens: Sequence[str], groups: np.ndarray) -> None:
    """The tokens along both axes, in the colours of their groups."""
    if len(tokens) > _MAX_LABELS:
        axes.set_xticks([])
        axes.set_yticks([])
        return
    places = range(len(tokens))
    # A dollar sign would begin a formula.
    names = [token.replace('$', r'\$') for token in tokens]
    axes.set_xticks(places, names, rotation=90)
    axes.set_yticks(places, names)
    for axis in (axes.xaxis, axes.yaxis):
        for label, group in zip(axis.get_ticklabels(), groups, strict=True):
            label.set_color(_colour(int(group)))
