"""projects/text_gqa: T5 with grouped-query attention, beside T5 itself."""

import copy
import json

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    StaticCache,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)
from transformers.models.t5.modeling_t5 import T5Attention

from deform_gqa.conversion import convert_model
from projects.text_gqa.text_gqa import (
    GQAT5Config,
    GQAT5ForConditionalGeneration,
    T5GroupedQueryAttention,
    convert_t5_to_gqa,
)
from projects.text_gqa.text_gqa.attention import eager_attention, single_query_sdpa
from projects.text_gqa.text_gqa.cache_size import t5_cache_bytes

HEADS, HEAD_DIM, CHANNELS, LAYERS = 4, 6, 20, 2
CLOSE = dict(rtol=0, atol=1e-5)


def make_config(kind=T5Config, **options):
    values = dict(
        vocab_size=40,
        d_model=CHANNELS,
        d_kv=HEAD_DIM,
        d_ff=32,
        num_layers=LAYERS,
        num_heads=HEADS,
        decoder_start_token_id=0,
        feed_forward_proj='gated-gelu',
        tie_word_embeddings=False,
    )
    return kind(**{**values, **options})


def make_t5(implementation='eager', **options):
    torch.manual_seed(0)
    config = make_config(attn_implementation=implementation, **options)
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():  # attention that matters, and logits of several tokens
        for attention in attentions(model):
            attention.q.weight.mul_(2.5)
            attention.o.weight.mul_(2)
        model.lm_head.weight.mul_(0.2)
    return model


def attentions(model):
    return [module for module in model.modules() if isinstance(module, T5Attention)]


