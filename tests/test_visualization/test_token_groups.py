import numpy as np
import pytest
import torch

from deform_gqa.visualization import visualize_attention

WORDS = ['the', 'cat', '$', 'dog', '.']
GROUPS = [1, 0, 1, 0, -1]
ORDER = [1, 3, 0, 2, 4]


def weights(*shape):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return logits.softmax(-1)


@pytest.mark.parametrize('heads', [None, 3])
@pytest.mark.parametrize('as_tensors', [False, True])
def test_tokens_stand_in_the_order_of_their_groups(heads, as_tensors, tmp_path):
    scores = weights(5, 5) if heads is None else weights(heads, 5, 5)
    tokens = torch.tensor([7, 3, 9, 2, 0]) if as_tensors else WORDS
    groups = torch.tensor(GROUPS) if as_tensors else GROUPS
    figure = visualize_attention(scores, tokens, groups)
    axes = figure.axes[0]
    mean = scores if heads is None else scores.mean(0)
    drawn = axes.images[0].get_array()
    np.testing.assert_allclose(drawn, mean[ORDER][:, ORDER].numpy())
    names = (
        ['3', '2', '7', '9', '0'] if as_tensors else ['cat', 'dog', 'the', r'\$', '.']
    )
    for axis in (axes.xaxis, axes.yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == names
    assert [text.get_text() for text in axes.texts] == [
        'group 0',
        'group 1',
        'no group',
    ]
    frames = [(patch.get_x(), patch.get_width()) for patch in axes.patches]
    assert frames == [(-0.5, 2), (1.5, 2), (3.5, 1)]
    colours = [label.get_color() for label in axes.xaxis.get_ticklabels()]
    assert colours[0] == colours[1] != colours[2] == colours[3] != colours[4]
    figure.savefig(tmp_path / 'groups.png')
    assert (tmp_path / 'groups.png').read_bytes().startswith(b'\x89PNG')


def test_long_sequences_have_no_labels():
    figure = visualize_attention(weights(100, 100), range(100), [0] * 100)
    assert not figure.axes[0].get_xticklabels()
    assert max(figure.get_size_inches()) <= 21


@pytest.mark.parametrize(
    ('scores', 'tokens', 'groups', 'error', 'message'),
    [
        ([[1.0]], ['a'], [0], TypeError, r'attention_scores must be a torch\.Tensor'),
        (
            weights(2, 3),
            WORDS,
            GROUPS,
            ValueError,
            r'shape \(n, n\) or \(h, n, n\), got',
        ),
        (
            weights(5, 5),
            WORDS[1:],
            GROUPS,
            ValueError,
            'input_ids must hold 5 .* got 4',
        ),
        (
            weights(5, 5),
            WORDS,
            GROUPS[1:],
            ValueError,
            'group_ids must hold 5 .* got 4',
        ),
        (weights(1, 1), ['a'], [0.5], TypeError, 'group_ids must be integers, got 0.5'),
        (
            weights(1, 1),
            ['a'],
            [-2],
            ValueError,
            'group_ids must be at least -1, got -2',
        ),
    ],
)
def test_wrong_arguments(scores, tokens, groups, error, message):
    with pytest.raises(error, match=message):
        visualize_attention(scores, tokens, groups)
