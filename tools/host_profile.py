"""Host time of the ops' Triton backend with the launches taken out.

    taskset -c 0 python tools/host_profile.py --out DIR

Prints a table; with --out, writes host_time.json and host_time.md there. One thread, on
a core that nothing else uses: medians and 5th percentiles of many calls.
"""

import argparse
import dataclasses
import json
import pathlib
import platform

import torch
import triton

from deform_gqa.inspect.host_time import HostTime, measure

HEADER = (
    '| op | forward, us | p5 | launches | backward, us | p5 | launches |',
    '|---|--:|--:|--:|--:|--:|--:|',
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repeats', type=int, default=3000)
    parser.add_argument('--out', type=pathlib.Path, help='folder of the results')
    return parser.parse_args()


def table(found: list[HostTime]) -> str:
    rows = [
        f'| {x.op} | {x.forward_us:.0f} | {x.forward_p5_us:.0f} | {x.forward_launches} '
        f'| {x.backward_us:.0f} | {x.backward_p5_us:.0f} | {x.backward_launches} |'
        for x in found
    ]
    return '\n'.join([*HEADER, *rows])


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    found = measure(args.repeats)
    print(table(found))
    if args.out is None:
        return
    environment = dict(
        processor=platform.machine(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton.__version__,
        repeats=args.repeats,
        stubbed='triton.runtime.jit.JITFunction.run',
    )
    args.out.mkdir(parents=True, exist_ok=True)
    results = dict(environment, results=[dataclasses.asdict(x) for x in found])
    (args.out / 'host_time.json').write_text(json.dumps(results, indent=2) + '\n')
    notes = ', '.join(f'{name} {value}' for name, value in environment.items())
    (args.out / 'host_time.md').write_text(
        f'# Host time of a call, launches taken out\n\n{table(found)}\n\n{notes}\n'
    )


if __name__ == '__main__':
    main()