def expanded(model, like):
    """Multi-head T5 whose heads are the grouped model's, repeated for each query."""
    model = copy.deepcopy(model)
    for plain, grouped in zip(attentions(model), attentions(like), strict=True):
        for name in ('k', 'v'):
            heads = getattr(grouped, name).weight.detach().unflatten(0, (-1, HEAD_DIM))
            heads = heads.repeat_interleave(HEADS // len(heads), dim=0)
            getattr(plain, name).weight.data = heads.flatten(0, 1)
        for name in ('q', 'o'):
            getattr(plain, name).load_state_dict(getattr(grouped, name).state_dict())
    return model


@pytest.fixture(scope='module')
def batch():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 40, (3, 7), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    mask[2, :2] = 0
    labels = torch.randint(2, 40, (3, 5), generator=generator)
    return dict(input_ids=tokens, attention_mask=mask, labels=labels)


def generate(model, batch, **options):
    inputs = {name: batch[name] for name in ('input_ids', 'attention_mask')}
    length = dict(max_new_tokens=6, min_new_tokens=6)
    # each token once: a model with random weights says one token again and again
    return model.generate(**inputs, **length, no_repeat_ngram_size=1, **options)


@pytest.mark.parametrize('implementation', ['eager', 'sdpa'])
def test_as_many_kv_heads_as_query_heads_change_nothing(batch, implementation):
    """Logits, generated tokens and gradients."""
    model = make_t5(implementation)
    grouped = convert_t5_to_gqa(model, HEADS)
    assert all(type(x) is T5GroupedQueryAttention for x in attentions(grouped))
    results = []
    for net in (model, grouped):
        out = net(**batch)
        out.loss.backward()
        results.append(
            {
                'logits': out.logits,
                'greedy': generate(net, batch),
                'beams': generate(net, batch, num_beams=3),
                **{name: x.grad for name, x in net.named_parameters()},
            }
        )
    expected, actual = results
    assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize('kv_heads', [1, 2])
@pytest.mark.parametrize('implementation', ['eager', 'sdpa'])
def test_equals_multi_head_t5_with_repeated_heads(batch, kv_heads, implementation):
    model = make_t5(implementation)
    grouped = convert_t5_to_gqa(model, kv_heads)
    reference = expanded(model, grouped)
    for options in (dict(), dict(num_beams=3), dict(use_cache=False)):
        expected = generate(reference, batch, **options)
        assert generate(grouped, batch, **options).equal(expected)
    outs = [net(**batch) for net in (grouped, reference)]
    assert_close(outs[0].logits, outs[1].logits, **CLOSE)
    assert (outs[0].logits - model(**batch).logits).abs().max() > 0.05
    for out in outs:
        out.loss.backward()
    for ours, theirs in zip(attentions(grouped), attentions(reference), strict=True):
        for name in 'qo':
            mine, other = (getattr(x, name).weight.grad for x in (ours, theirs))
            assert_close(mine, other, **CLOSE)
        for name in 'kv':  # of a group, the sum
            grad = getattr(theirs, name).weight.grad.unflatten(0, (kv_heads, -1))
            grad = grad.unflatten(1, (-1, HEAD_DIM)).sum(1).flatten(0, 1)
            assert_close(getattr(ours, name).weight.grad, grad, **CLOSE)


def test_heads_are_means_of_neighbours():
    model = make_t5()
    grouped = convert_t5_to_gqa(model, 2)
    for old, new in zip(attentions(model), attentions(grouped), strict=True):
        for name in 'kv':
            heads = getattr(old, name).weight.unflatten(0, (2, 2, HEAD_DIM))
            assert_close(
                getattr(new, name).weight, heads.mean(1).flatten(0, 1), **CLOSE
            )
        for name in 'qo':
            assert getattr(new, name).weight.equal(getattr(old, name).weight)


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
def test_weights_and_cache_shrink_with_the_kv_heads(kv_heads):
    model = make_t5()
    grouped = convert_t5_to_gqa(model, kv_heads)
    share = HEADS // kv_heads
    for old, new in zip(attentions(model), attentions(grouped), strict=True):
        for name in 'kv':
            before, after = (getattr(x, name).weight.numel() for x in (old, new))
            assert before == share * after
    saved = 2 * 3 * LAYERS * (HEADS - kv_heads) * HEAD_DIM * CHANNELS
    assert grouped.num_parameters() == model.num_parameters() - saved
    one_token = 2 * LAYERS * kv_heads * HEAD_DIM * 4
    assert t5_cache_bytes(grouped, 7, 5) == (7 + 5) * one_token
    assert t5_cache_bytes(model, 7, 5) == share * t5_cache_bytes(grouped, 7, 5)


@pytest.mark.parametrize('implementation', ['eager', 'sdpa'])
def test_steps_with_a_cache_equal_the_whole(batch, implementation):
    model = convert_t5_to_gqa(make_t5(implementation), 2)
    inputs = {name: batch[name] for name in ('input_ids', 'attention_mask')}
    tokens = batch['labels']
    whole = model(**inputs, decoder_input_ids=tokens).logits
    cache, steps = None, []
    for part in tokens.split([2, 1, 2], dim=1):
        out = model(**inputs, decoder_input_ids=part, past_key_values=cache)
        cache = out.past_key_values
        steps.append(out.logits)
    assert_close(torch.cat(steps, dim=1), whole, **CLOSE)
    [keys] = {layer.keys.shape[1] for layer in cache.self_attention_cache.layers}
    assert keys == 2


def test_a_static_cache_has_kv_heads(batch):
    model = convert_t5_to_gqa(make_t5('sdpa'), 2)
    out = generate(
        model,
        batch,
        cache_implementation='static',
        return_dict_in_generate=True,
        disable_compile=True,
    )
    assert out.sequences.equal(generate(model, batch))
    cache = out.past_key_values.self_attention_cache
    assert isinstance(cache, StaticCache)
    assert {layer.keys.shape[1] for layer in cache.layers} == {2}


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
@pytest.mark.parametrize('mask', [None, 'additive', 'of heads', 'boolean'])
@pytest.mark.parametrize('has_bias', [False, True])
def test_a_single_query_attends_as_many_do(kv_heads, mask, has_bias):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    query, bias = draw(2, HEADS, 1, HEAD_DIM), draw(1, HEADS, 1, 7)
    key, value = draw(2, 2, kv_heads, 7, HEAD_DIM)
    hidden = (
        torch.arange(7).expand(2, 1, 1, 7) > torch.tensor([6, 3])[:, None, None, None]
    )
    low = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    given = {'additive': low, 'of heads': low + bias, 'boolean': ~hidden}.get(mask)
    options = dict(scaling=0.7, dropout=0.0, position_bias=bias if has_bias else None)
    actual, _ = single_query_sdpa(None, query, key, value, given, **options)
    additive = low if mask == 'boolean' else given
    module = torch.nn.Identity()
    expected, _ = eager_attention(module, query, key, value, additive, **options)
    assert_close(actual, expected, **CLOSE)


def test_weights_of_attention_are_those_of_query_heads(batch):
    model = convert_t5_to_gqa(make_t5(), 2)
    out = model(**batch, output_attentions=True)
    for weights, keys in (
        (out.encoder_attentions, 7),
        (out.decoder_attentions, 5),
        (out.cross_attentions, 7),
    ):
        assert len(weights) == LAYERS
        for layer in weights:
            assert layer.shape[1] == HEADS and layer.shape[3] == keys
            assert_close(layer.sum(-1), torch.ones_like(layer[..., 0]))


def test_a_copy_leaves_the_model_alone(batch):
    model = make_t5()
    before = copy.deepcopy(model)
    grouped = convert_t5_to_gqa(model, 2)
    assert type(model.config) is T5Config
    assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        for parameter in grouped.parameters():
            parameter.zero_()
    assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)
    assert {type(x) for x in attentions(model)} == {T5Attention}


