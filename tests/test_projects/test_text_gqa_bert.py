"""projects/text_gqa: BERT with grouped-query attention, beside BERT itself."""

import copy
import json

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    T5Config,
    T5EncoderModel,
)
from transformers.models.bert.modeling_bert import BertAttention

from deform_gqa.conversion import convert_model
from projects.text_gqa.text_gqa import (
    BertGroupedQueryCrossAttention,
    BertGroupedQuerySelfAttention,
    GQABertConfig,
    GQABertForSequenceClassification,
    GQABertModel,
    convert_bert_to_gqa,
)

HEADS, CHANNELS, LAYERS, HEAD_DIM = 4, 24, 2, 6
CLOSE = dict(rtol=0, atol=1e-5)


def make_config(kind=BertConfig, **options):
    values = dict(
        vocab_size=30,
        hidden_size=CHANNELS,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.3,  # attention that matters
    )
    return kind(**{**values, **options})


def make_bert(kind=BertForSequenceClassification, implementation='eager', **options):
    torch.manual_seed(0)
    model = kind(make_config(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith('bias'):
                parameter.normal_(std=0.3)
    model.set_attn_implementation(implementation)
    return model


def attentions(model):
    return [x for x in model.modules() if isinstance(x, BertAttention)]


def expanded(model, like):
    """Multi-head BERT whose heads are the grouped model's, repeated for each query."""
    model = copy.deepcopy(model)
    for plain, grouped in zip(attentions(model), attentions(like), strict=True):
        plain.self.query.load_state_dict(grouped.self.query.state_dict())
        plain.output.load_state_dict(grouped.output.state_dict())
        for name in ('key', 'value'):
            for kind in ('weight', 'bias'):
                heads = getattr(getattr(grouped.self, name), kind).detach()
                heads = heads.unflatten(0, (-1, HEAD_DIM))
                heads = heads.repeat_interleave(HEADS // len(heads), dim=0)
                getattr(getattr(plain.self, name), kind).data = heads.flatten(0, 1)
    return model


@pytest.fixture(scope='module')
def batch():
    tokens = torch.randint(1, 30, (3, 7), generator=torch.manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    return dict(input_ids=tokens, attention_mask=mask)


def outputs(model, batch, labels):
    out = model(**batch, labels=labels)
    out.loss.backward()
    grads = {name: x.grad for name, x in model.named_parameters()}
    return {'logits': out.logits, **grads}


@pytest.mark.parametrize('implementation', ['eager', 'sdpa'])
def test_as_many_kv_heads_as_query_heads_change_nothing(batch, implementation):
    """Logits and gradients."""
    model = make_bert(implementation=implementation)
    grouped = convert_bert_to_gqa(model, HEADS)
    for attention in attentions(grouped):
        assert type(attention.self) is BertGroupedQuerySelfAttention
    labels = torch.tensor([0, 1, 0])
    expected, actual = (outputs(net, batch, labels) for net in (model, grouped))
    assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize('kv_heads', [1, 2])
@pytest.mark.parametrize('implementation', ['eager', 'sdpa'])
def test_equals_multi_head_bert_with_repeated_heads(batch, kv_heads, implementation):
    model = make_bert(implementation=implementation)
    grouped = convert_bert_to_gqa(model, kv_heads)
    labels = torch.tensor([0, 1, 0])
    nets = (grouped, expanded(model, grouped))
    actual, expected = (outputs(net, batch, labels) for net in nets)
    for name, value in actual.items():
        wanted = expected[name]
        if value.shape != wanted.shape:  # the sum of a group's gradients
            wanted = wanted.unflatten(0, (kv_heads, -1, HEAD_DIM)).sum(1).flatten(0, 1)
        assert_close(value, wanted, **CLOSE)
    assert (actual['logits'] - model(**batch).logits).abs().max() > 0.01


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
def test_projections_shrink_with_the_kv_heads(kv_heads):
    model = make_bert()
    grouped = convert_bert_to_gqa(model, kv_heads)
    saved = 2 * LAYERS * (HEADS - kv_heads) * HEAD_DIM * (CHANNELS + 1)
    assert grouped.num_parameters() == model.num_parameters() - saved
    for attention in attentions(grouped):
        assert attention.self.key.out_features == kv_heads * HEAD_DIM
        assert attention.self.value.out_features == kv_heads * HEAD_DIM


def test_heads_are_means_of_neighbours():
    model = make_bert()
    grouped = convert_bert_to_gqa(model, 2)
    for old, new in zip(attentions(model), attentions(grouped), strict=True):
        heads = old.self.key.weight.unflatten(0, (2, 2, HEAD_DIM))
        assert_close(new.self.key.weight, heads.mean(1).flatten(0, 1), **CLOSE)
        assert new.self.query.weight.equal(old.self.query.weight)


@pytest.mark.parametrize('implementation', ['eager', 'sdpa'])
@pytest.mark.parametrize('kv_heads', [1, 4])
def test_a_decoder_generates_with_its_cache(batch, implementation, kv_heads):
    model = make_bert(BertLMHeadModel, implementation, is_decoder=True)
    grouped = convert_bert_to_gqa(model, kv_heads)
    reference = expanded(model, grouped)
    tokens = dict(input_ids=batch['input_ids'])
    # each token once: a model with random weights says one token again and again
    options = dict(max_new_tokens=5, num_beams=2, no_repeat_ngram_size=1)
    expected = reference.generate(**tokens, **options)
    assert grouped.generate(**tokens, **options).equal(expected)
    assert grouped.generate(**tokens, use_cache=False, **options).equal(expected)
    caches = [net(**tokens, use_cache=True).past_key_values for net in (model, grouped)]
    before, after = (sum(x.keys.nbytes for x in cache.layers) for cache in caches)
    assert before * kv_heads == after * HEADS


def test_cross_attention_of_an_encoder_decoder(batch):
    decoder = make_config(is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(make_config(), decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    model = EncoderDecoderModel(config).eval()
    for kv_heads in (HEADS, 1):
        grouped = convert_bert_to_gqa(model, kv_heads)
        assert type(grouped.config) is EncoderDecoderConfig
        reference = expanded(model, grouped)
        kinds = {type(x.self) for x in attentions(grouped.decoder)}
        assert kinds == {BertGroupedQuerySelfAttention, BertGroupedQueryCrossAttention}
        options = dict(max_new_tokens=5, num_beams=2, no_repeat_ngram_size=1)
        expected = reference.generate(**batch, **options)
        assert grouped.generate(**batch, **options).equal(expected)
        inputs = dict(**batch, decoder_input_ids=expected)
        logits = [net(**inputs).logits for net in (grouped, reference)]
        assert_close(*logits, **CLOSE)


def make_sequences(count):
    """Tokens, and the classes that are learnt: whether one of them is 1."""
    tokens = torch.randint(1, 9, (count, 5))
    return tokens, (tokens == 1).any(dim=1).long()


def test_trained_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    config = make_config(
        GQABertConfig,
        num_key_value_heads=2,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = GQABertForSequenceClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        tokens, labels = make_sequences(64)
        out = model(input_ids=tokens, labels=labels)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    model.eval()
    tokens, labels = make_sequences(256)
    right = model(input_ids=tokens).logits.argmax(-1) == labels
    assert right.float().mean() > 0.95

    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / 'config.json').read_text())
    assert values['num_key_value_heads'] == 2
    assert values['architectures'] == ['GQABertForSequenceClassification']
    kinds = (GQABertForSequenceClassification, AutoModelForSequenceClassification)
    for kind in kinds:
        loaded, report = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is GQABertForSequenceClassification
        assert not any(report.values()), report
        assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert_close(loaded(tokens).logits, model(tokens).logits, **CLOSE)
    for kind in (GQABertModel, AutoModel):
        assert type(kind.from_pretrained(tmp_path)) is GQABertModel


def test_converted_saved_and_loaded(batch, tmp_path):
    model = make_bert(num_labels=3)
    grouped = convert_bert_to_gqa(model, 1)
    assert type(model.config) is BertConfig
    grouped.save_pretrained(tmp_path)
    loaded, report = GQABertForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    assert_close(loaded(**batch).logits, grouped(**batch).logits, **CLOSE)
    with pytest.raises(RuntimeError, match='ignore_mismatched_sizes'):
        BertForSequenceClassification.from_pretrained(tmp_path)


def test_new_models_draw_weights_as_bert_does():
    torch.manual_seed(0)
    options = dict(hidden_size=96, initializer_range=0.02, num_key_value_heads=1)
    model = GQABertModel(make_config(GQABertConfig, **options))
    for attention in attentions(model):
        for projection in (attention.self.key, attention.self.value):
            assert projection.out_features == 24
            assert projection.weight.std().item() == pytest.approx(0.02, rel=0.06)
            assert not projection.bias.any()
    default = GQABertModel(make_config(GQABertConfig), add_pooling_layer=False)
    assert {x.self.kv_heads for x in attentions(default)} == {HEADS}
    assert default.pooler is None


def test_attention_weights_are_those_of_query_heads(batch):
    model = convert_bert_to_gqa(make_bert(), 2)
    out = model(**batch, output_attentions=True)
    assert [x.shape for x in out.attentions] == [(3, HEADS, 7, 7)] * LAYERS


def test_dropout_of_attention_weights():
    model = convert_bert_to_gqa(make_bert(attention_probs_dropout_prob=0.5), 2)
    attention = attentions(model)[0].self
    x = torch.randn(1, 5, CHANNELS)
    assert attention(x)[0].equal(attention(x)[0])
    attention.train()
    assert not attention(x)[0].equal(attention(x)[0])


def test_in_place_one_attention_and_twice(batch):
    model = make_bert()
    once = convert_bert_to_gqa(model, 1)
    attention = attentions(model)[0]
    grouped = convert_bert_to_gqa(attention, 2)
    assert grouped.self.kv_heads == 2 and type(attention.self).__name__ == (
        'BertSelfAttention'
    )
    assert convert_bert_to_gqa(model, 2, inplace=True) is model
    assert model.config.num_key_value_heads == 2
    twice = convert_bert_to_gqa(model, 1)
    assert_close(twice.state_dict(), once.state_dict(), **CLOSE)


def test_any_heads_can_be_grouped(batch):
    """With the order of query heads and output projection changed accordingly."""
    model = make_bert()
    with torch.no_grad():
        for attention in attentions(model):
            for projection in (attention.self.key, attention.self.value):
                for parameter in projection.parameters():
                    heads = parameter.unflatten(0, (HEADS, HEAD_DIM))
                    heads[2], heads[3] = heads[0], heads[1]
    grouped = convert_bert_to_gqa(model, 2, grouping='similarity')
    assert_close(grouped(**batch).logits, model(**batch).logits, **CLOSE)
    wrong = convert_bert_to_gqa(model, 2)
    assert (wrong(**batch).logits - model(**batch).logits).abs().max() > 0.01


def test_the_conversion_of_all_models_knows_bert():
    grouped, report = convert_model(make_bert(), 2)
    kinds = {type(x.self) for x in attentions(grouped)}
    assert kinds == {BertGroupedQuerySelfAttention}
    assert [layer.kv_heads for layer in report.converted] == [(HEADS, 2)] * LAYERS


@pytest.mark.parametrize(
    ('kv_heads', 'error', 'message'),
    [
        (3, ValueError, 'kv_heads must divide the 4 heads, got 3'),
        (0, ValueError, 'kv_heads must be at least 1, got 0'),
        ('2', TypeError, 'kv_heads must be an integer'),
    ],
)
def test_wrong_numbers_change_nothing(kv_heads, error, message):
    model = make_bert()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        convert_bert_to_gqa(model, kv_heads, inplace=True)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(error, match=message):
        BertGroupedQuerySelfAttention(model.config, kv_heads)


def test_wrong_modules_and_configs():
    t5 = T5EncoderModel(T5Config(vocab_size=9, d_model=8, num_layers=1, d_ff=8))
    with pytest.raises(TypeError, match='hold a BertAttention, got T5EncoderModel'):
        convert_bert_to_gqa(t5, 1)
    for kind in (GQABertModel, GQABertForSequenceClassification):
        with pytest.raises(ValueError, match='kv_heads must divide the 4 heads, got 3'):
            kind(make_config(GQABertConfig, num_key_value_heads=3))
