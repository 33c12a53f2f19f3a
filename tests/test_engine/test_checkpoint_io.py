import argparse
import contextlib
import errno
import http.server
import os
import re
import threading
from functools import partial

import numpy as np
import pytest
import torch
from mmengine.fileio import get_file_backend
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.runner import load_checkpoint as mmengine_load_checkpoint
from torch import nn

from deform_gqa.engine import check_checkpoint, load_checkpoint, use_safe_loading
from deform_gqa.engine.checkpoint_io import (
    AtomicLocalBackend,
    find_checkpoint_to_resume,
    point_to_checkpoint,
    remove_parts,
    use_atomic_writing,
)


class Malicious:
    """Pickles as a call that makes a folder, as an attacker's would do worse."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


class HiddenGetattr:
    """Pickles as a use of getattr that mmengine's own checkpoints do not make."""

    def __reduce__(self):
        return getattr, (np.ndarray, '__init__')


@pytest.fixture
def malicious(tmp_path):
    """A checkpoint, and the folder that exists if its code has run."""
    folder = tmp_path / 'harmed'
    file = tmp_path / 'malicious.pth'
    torch.save(dict(state_dict={}, meta=Malicious(folder)), file)
    return str(file), folder


@pytest.fixture
def honest(tmp_path):
    """Holds what mmengine stores in its checkpoints."""
    file = tmp_path / 'honest.pth'
    checkpoint = dict(
        state_dict=nn.Linear(2, 3).state_dict(),
        meta=dict(epoch=3, dataset_meta=dict(classes=('a',), palette=[(1, 2, 3)])),
        message_hub=dict(
            log_scalars=dict(loss=HistoryBuffer([0.5, 0.25], [1, 1])),
            runtime_info=dict(
                best_score=np.float64(0.5),
                count=np.int64(3),
                ratio=np.float32(0.5),
                flag=np.bool_(True),
            ),
        ),
        param_schedulers=[dict(milestones=slice(1, 3))],
    )
    torch.save(checkpoint, file)
    return str(file), checkpoint


def test_reads_what_mmengine_stores(honest):
    file, expected = honest
    loaded = load_checkpoint(file)
    assert torch.equal(loaded['state_dict']['weight'], expected['state_dict']['weight'])
    assert loaded['meta'] == expected['meta']
    hub = loaded['message_hub']
    assert hub['runtime_info'] == expected['message_hub']['runtime_info']
    assert hub['log_scalars']['loss'].mean() == 0.375
    check_checkpoint(file)


def test_reads_names_of_both_numpy_versions(tmp_path):
    file = tmp_path / 'old.pth'
    torch.save(dict(score=np.float64(0.5), box=np.ones(2)), file)
    data = file.read_bytes()
    for module in (b'numpy.core.multiarray', b'numpy._core.multiarray'):
        other = dict(box=np.ones(2), score=np.float64(0.5))
        torch.save(other, file, _use_new_zipfile_serialization=False)
        data = file.read_bytes()
        data = re.sub(rb'numpy\._?core\.multiarray', module, data)
        file.write_bytes(data)
        assert load_checkpoint(file)['score'] == 0.5


def test_refuses_code(malicious):
    file, folder = malicious
    for read in (load_checkpoint, check_checkpoint):
        with pytest.raises(ValueError, match=r"malicious\.pth' was refused"):
            read(file)
    assert not folder.exists()


def test_refuses_code_in_the_old_format(malicious, tmp_path):
    _, folder = malicious
    file = tmp_path / 'old.pth'
    torch.save(Malicious(folder), file, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"old\.pth' was refused"):
        check_checkpoint(file)
    assert not folder.exists()


@pytest.mark.parametrize('zipped', [True, False])
def test_the_reason_is_short(malicious, tmp_path, zipped):
    file = tmp_path / 'short.pth'
    content = dict(meta=Malicious(tmp_path))
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r'\(it names posix.mkdir\)\. If you') as info:
        check_checkpoint(file)
    assert 'PyTorch' not in str(info.value)
    assert 'safe_globals' not in str(info.value)


@pytest.mark.parametrize('content', [[torch.ones(1)], torch.ones(1), 'weights'])
def test_a_checkpoint_is_a_dict(tmp_path, content):
    file = tmp_path / 'list.pth'
    torch.save(content, file)
    message = f'must hold a dict, got a {type(content).__name__}'
    with pytest.raises(ValueError, match=message):
        check_checkpoint(file)


@pytest.mark.parametrize('zipped', [True, False])
def test_every_damage_is_told_in_a_sentence(tmp_path, zipped):
    file = tmp_path / 'damaged.pth'
    content = dict(state_dict=nn.Linear(20, 3).state_dict(), meta=dict(epoch=3))
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(whole[: generator.integers(0, len(whole))])
        for place in generator.integers(0, max(len(data), 1), 3)[: len(data)]:
            data[place] = generator.integers(256)
        file.write_bytes(data)
        with contextlib.suppress(ValueError):  # all that may be raised
            load_checkpoint(file)


def test_refuses_getattr_beyond_history_buffers(tmp_path):
    file = tmp_path / 'hidden.pth'
    torch.save(dict(meta=HiddenGetattr()), file)
    with pytest.raises(ValueError, match=r'was refused.*getattr'):
        load_checkpoint(file)