def test_in_place():
    model = make_t5()
    assert convert_t5_to_gqa(model, 2, inplace=True) is model
    assert {x.kv_heads for x in attentions(model)} == {2}
    assert {len(x.k.weight) for x in attentions(model)} == {2 * HEAD_DIM}


def test_one_attention():
    model = make_t5()
    attention = model.decoder.block[0].layer[1].EncDecAttention
    grouped = convert_t5_to_gqa(attention, 1)
    assert type(grouped) is T5GroupedQueryAttention
    assert grouped.kv_heads == 1 and attention.k.out_features == HEADS * HEAD_DIM
    assert type(model.config) is T5Config
    x = torch.randn(2, 3, CHANNELS)
    memory = torch.randn(2, 5, CHANNELS)
    out, bias, weights = grouped(x, key_value_states=memory)
    assert out.shape == x.shape and weights.shape == (2, HEADS, 3, 5)
    assert bias is None


def test_a_part_of_a_model(batch):
    model = make_t5()
    convert_t5_to_gqa(model.decoder, 2, inplace=True)
    assert {type(x) for x in attentions(model.encoder)} == {T5Attention}
    assert {x.kv_heads for x in attentions(model.decoder)} == {2}
    assert generate(model, batch).equal(generate(model, batch, use_cache=False))


def test_the_encoder_may_keep_its_heads(batch, tmp_path):
    model = make_t5()
    grouped = convert_t5_to_gqa(model, 1, encoder_kv_heads=HEADS)
    assert {x.kv_heads for x in attentions(grouped.encoder)} == {HEADS}
    assert {x.kv_heads for x in attentions(grouped.decoder)} == {1}
    inputs = {name: batch[name] for name in ('input_ids', 'attention_mask')}
    states = [net.encoder(**inputs).last_hidden_state for net in (model, grouped)]
    assert_close(*states, **CLOSE)
    grouped.save_pretrained(tmp_path)
    loaded = GQAT5ForConditionalGeneration.from_pretrained(tmp_path)
    assert_close(loaded.state_dict(), grouped.state_dict(), rtol=0, atol=0)


