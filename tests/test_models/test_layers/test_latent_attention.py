"""Multi-head latent attention against its formulas, and its two forms."""

import math

import pytest
import torch
from torch.testing import assert_close

from deform_gqa.models import MultiHeadLatentAttention
from deform_gqa.models.layers.latent_attention import pixel_positions, rotate

DIM, HEADS = 24, 3


def make(**options):
    torch.manual_seed(0)
    options = {**dict(kv_rank=10, rope_dim=8), **options}
    return MultiHeadLatentAttention(DIM, HEADS, **options).double()


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def complex_rotation(x, y_x, base):
    """Pairs as complex numbers times exp(i angle), one position of one vector."""
    pairs, turned = len(x) // 4, torch.empty_like(x)
    for axis in range(2):
        part = x[axis * 2 * pairs : (axis + 1) * 2 * pairs]
        for i in range(pairs):
            angle = y_x[axis] * base ** (-i / pairs)
            number = torch.complex(part[i], part[pairs + i]) * torch.exp(1j * angle)
            turned[axis * 2 * pairs + i] = number.real
            turned[axis * 2 * pairs + pairs + i] = number.imag
    return turned


def literal(module, x, size):
    """Equations 37 to 47 of the paper, head after head, token after token."""
    positions = pixel_positions(size, x.device).double()
    tokens = x.flatten(2).mT
    heads, width, rope = module.num_heads, module.head_dim, module.rope_dim
    q = module.proj_q(tokens).unflatten(2, (heads, width + rope))
    down = module.kv_down(tokens)
    latent, shared = down[..., : module.kv_rank], down[..., module.kv_rank :]
    size_of = latent.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps
    latent = latent / size_of.sqrt() * module.kv_norm.weight
    k = (latent @ module.proj_k.weight.T).unflatten(2, (heads, width))
    v = (latent @ module.proj_v.weight.T).unflatten(2, (heads, width))

    def turn(vectors):
        rows = [
            torch.stack(
                [
                    complex_rotation(vector, at, module.rope_base)
                    for vector, at in zip(image, positions, strict=True)
                ]
            )
            for image in vectors
        ]
        return torch.stack(rows)

    k_rope, outs = turn(shared), []
    for h in range(heads):
        q_rope = turn(q[:, :, h, width:])
        logits = q[:, :, h, :width] @ k[:, :, h].mT + q_rope @ k_rope.mT
        outs.append((logits / math.sqrt(width + rope)).softmax(-1) @ v[:, :, h])
    out = module.proj_out(torch.cat(outs, dim=2))
    return out.mT.unflatten(2, size)


@pytest.mark.parametrize('q_rank', [None, 7])
@pytest.mark.parametrize('form', ['expanded', 'absorbed'])
def test_literal_formulas(form, q_rank):
    module = make(form=form, q_rank=q_rank)
    torch.nn.init.uniform_(module.kv_norm.weight)
    x = draw(2, DIM, 3, 4).requires_grad_()
    inputs = [x, *module.parameters()]
    actual, expected = module(x), literal(module, x, (3, 4))
    # angles are computed in float64 for float64 tokens
    assert_close(actual, expected)
    weight = draw(2, DIM, 3, 4)
    for a, b in zip(
        torch.autograd.grad(actual, inputs, weight),
        torch.autograd.grad(expected, inputs, weight),
        strict=True,
    ):
        assert_close(a, b)


def test_both_forms_agree_in_float32():
    expanded, absorbed = make(form='expanded').float(), make(form='absorbed').float()
    x = torch.randn(2, DIM, 9, 7)
    assert_close(expanded(x), absorbed(x), rtol=1e-5, atol=1e-5)


def test_auto_takes_the_form_with_fewer_products(monkeypatch):
    module = make(kv_rank=16)
    used = []
    for form in ('_expanded', '_absorbed'):
        function = getattr(module, form)

        def note(*args, function=function, form=form):
            used.append(form)
            return function(*args)

        monkeypatch.setattr(module, form, note)
    x = draw(1, 100, DIM)
    _, cache = module.decode(x)
    module.decode(x[:, :1], cache)
    assert used == ['_expanded', '_absorbed']