def test_missing_file(tmp_path):
    for read in (load_checkpoint, check_checkpoint):
        with pytest.raises(FileNotFoundError, match=r"no\.pth' does not exist"):
            read(tmp_path / 'no.pth')


@pytest.mark.parametrize('length', [0, 700])
def test_damaged_file(honest, length):
    file, _ = honest
    with open(file, 'r+b') as stream:
        stream.truncate(length)
    with pytest.raises(ValueError, match=r"honest\.pth' (cannot be read|was refused)"):
        check_checkpoint(file)


@pytest.mark.parametrize(
    'content',
    [
        b'<!DOCTYPE html><html>not found</html>',
        b'version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n',
        b'state_dict: {}',
        b'\x80\x02}q\x00.',
    ],
)
def test_what_is_no_checkpoint_is_not_called_dangerous(tmp_path, content):
    file = tmp_path / 'page.pth'
    file.write_bytes(content)
    message = re.escape(f'cannot be read: it starts with {content[:32]!r}')
    with pytest.raises(ValueError, match=message):
        check_checkpoint(file)


@pytest.mark.parametrize('key', ['model', 'state_dict'])
def test_advice_fits_every_wrapper(tmp_path, key):
    file, new_file = tmp_path / 'options.pth', tmp_path / 'new.pth'
    weights = dict(weight=torch.ones(1))
    torch.save({key: weights, 'config': argparse.Namespace(a=1)}, file)
    with pytest.raises(ValueError, match=r'options\.pth. was refused') as info:
        check_checkpoint(file)
    advice = re.search(r'new file: (.*\)), where KEY', str(info.value))[1]
    eval(advice, dict(torch=torch, FILE=file, NEW_FILE=new_file, KEY=key))
    assert load_checkpoint(new_file) == dict(state_dict=weights)


def test_mmengine_reads_through_ours(malicious, honest):
    use_safe_loading()
    file, folder = malicious
    with pytest.raises(ValueError, match='was refused'):
        mmengine_load_checkpoint(nn.Linear(2, 3), file)
    assert not folder.exists()
    model = nn.Linear(2, 3)
    mmengine_load_checkpoint(model, honest[0])
    assert torch.equal(model.weight, honest[1]['state_dict']['weight'])


def test_web_addresses(malicious, honest, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('no_proxy', '*')
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}'
    use_safe_loading()
    try:
        check_checkpoint(f'{address}/malicious.pth')  # looked at when loaded
        with pytest.raises(ValueError, match='was refused'):
            CheckpointLoader.load_checkpoint(f'{address}/malicious.pth', 'cpu')
        loaded = CheckpointLoader.load_checkpoint(f'{address}/honest.pth', 'cpu')
        (tmp_path / 'page.pth').write_text('<!DOCTYPE html>')
        with pytest.raises(ValueError, match=r'page.pth. cannot be read.*DOCTYPE'):
            CheckpointLoader.load_checkpoint(f'{address}/page.pth', 'cpu')
    finally:
        server.shutdown()
        server.server_close()
    assert not malicious[1].exists()
    assert loaded['meta'] == honest[1]['meta']


def test_backend_replaces_in_one_step(tmp_path, monkeypatch):
    backend = get_file_backend(backend_args=dict(backend='atomic_local'))
    assert isinstance(backend, AtomicLocalBackend)
    file = tmp_path / 'folder' / 'file'
    backend.put(b'old', file)
    assert file.read_bytes() == b'old'

    def power_cut(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, 'fsync', power_cut)
    with pytest.raises(KeyboardInterrupt):
        backend.put(b'new', file)
    assert file.read_bytes() == b'old'
    monkeypatch.undo()
    backend.put_text('new', file)
    assert file.read_text() == 'new'
    assert [path.name for path in file.parent.iterdir()] == ['file']


def test_a_full_disk_keeps_nothing_of_what_did_not_fit(tmp_path, monkeypatch):
    file = tmp_path / 'epoch_1.pth'
    file.write_bytes(b'old')

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match=r"No space left on device: '.*epoch_1\.pth'"):
        AtomicLocalBackend().put(b'new', file)
    assert file.read_bytes() == b'old'
    assert os.listdir(tmp_path) == ['epoch_1.pth']


def test_atomic_writing_of_everything(tmp_path):
    use_atomic_writing()
    file = str(tmp_path / 'file')
    for arguments in (None, dict(backend='local')):
        backend = get_file_backend(file, backend_args=arguments)
        assert isinstance(backend, AtomicLocalBackend)


def test_parts_of_killed_writers_go(tmp_path):
    for name in ('epoch_1.pth', 'epoch_2.pth.part', 'last_checkpoint.part', 'a.part'):
        (tmp_path / name).touch()
    remove_parts(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ['a.part', 'epoch_1.pth']
    remove_parts(tmp_path / 'none')


def test_checkpoint_to_resume(tmp_path):
    work_dir = tmp_path / 'work'
    assert find_checkpoint_to_resume(str(work_dir)) is None
    file = work_dir / 'epoch_1.pth'
    point_to_checkpoint(work_dir, str(file))
    with pytest.raises(FileNotFoundError, match=r"epoch_1\.pth' does not exist"):
        find_checkpoint_to_resume(str(work_dir))
    torch.save(dict(state_dict={}), file)
    assert find_checkpoint_to_resume(str(work_dir)) == str(file)
    moved = work_dir.rename(tmp_path / 'moved')
    assert find_checkpoint_to_resume(moved) == str(moved / 'epoch_1.pth')