def test_grouping_twice_equals_grouping_once():
    model = make_t5()
    twice = convert_t5_to_gqa(convert_t5_to_gqa(model, 2), 1)
    once = convert_t5_to_gqa(model, 1)
    assert_close(twice.state_dict(), once.state_dict(), **CLOSE)
    assert twice.config.num_key_value_heads == 1


def test_an_encoder_alone(batch):
    torch.manual_seed(0)
    model = T5EncoderModel(make_config(is_encoder_decoder=False)).eval()
    grouped = convert_t5_to_gqa(model, HEADS)
    outs = [net(batch['input_ids']).last_hidden_state for net in (model, grouped)]
    assert_close(*outs, **CLOSE)


@pytest.mark.parametrize('tie_word_embeddings', [True, False])
def test_saved_and_loaded(batch, tmp_path, tie_word_embeddings):
    """T5 1.1 is told from T5 by an entry that its config does not keep as such."""
    model = make_t5('eager', tie_word_embeddings=tie_word_embeddings)
    grouped = convert_t5_to_gqa(model, 2)
    assert grouped.config._attn_implementation == 'eager'
    assert grouped.config.scale_decoder_outputs == tie_word_embeddings
    grouped.save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['num_key_value_heads'] == 2 and config['model_type'] == 'gqa_t5'
    for kind in (GQAT5ForConditionalGeneration, AutoModelForSeq2SeqLM):
        loaded, report = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is GQAT5ForConditionalGeneration
        assert not any(report.values()), report
        loaded.set_attn_implementation('eager')
        assert_close(loaded(**batch).logits, grouped(**batch).logits, **CLOSE)
        assert generate(loaded, batch, num_beams=2).equal(
            generate(grouped, batch, num_beams=2)
        )
    with pytest.raises(RuntimeError, match='ignore_mismatched_sizes'):
        T5ForConditionalGeneration.from_pretrained(tmp_path)


def test_new_models_draw_weights_as_t5_does():
    torch.manual_seed(0)
    config = make_config(GQAT5Config, d_model=96, d_kv=24, num_key_value_heads=1)
    model = GQAT5ForConditionalGeneration(config)
    for attention in attentions(model):
        assert attention.kv_heads == 1
        for name in 'kv':
            std = getattr(attention, name).weight.std().item()
            assert std == pytest.approx(96**-0.5, rel=0.06)
    default = GQAT5ForConditionalGeneration(make_config(GQAT5Config))
    assert {x.kv_heads for x in attentions(default)} == {HEADS}


