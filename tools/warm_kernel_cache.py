"""Compiles the kernels of tools/gpu_check.sh on a machine without a GPU.

    python tools/warm_kernel_cache.py
    python tools/warm_kernel_cache.py --arch 80 --libtriton ./libtriton.so

Writes an archive that gpu_check.sh finds (work_dirs/kernel_cache.tar.gz), for the
same commit and the same version of Triton. Where the two machines differ in the
version of Python, --libtriton names the file triton/_C/libtriton.so out of the other
one's wheel. Takes some minutes; a second run compiles only what has changed.

    python tools/warm_kernel_cache.py --unpack ARCHIVE

puts an archive into the cache that TRITON_CACHE_DIR names.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import triton

from deform_gqa.benchmark.core.options import DTYPES
from deform_gqa.benchmark.ops import options as op_options
from deform_gqa.benchmark.ops.backends import make_call
from deform_gqa.benchmark.ops.case import OpCase
from deform_gqa.benchmark.ops.gate import MAX_PAIRS, leaves, run
from deform_gqa.benchmark.ops.registry import OP_CASES
from deform_gqa.inspect.kernel_cache import compile_only, pack, unpack, use_library

ROOT = pathlib.Path(__file__).parents[1]
BENCHMARK = 'tools/benchmark.py'
DEFAULT_OUT = ROOT / 'work_dirs' / 'kernel_cache.tar.gz'


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--arch', type=int, default=90, help='compute capability (default: 90)')
    add('--libtriton', type=pathlib.Path, help="the other machine's libtriton.so")
    add('--out', type=pathlib.Path, default=DEFAULT_OUT, help='the archive')
    add('--workers', type=int, default=os.cpu_count(), help='default: all cores')
    add('--unpack', type=pathlib.Path, metavar='ARCHIVE', help='unpack it, no more')
    return parser.parse_args(argv)


def commands() -> list[list[str]]:
    """What gpu_check.sh runs."""
    listed = subprocess.run(
        ['bash', str(ROOT / 'tools' / 'gpu_check.sh'), '--list'],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHON': sys.executable},
    )
    return [shlex.split(line) for line in listed.stdout.splitlines()]


def arguments_of(command: list[str], *words: str) -> list[str] | None:
    """What comes after these words; None where the command does not hold them."""
    for i in range(len(command) - len(words) + 1):
        if command[i : i + len(words)] == list(words):
            return command[i + len(words) :]
    return None


class OneShare:
    """Of several processes that share the tests, this one runs every ``count``-th.

    Tests launch first and then compare: that they fail here is no news, but that
    something else stopped them is.
    """

    def __init__(self, index: int, count: int):
        self.index, self.count = index, count
        self.stopped = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = items[self.index :: self.count]
        for item in items:  # they are skipped where there is no GPU
            item.own_markers = [m for m in item.own_markers if m.name != 'skip']

    def pytest_exception_interact(self, node, call):
        if not call.excinfo.errisinstance(AssertionError):
            self.stopped.append(f'{node.nodeid}: {call.excinfo.exconly()}')


@contextlib.contextmanager
def gpu_is_cpu():
    """Tensors stay where they are, and what torch would compile runs as it is."""
    with (
        mock.patch.object(torch.Tensor, 'cuda', lambda self: self),
        mock.patch.object(torch, 'compile', lambda function, **options: function),
    ):
        yield


def run_tests(files: list[str], index: int, count: int) -> list[str]:
    """Returns what kept tests from launching."""
    share = OneShare(index, count)
    options = shlex.split('-m cuda -q --tb=no -p no:cacheprovider -p no:xdist')
    with (
        gpu_is_cpu(),
        open(os.devnull, 'w') as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        pytest.main([f'--rootdir={ROOT}', *options, *files], plugins=[share])
    return share.stopped


def op_cases(arguments: list[str]) -> Iterator[tuple[OpCase, torch.dtype]]:
    """The cases of a run of ``benchmark.py op`` on a GPU, and those of its gate."""
    parser = argparse.ArgumentParser()
    with (
        mock.patch.object(torch.cuda, 'is_available', lambda: True),
        mock.patch.object(torch.cuda, 'device_count', lambda: 1),
    ):
        op_options.add_arguments(parser)
        options = op_options.resolve(parser.parse_args(arguments))
    for op in options.ops:
        for case in OP_CASES[op].select(options):
            for each in dict.fromkeys([case.reduced(MAX_PAIRS['cuda']), case]):
                yield each, DTYPES[options.dtype]


def run_case(case: OpCase, dtype: torch.dtype) -> None:
    cpu = torch.device('cpu')
    inputs = leaves(case.make_inputs(cpu, dtype), None)
    call = make_call(case, 'triton')
    run(call, inputs, case.make_grad_out(cpu, dtype))
    with torch.no_grad():
        call(inputs)


def compile_share(
    args: argparse.Namespace, listed: list[list[str]], index: int
) -> tuple[set[pathlib.Path], list[str]]:
    """One process's part: the folders of its kernels, and what went wrong."""
    torch.set_num_threads(1)
    os.environ['TRITON_CACHE_DIR'] = str(cache_folder(args.out))
    library = contextlib.nullcontext()
    if args.libtriton is not None:
        library = use_library(args.libtriton)
    with library, compile_only(args.arch) as folders:
        files = [
            argument
            for command in listed
            for argument in arguments_of(command, '-m', 'pytest') or []
            if argument.endswith('.py')
        ]
        stopped = run_tests(files, index, args.workers)
        suites = (arguments_of(command, BENCHMARK, 'op') for command in listed)
        cases = (op_cases(arguments) for arguments in suites if arguments is not None)
        distinct = dict.fromkeys(itertools.chain.from_iterable(cases))
        for case, dtype in list(distinct)[index :: args.workers]:
            run_case(case, dtype)
    return folders, stopped


def cache_folder(archive: pathlib.Path) -> pathlib.Path:
    """Where the kernels are kept that an archive is made of."""
    return archive.with_name(archive.name.split('.')[0] + '_built').absolute()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.unpack is not None:
        folder = pathlib.Path(triton.knobs.cache.dir)
        print(f'{unpack(args.unpack, folder)} kernels put into {folder}')
        return
    listed = commands()
    shares = [(args, listed, index) for index in range(args.workers)]
    with multiprocessing.get_context('spawn').Pool(args.workers) as pool:
        found = pool.starmap(compile_share, shares)
    for line in itertools.chain.from_iterable(stopped for _, stopped in found):
        print(f'not compiled: {line}')
    folders = set().union(*(folders for folders, _ in found))
    count = pack(folders, args.out)
    made_by = f'sm_{args.arch} by Triton {triton.__version__}'
    print(f'{count} kernels for {made_by} in {args.out}')


if __name__ == '__main__':
    main()
