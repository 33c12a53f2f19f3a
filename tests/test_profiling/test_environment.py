import json
import subprocess

import pytest
import torch

from deform_gqa.profiling import environment
from deform_gqa.version import __version__

CPU = torch.device('cpu')


def test_environment_is_complete():
    found = environment.describe_environment(CPU)
    assert found['device'] == found['cpu']
    assert found['device']
    assert found['torch'] == torch.__version__
    assert found['deform_gqa'] == __version__
    assert found['threads'] == torch.get_num_threads()
    assert found['date'].endswith('+00:00')
    json.dumps(found)


def test_commit_of_a_checkout(monkeypatch, tmp_path):
    def git(*args):
        command = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *args]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(environment, '_REPOSITORY', tmp_path)
    monkeypatch.delenv('DEFORM_GQA_COMMIT', raising=False)
    assert environment.git_commit() is None
    monkeypatch.setenv('DEFORM_GQA_COMMIT', 'abc')
    assert environment.git_commit() == 'abc'
    (tmp_path / 'file').write_text('1')
    git('init')
    git('add', 'file')
    git('commit', '-m', 'first')
    commit = environment.git_commit()
    assert len(commit) == 12
    (tmp_path / 'file').write_text('2')
    assert environment.git_commit() == f'{commit}+changes'


def test_package_version():
    assert environment.package_version('torch')
    assert environment.package_version('no-such-distribution') is None


def test_command(capsys):
    assert environment.main([]) == 0
    assert json.loads(capsys.readouterr().out)['device_type'] == 'cpu'


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
def test_command_without_a_gpu(capsys):
    assert environment.main(['cuda']) == 1
    assert 'no CUDA device' in capsys.readouterr().err