def test_learns(batch):
    model = convert_t5_to_gqa(make_t5('sdpa', dropout_rate=0.0), 1).train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        losses.append(model(**batch).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert all(x.k.weight.grad.abs().sum() > 0 for x in attentions(model))
    assert losses[-1] < losses[0] / 2


def test_gradient_checkpointing_changes_no_gradient(batch):
    grads = []
    for enable in (False, True):
        model = convert_t5_to_gqa(make_t5(dropout_rate=0.0), 2).train()
        if enable:
            model.gradient_checkpointing_enable()
        model(**batch).loss.backward()
        grads.append({name: x.grad for name, x in model.named_parameters()})
    assert_close(grads[0], grads[1], **CLOSE)


def test_dropout_of_attention_weights(batch):
    model = convert_t5_to_gqa(make_t5('eager', dropout_rate=0.5), 2)
    attention = attentions(model)[0]
    x = torch.randn(1, 5, CHANNELS)
    assert attention(x)[0].equal(attention(x)[0])
    attention.train()
    assert not attention(x)[0].equal(attention(x)[0])


def test_what_modules_keep():
    model = make_t5().to(torch.bfloat16).train()
    model.encoder.requires_grad_(False)
    grouped = convert_t5_to_gqa(model, 2)
    assert {x.dtype for x in grouped.parameters()} == {torch.bfloat16}
    assert all(module.training for module in grouped.modules())
    assert not any(x.requires_grad for x in grouped.encoder.parameters())
    assert all(x.k.weight.requires_grad for x in attentions(grouped.decoder))


def test_other_merges_and_groupings(batch):
    """Self-attention cannot reorder its heads, cross-attention can."""
    model = make_t5()
    groups = [[0, 3], [1, 2]]
    cross = {'EncDecAttention': groups}
    same = convert_t5_to_gqa(model, 2, grouping=cross, merge='first')
    for old, new in zip(attentions(model), attentions(same), strict=True):
        is_cross = new.is_decoder and not new.is_causal
        heads = old.k.weight.unflatten(0, (HEADS, HEAD_DIM))
        expected = heads[[0, 1]] if is_cross else heads[[0, 2]]
        assert_close(new.k.weight, expected.flatten(0, 1), **CLOSE)
        heads = old.q.weight.unflatten(0, (HEADS, HEAD_DIM))
        order = [0, 3, 1, 2] if is_cross else [0, 1, 2, 3]
        assert_close(new.q.weight, heads[order].flatten(0, 1), **CLOSE)
    with pytest.raises(ValueError, match='heads can change places'):
        convert_t5_to_gqa(model, 2, grouping=groups)


def test_equal_heads_merge_without_error_when_aligned(batch):
    """Heads in bases of their own: their mean is wrong, aligned heads are not."""
    torch.manual_seed(0)
    model = make_t5()
    for attention in attentions(model):
        for projection in (attention.k, attention.v):
            turns = torch.linalg.qr(torch.randn(HEADS, HEAD_DIM, HEAD_DIM))[0]
            heads = turns @ projection.weight.data[:HEAD_DIM]
            projection.weight.data = heads.flatten(0, 1)
    exact = convert_t5_to_gqa(model, 1, merge='aligned')
    wrong = convert_t5_to_gqa(model, 1)
    expected = model(**batch).logits
    assert_close(exact(**batch).logits, expected, rtol=0, atol=1e-4)
    assert (wrong(**batch).logits - expected).abs().max() > 0.05


def test_the_conversion_of_all_models_knows_t5():
    grouped, report = convert_model(make_t5(), 2)
    assert {type(x) for x in attentions(grouped)} == {T5GroupedQueryAttention}
    assert {layer.kv_heads for layer in report.converted} == {(HEADS, 2)}
    assert len(report.layers) == 3 * LAYERS


@pytest.mark.parametrize(
    ('kv_heads', 'error', 'message'),
    [
        (3, ValueError, 'kv_heads must divide the 4 heads, got 3'),
        (8, ValueError, 'kv_heads must divide the 4 heads, got 8'),
        (0, ValueError, 'kv_heads must be at least 1, got 0'),
        (2.0, TypeError, 'kv_heads must be an integer'),
        (True, TypeError, 'kv_heads must be an integer'),
    ],
)
def test_wrong_numbers_change_nothing(kv_heads, error, message):
    model = make_t5()
    before = copy.deepcopy(model.state_dict())
    for options in (
        dict(kv_heads=kv_heads),
        dict(kv_heads=2, encoder_kv_heads=kv_heads),
    ):
        with pytest.raises(error, match=message):
            convert_t5_to_gqa(model, inplace=True, **options)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(error, match=message):
        T5GroupedQueryAttention(model.config, kv_heads)


def test_wrong_modules_and_options():
    bert = BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(TypeError, match='hold a T5Attention, got BertModel'):
        convert_t5_to_gqa(bert, 1)
    with pytest.raises(ValueError, match=r"merge must be one of .*, got 'middle'"):
        convert_t5_to_gqa(make_t5(), 1, merge='middle')
    with pytest.raises(ValueError, match='kv_heads must divide the 4 heads, got 3'):
        GQAT5ForConditionalGeneration(make_config(GQAT5Config, num_key_value_heads=3))
