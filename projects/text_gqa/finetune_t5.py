"""The GQA paper's recipe on a T5 and a task that take minutes on one core.

    PYTHONPATH=. python projects/text_gqa/finetune_t5.py --task reverse --out DIR

A multi-head T5 is trained from random weights, then converted to fewer key / value
heads and uptrained for a part of the steps. Beside it, in the same run: the multi-head
model with the same further training, and the grouped model trained from random weights
for as many steps as both together. Sequences of letters are drawn on the spot.
"""

import argparse
import copy
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import T5Config, T5ForConditionalGeneration

from deform_gqa.benchmark.core.writer import publish
from deform_gqa.profiling.environment import describe_environment
from deform_gqa.profiling.markdown import records_table
from projects.text_gqa.text_gqa import (
    GQAT5Config,
    GQAT5ForConditionalGeneration,
    convert_t5_to_gqa,
)
from projects.text_gqa.text_gqa.cache_size import t5_cache_bytes
from projects.text_gqa.text_gqa.sequence_tasks import (
    EOS,
    PAD,
    SPECIAL_TOKENS,
    TASKS,
    make_batch,
)

TEST_SEED = 2**31  # sequences that no training draws
HEADS = 8


@dataclasses.dataclass(frozen=True)
class Options:
    """What the run depends on; see :func:`parse`."""

    task: str
    kv_heads: tuple[int, ...]
    merge: str
    steps: int
    alphas: tuple[float, ...]
    batch: int
    letters: int
    length: int
    width: int
    layers: int
    learning_rate: float
    uptrain_learning_rate: float
    test_sequences: int
    seed: int

    @property
    def further_steps(self) -> list[int]:
        """Steps of uptraining, for each alpha."""
        return [round(alpha * self.steps) for alpha in self.alphas]

    def t5_config(self, kind: type[T5Config] = T5Config, **fields: Any) -> T5Config:
        return kind(
            vocab_size=self.letters + SPECIAL_TOKENS,
            d_model=self.width,
            d_kv=self.width // HEADS,
            d_ff=2 * self.width,
            num_layers=self.layers,
            num_heads=HEADS,
            feed_forward_proj='gated-gelu',
            dropout_rate=0.0,
            decoder_start_token_id=PAD,
            pad_token_id=PAD,
            eos_token_id=EOS,
            **fields,
        )

    def draw(self, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return make_batch(self.task, batch, self.letters, self.length, generator)


def train(
    model: T5ForConditionalGeneration,
    options: Options,
    steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Train in place; the learning rate rises for a tenth of the steps, then falls."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    warm_up = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm_up, 1 - i / max(steps, 1))
    )
    model.train()
    for _ in range(steps):
        loss = model(**options.draw(options.batch, generator)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def trained_from_random_weights(
    config: T5Config, options: Options, steps: int
) -> T5ForConditionalGeneration:
    """A T5, or one with grouped queries if that is its config."""
    torch.manual_seed(options.seed)
    kind = T5ForConditionalGeneration
    if isinstance(config, GQAT5Config):
        kind = GQAT5ForConditionalGeneration
    model = kind(config)
    train(model, options, steps, options.learning_rate, options.seed)
    return model


def uptrained(
    model: T5ForConditionalGeneration, options: Options, steps: int
) -> T5ForConditionalGeneration:
    """A copy that was trained on, with other sequences."""
    model = copy.deepcopy(model)
    train(model, options, steps, options.uptrain_learning_rate, options.seed + 1)
    return model


@torch.no_grad()
def evaluate(model: T5ForConditionalGeneration, options: Options) -> dict[str, float]:
    """Loss, and the share of test sequences that greedy decoding gets all right."""
    generator = torch.Generator().manual_seed(TEST_SEED)
    batch = options.draw(options.test_sequences, generator)
    loss = model(**batch).loss.item()
    labels = batch.pop('labels').masked_fill(batch['attention_mask'] == 0, PAD)
    made = model.generate(**batch, max_new_tokens=labels.shape[1])[:, 1:]
    made = torch.nn.functional.pad(made, (0, labels.shape[1] - made.shape[1]))
    right = (made == labels).all(dim=1).float().mean().item()
    return dict(loss=loss, right=right)


class Run:
    """Rows of models, in the order in which they are trained."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, model: T5ForConditionalGeneration, steps: str) -> None:
        options = self.options
        result = evaluate(model, options)
        self.rows.append(
            {
                'model': name,
                'kv heads': getattr(model.config, 'num_key_value_heads', HEADS),
                'steps': steps,
                **result,
                'parameters': model.num_parameters(),
                'cache bytes': t5_cache_bytes(model, options.length, options.length),
            }
        )
        print(f'{name}, {steps} steps: {result["right"]:.1%} right', flush=True)

    def train_all(self) -> None:
        options, steps = self.options, self.options.steps
        base = trained_from_random_weights(options.t5_config(), options, steps)
        self.add('multi-head', base, str(steps))
        for further in options.further_steps:
            model = uptrained(base, options, further)
            self.add('multi-head, trained on', model, f'{steps} + {further}')
        for count in options.kv_heads:
            converted = convert_t5_to_gqa(base, count, merge=options.merge)
            self.add('converted', converted, f'{steps} + 0')
            for further in options.further_steps:
                model = uptrained(converted, options, further)
                self.add('converted, uptrained', model, f'{steps} + {further}')
            config = options.t5_config(GQAT5Config, num_key_value_heads=count)
            total = steps + max(options.further_steps)
            model = trained_from_random_weights(config, options, total)
            self.add('grouped from the start', model, str(total))


def markdown(options: Options, rows: Sequence[dict[str, Any]], wall_s: float) -> str:
    """The results as a document."""
    table = [
        {
            'model': row['model'],
            'kv heads': str(row['kv heads']),
            'steps': row['steps'],
            'right': f'{row["right"]:.1%}',
            'loss': f'{row["loss"]:.4f}',
            'parameters': f'{row["parameters"]:,}',
            'cache bytes': f'{row["cache bytes"]:,}',
        }
        for row in rows
    ]
    return (
        f'# T5 uptrained with grouped queries: {options.task}\n\n'
        f'{options.layers} + {options.layers} layers of {options.width} channels and '
        f'{HEADS} heads, merge {options.merge}; sequences of up to {options.length} '
        f'letters out of {options.letters}, {options.batch} a step; seed '
        f'{options.seed}. Right: the share of {options.test_sequences} test sequences '
        f'that greedy decoding gets right to the last letter. {wall_s:.0f} s in all.\n'
        f'\n{records_table(table)}\n'
    )


def parse(argv: Sequence[str] | None) -> tuple[Options, str | None]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--task', choices=list(TASKS), default='reverse')
    add('--kv-heads', type=int, nargs='+', default=[4, 2, 1], help=f'of {HEADS}')
    add('--merge', default='mean', help='how heads become one (default: mean)')
    add('--steps', type=int, default=600, help='of the multi-head model')
    add(
        '--alphas',
        type=float,
        nargs='+',
        default=[0.05, 0.1, 0.3],
        help='steps of uptraining over --steps',
    )
    add('--batch', type=int, default=64)
    add('--letters', type=int, default=16)
    add('--length', type=int, default=10)
    add('--width', type=int, default=64, help=f'channels, a multiple of {HEADS}')
    add('--layers', type=int, default=2, help='of encoder and decoder each')
    add('--learning-rate', type=float, default=3e-3)
    add('--uptrain-learning-rate', type=float, default=1e-3)
    add('--test-sequences', type=int, default=512)
    add('--seed', type=int, default=0)
    add('--threads', type=int, default=1)
    add('--out', metavar='DIR', help='write JSON and Markdown to this folder')
    values = vars(parser.parse_args(argv))
    if values['width'] % HEADS:
        parser.error(f'--width must be a multiple of {HEADS}, got {values["width"]}')
    for count in values['kv_heads']:
        if count < 1 or HEADS % count:
            parser.error(f'--kv-heads takes divisors of {HEADS}, got {count}')
    for alpha in values['alphas']:
        if not alpha >= 0:
            parser.error(f'--alphas must not be negative, got {alpha}')
    torch.set_num_threads(values.pop('threads'))
    out = values.pop('out')
    for name in ('kv_heads', 'alphas'):
        values[name] = tuple(values[name])
    return Options(**values), out


def main(argv: Sequence[str] | None = None) -> None:
    options, out = parse(argv)
    start = time.perf_counter()
    run = Run(options)
    run.train_all()
    wall_s = time.perf_counter() - start
    record = dict(
        options=dataclasses.asdict(options),
        environment=describe_environment(torch.device('cpu')),
        wall_s=wall_s,
        rows=run.rows,
    )
    publish('finetune_t5', record, markdown(options, run.rows, wall_s), out, {})


if __name__ == '__main__':
    main()