@pytest.mark.parametrize('form', ['expanded', 'absorbed', 'auto'])
@pytest.mark.parametrize('steps', [(1,) * 6, (3, 1, 2)])
def test_decoding_equals_the_causal_forward(form, steps):
    module = make(form=form)
    x, positions = draw(2, 6, DIM), pixel_positions((2, 3), torch.device('cpu'))
    for at in (None, positions):
        cache, outs, past = None, [], 0
        for part in x.split(steps, dim=1):
            now = None if at is None else at[past : past + part.shape[1]]
            out, cache = module.decode(part, cache, now)
            outs.append(out)
            past += part.shape[1]
        expected = module.forward_tokens(x, at, is_causal=True)
        assert_close(torch.cat(outs, dim=1), expected)
    assert [tuple(part.shape) for part in cache] == [(2, 6, 10), (2, 6, 8)]


def test_logits_depend_on_differences_of_positions_only():
    q, k = draw(1, 8), draw(1, 8)
    at = torch.tensor([[3.0, 5.0]]), torch.tensor([[1.0, 9.0]])
    shift = torch.tensor([[10.0, -4.0]])
    near, far = (
        (rotate(q, at[0] + move, 50.0) * rotate(k, at[1] + move, 50.0)).sum()
        for move in (0, shift)
    )
    assert_close(near, far, rtol=1e-6, atol=1e-6)
    moved = rotate(q, at[0] + shift, 50.0) * rotate(k, at[1], 50.0)
    assert abs(moved.sum() - near) > 1e-3


def test_angles_are_not_rounded_to_half_precision():
    """bfloat16 has no number between 256 and 258."""
    x, positions = torch.randn(2, 8).bfloat16(), torch.tensor([[257, 3], [0, 301]])
    exact = rotate(x.double(), positions, 100.0)
    assert_close(rotate(x, positions, 100.0).double(), exact, rtol=0, atol=0.02)


def test_defaults_follow_the_paper():
    module = MultiHeadLatentAttention(256, 8)
    assert (module.kv_rank, module.rope_dim) == (128, 16)
    assert MultiHeadLatentAttention(32, 2).kv_rank == 32


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(kv_rank=0), ValueError, 'kv_rank must be at least 1, got 0'),
        (dict(q_rank=0), ValueError, 'q_rank must be at least 1, got 0'),
        (dict(rope_dim=6), ValueError, 'rope_dim must be a multiple of 4, got 6'),
        (dict(rope_base=1), ValueError, 'rope_base must be more than 1, got 1'),
        (dict(rope_base='1'), TypeError, "rope_base must be a number, got '1'"),
        (dict(form='fast'), ValueError, r"form must be one of .*absorbed.* 'fast'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_bad_tokens():
    module = make()
    with pytest.raises(ValueError, match=r'x must have .*= \(1, 4, 24\)'):
        module.forward_tokens(draw(1, 4, 20))
    with pytest.raises(ValueError, match=r'positions must have .*= \(4, 2\)'):
        module.forward_tokens(draw(1, 4, DIM), torch.zeros(3, 2))
    with pytest.raises(TypeError, match='positions must be a tensor, got list'):
        module.forward_tokens(draw(1, 1, DIM), [[0, 0]])
    _, cache = module.decode(draw(1, 4, DIM))
    with pytest.raises(ValueError, match=r'cache must be of 2 sequences .*\[1, 1\]'):
        module.decode(draw(2, 1, DIM), cache)


@pytest.mark.parametrize('form', ['expanded', 'absorbed'])
def test_autocast(form):
    module = make(form=form).float()
    x = torch.randn(1, DIM, 4, 5)
    with torch.autocast('cpu', torch.bfloat16):
        out = module(x)
        decoded, _ = module.decode(x.flatten(2).mT)
    out.float().sum().backward()
    assert out.dtype == decoded.dtype == torch.bfloat16
    assert_close(out.float(), module(x), rtol=0.05, atol=0.05)
    assert all(p.grad.dtype == p.dtype for p in module.parameters())
