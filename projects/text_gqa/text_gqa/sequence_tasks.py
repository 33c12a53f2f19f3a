"""Text tasks that are made on the spot: sequences of letters, to be rewritten."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from deform_gqa.checks import check_int

PAD, EOS = 0, 1
SPECIAL_TOKENS = 2

TASKS: Mapping[str, Callable[[Tensor], Tensor]] = {
    'copy': lambda letters: letters,
    'reverse': lambda letters: letters.flip(0),
    'sort': lambda letters: letters.sort().values,
}


def make_batch(
    task: str,
    batch: int,
    num_letters: int,
    max_length: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Sequences of letters and what they are to become.

    Args:
        task: 'copy', 'reverse' or 'sort'.
        batch: Sequences B.
        num_letters: Letters are tokens 2 to ``num_letters + 1``; 0 pads, 1 ends.
        max_length: Lengths are drawn from half of it to all of it.
        generator: Of torch, on the CPU.

    Returns:
        input_ids, attention_mask and labels (B, max_length + 1), int64; labels are -100
        after the end.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: For an unknown task, or a number below 1.
    """
    if task not in TASKS:
        raise ValueError(f'task must be one of {list(TASKS)}, got {task!r}')
    check_int('batch', batch, least=1)
    check_int('num_letters', num_letters, least=1)
    check_int('max_length', max_length, least=1)
    inputs = torch.full((batch, max_length + 1), PAD)
    labels = torch.full((batch, max_length + 1), -100)
    shortest = (max_length + 1) // 2
    lengths = torch.randint(shortest, max_length + 1, (batch,), generator=generator)
    for row, length in enumerate(lengths.tolist()):
        letters = torch.randint(num_letters, (length,), generator=generator)
        letters += SPECIAL_TOKENS
        inputs[row, :length], inputs[row, length] = letters, EOS
        labels[row, :length], labels[row, length] = TASKS[task](letters), EOS
    mask = (inputs != PAD).long()
    return dict(input_ids=inputs, attention_mask=mask, labels=labels)
