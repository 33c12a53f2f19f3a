"""projects/text_gqa: GQATransformer, GQATransformerLM and what they are built on."""

import cmath
import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from projects.text_gqa.text_gqa import (
    GQATransformer,
    GQATransformerDecoderLayer,
    GQATransformerEncoderLayer,
    GQATransformerLM,
    KVCache,
)
from projects.text_gqa.text_gqa.transformer import magneto_gammas
from projects.text_gqa.text_gqa.xpos import XPOS

TOKENS, CHANNELS, HEADS, LENGTH = 30, 24, 4, 9
SMALL = dict(
    d_model=CHANNELS,
    nhead=HEADS,
    num_encoder_layers=2,
    num_decoder_layers=3,
    dim_feedforward=40,
)


def make_lm(kv_heads=2, **options):
    torch.manual_seed(0)
    return GQATransformerLM(
        TOKENS, kv_heads=kv_heads, dtype=torch.float64, **{**SMALL, **options}
    ).eval()


def make_tokens(length=LENGTH):
    return torch.randint(TOKENS, (2, length), generator=torch.manual_seed(1))


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
def test_steps_of_any_size_equal_the_whole(kv_heads):
    lm, tokens = make_lm(kv_heads), make_tokens()
    cache = KVCache()
    steps = [lm(part, cache=cache) for part in tokens.split([3, 1, 1, 2, 2], dim=1)]
    assert_close(torch.cat(steps, dim=1), lm(tokens), rtol=0, atol=1e-10)
    assert cache.length == LENGTH


def test_cache_holds_kv_heads_alone():
    """Keys and values of encoder, decoder and memory: 2 x (2 + 2 x 3) tensors."""
    sizes = {}
    for kv_heads in (1, 2, 4):
        cache = KVCache()
        assert cache.length == cache.num_bytes == 0
        make_lm(kv_heads)(make_tokens(), cache=cache)
        sizes[kv_heads] = cache.num_bytes
    one_head = 2 * 8 * 2 * LENGTH * (CHANNELS // HEADS) * 8
    assert sizes == {1: one_head, 2: 2 * one_head, 4: 4 * one_head}


def test_generate_takes_the_most_probable_tokens():
    lm, expected = make_lm(), make_tokens(3)
    actual = lm.generate(expected, 6)
    for _ in range(6):
        new = lm(expected)[:, -1:].argmax(dim=-1)
        expected = torch.cat([expected, new], dim=1)
    assert actual.equal(expected)
    assert len(actual[:, 3:].unique()) > 2  # not one token again and again
    assert lm.generate(expected, 0).equal(expected)


@pytest.mark.parametrize('is_causal', [True, False])
def test_what_an_output_depends_on(is_causal):
    net = make_lm().transformer
    x = torch.randn(1, LENGTH, CHANNELS, dtype=torch.float64, requires_grad=True)
    [grad] = torch.autograd.grad(net(x, is_causal=is_causal)[0, 4].sum(), x)
    touched = grad[0].abs().sum(-1) > 0
    assert touched.tolist() == [i <= 4 or not is_causal for i in range(LENGTH)]


def test_is_causal_is_the_default():
    lm, tokens = make_lm(), make_tokens()
    assert_close(lm(tokens), lm(tokens, is_causal=True))
    assert (lm(tokens) - lm(tokens, is_causal=False)).abs().max() > 0.1


def attend_plainly(attention, x, memory, is_causal):
    """Keys and values repeated for every query head."""
    q, k, v = (
        projection(y).unflatten(-1, (-1, CHANNELS // HEADS)).transpose(1, 2)
        for projection, y in (
            (attention.q_proj, x),
            (attention.k_proj, memory),
            (attention.v_proj, memory),
        )
    )
    k, v = (y.repeat_interleave(HEADS // y.shape[1], dim=1) for y in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    out = out.transpose(1, 2).flatten(2)
    if attention.norm is not None:
        out = attention.norm(out)
    return attention.out_proj(out)


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
@pytest.mark.parametrize('is_causal', [True, False])
def test_layers_are_those_of_magneto(kv_heads, is_causal):
    torch.manual_seed(0)
    options = dict(dim_feedforward=40, activation='gelu')
    encoder = GQATransformerEncoderLayer(CHANNELS, HEADS, kv_heads, **options)
    decoder = GQATransformerDecoderLayer(CHANNELS, HEADS, kv_heads, **options)
    encoder.double().eval()
    decoder.double().eval()
    x, memory = torch.randn(2, 2, LENGTH, CHANNELS, dtype=torch.float64)

    def feed_forward(layer, y, first, second):
        hidden = F.gelu(layer.linear1(first(y)))
        return y + layer.linear2(second(hidden))

    y = encoder.norm1(x)
    y = x + attend_plainly(encoder.self_attn, y, y, is_causal)
    expected = feed_forward(encoder, y, encoder.norm2, encoder.norm3)
    assert_close(encoder(x, is_causal=is_causal), expected)

    y = decoder.norm1(x)
    y = x + attend_plainly(decoder.self_attn, y, y, is_causal)
    z = decoder.norm2(y)
    y = y + attend_plainly(decoder.multihead_attn, z, memory, not is_causal)
    expected = feed_forward(decoder, y, decoder.norm3, decoder.norm4)
    actual = decoder(x, memory, tgt_is_causal=is_causal, memory_is_causal=not is_causal)
    assert_close(actual, expected)
    # the attention to another sequence is not normalised a second time
    assert decoder.self_attn.norm is not None
    assert decoder.multihead_attn.norm is None


def test_initial_weights_are_scaled_by_the_depth():
    encoder_gamma, decoder_gamma = magneto_gammas(6, 6)
    assert encoder_gamma == pytest.approx(math.sqrt(math.log(18) * math.log(12) / 3))
    assert decoder_gamma == pytest.approx(math.sqrt(math.log(18)))
    torch.manual_seed(0)
    net = GQATransformer(128, 8, 8, 2, 3, 128)
    encoder_gamma, decoder_gamma = magneto_gammas(2, 3)
    plain = (2 / (128 + 128)) ** 0.5  # deviation of Xavier's draw
    for layers, gamma, attentions in (
        (net.encoder.layers, encoder_gamma, ['self_attn']),
        (net.decoder.layers, decoder_gamma, ['self_attn', 'multihead_attn']),
    ):
        for layer in layers:
            scaled = [layer.linear1, layer.linear2]
            for attention in map(layer.get_submodule, attentions):
                scaled += [attention.v_proj, attention.out_proj]
                for projection in (attention.q_proj, attention.k_proj):
                    assert projection.weight.std().item() == pytest.approx(
                        plain, rel=0.05
                    )
            for linear in scaled:
                expected = pytest.approx(gamma * plain, rel=0.05)
                assert linear.weight.std().item() == expected
                assert not linear.bias.any()
    first, second = net.encoder.layers
    assert not first.linear1.weight.equal(second.linear1.weight)


def test_xpos_turns_and_fades_pairs_of_channels():
    x = torch.randn(2, 5, 6, generator=torch.manual_seed(0))
    out = torch.view_as_complex(XPOS(6)(x, offset=7).unflatten(-1, (3, 2)))
    pairs = torch.view_as_complex(x.unflatten(-1, (3, 2)))
    for position in range(5):
        for pair in range(3):
            turn = (position + 7) / 10000 ** (pair / 3)
            fade = ((pair / 3 + 0.4) / 1.4) ** ((position + 7) / 512)
            expected = pairs[:, position, pair] * cmath.rect(fade, turn)
            assert_close(out[:, position, pair], expected, rtol=1e-5, atol=1e-6)


def test_position_embeddings_do_not_depend_on_what_follows():
    x = torch.randn(1, 8, 6)
    assert_close(XPOS(6)(x)[:, :3], XPOS(6)(x[:, :3]))


def test_learns_sequences_by_heart():
    torch.manual_seed(0)
    lm = GQATransformerLM(8, 32, 4, 1, 1, 1, 64, dropout=0.0)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)
    tokens = torch.randint(8, (8, 9))
    losses = []
    for _ in range(60):
        logits = lm(tokens[:, :-1])
        losses.append(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 1.8
    assert losses[-1] < 0.6


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    lm = GQATransformerLM(TOKENS, kv_heads=2, dtype=dtype, **SMALL).eval()
    assert all(parameter.dtype == dtype for parameter in lm.parameters())
    logits = lm(make_tokens())
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_dropout_acts_in_training_alone():
    net = make_lm(dropout=0.5).transformer
    x = torch.randn(1, LENGTH, CHANNELS, dtype=torch.float64)
    assert net(x).equal(net(x))
    net.train()
    assert not net(x).equal(net(x))


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(num_encoder_layers=0), ValueError, 'num_encoder_layers must be at least'),
        (dict(num_decoder_layers=0), ValueError, 'num_decoder_layers must be at least'),
        (dict(num_decoder_layers=1.5), TypeError, 'num_decoder_layers must be an int'),
        (dict(dim_feedforward=0), ValueError, 'dim_feedforward must be at least 1'),
        (dict(kv_heads=3), ValueError, 'kv_heads=3'),
        (dict(activation='tanh'), ValueError, "relu.*gelu.*function, got 'tanh'"),
        (dict(dropout=1.5), ValueError, 'dropout'),
        (dict(d_model=15, nhead=3, kv_heads=1), ValueError, 'd_model must be even'),
        (dict(num_tokens=0), ValueError, 'num_tokens must be at least 1, got 0'),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        GQATransformerLM(**{**SMALL, 'num_tokens': TOKENS, 'kv_heads': 2, **options})


def test_wrong_calls():
    lm = make_lm()
    with pytest.raises(ValueError, match='cache needs is_causal=True, got False'):
        lm(make_tokens(), is_causal=False, cache=KVCache())
    with pytest.raises(ValueError, match='max_new_tokens must be at least 0, got -1'):
        lm.generate(make_tokens(), -1)
