from pathlib import Path

import numpy as np
import pytest
import torch
from golden import check_against_golden, load_golden, load_state, sub_dict
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from deform_gqa.archs import ARCHS, resolve_arch
from deform_gqa.models import DAT, DeformableGQA, PyramidAttention, WindowAttention
from deform_gqa.models.backbones.dat_checkpoint import (
    DROPPED_BUFFERS,
    load_dat_checkpoint,
)
from deform_gqa.models.backbones.dat_stage import DATStage

MINI = dict(
    embed_dims=(8, 16, 32, 64),
    depths=(2, 2, 2, 2),
    num_heads=(1, 2, 4, 4),
    block_types=('ND', 'LS', 'PX', 'DD'),
    offset_groups=(1, 2, 2, 4),
    table_sizes=(16, 8, 4, 2),
    neighborhood_sizes=(3, 3, 3, 3),
    window_sizes=(3, 3, 3, 3),
)


def mini(**options):
    arch = {**MINI, **options.pop('arch', {})}
    torch.manual_seed(0)
    return DAT(arch, **options)


def official_arch(config):
    """An arch dict from the official argument names."""
    image_size = config.get('img_size', 224)
    flags = dict(
        conv_stem='use_conv_patches', lpu='use_lpus', dwconv_mlp='use_dwc_mlps'
    )
    arch = dict(
        embed_dims=config['dims'],
        depths=config['depths'],
        num_heads=config['heads'],
        block_types=[''.join(letters) for letters in config['stage_spec']],
        offset_groups=[max(groups, 1) for groups in config['groups']],
        strides=[max(stride, 1) for stride in config['strides']],
        offset_kernel_sizes=config['ksizes'],
        offset_range_factors=config['offset_range_factor'],
        position_bias=['table' if use else None for use in config['use_pes']],
        table_sizes=[image_size // 4 // 2**i for i in range(4)],
        neighborhood_sizes=config.get('nat_ksizes', (3,) * 4),
        stem_dim=config['dim_stem'],
    )
    for ours, official in flags.items():
        default = False if ours == 'conv_stem' else (False,) * 4
        arch[ours] = config.get(official, default)
    return arch


@pytest.mark.parametrize('backend', ['naive', 'torch'])
@pytest.mark.parametrize(
    'name', ['dat_pp_mini_64x64', 'dat_pp_mini_96x160', 'dat_v1_mini_224x224']
)
def test_equals_official_backbone(name, backend):
    config, arrays = load_golden(name)
    model = DAT(official_arch(config), backend=backend)
    missing, unexpected = load_dat_checkpoint(model, sub_dict(arrays, 'state/'))
    assert not unexpected
    assert all(key.startswith('norms.') for key in missing)
    model.norms = nn.ModuleList(nn.Identity() for _ in range(4))
    check_against_golden(model, arrays)


def zeros_of(state):
    return {name: torch.zeros(shape) for name, shape in state.items()}


@pytest.mark.parametrize(
    ('name', 'arch', 'params_m'),
    [
        ('dat_tiny_v1', None, 28.313),
        ('dat_tiny_pp', 't++', 23.963),
        ('dat_small_pp', 's++', 53.127),
        ('dat_base_pp', 'b++', 93.691),
    ],
)
def test_official_checkpoints_load(name, arch, params_m):
    """Classification: the norms are missing. Detection: nothing is."""
    official = load_state(name)
    # The reference DAT-T has offset kernels of 3, the released one of 5 and 3.
    model = DAT(arch or official_arch(official['config']))
    state = zeros_of(official['state'])
    missing, unexpected = load_dat_checkpoint(model, {'model': state})
    assert not unexpected
    assert set(missing) == {
        f'norms.{i}.norm.{k}' for i in range(4) for k in ('weight', 'bias')
    }
    classifier = {n: v for n, v in state.items() if n.startswith('cls_')}
    own = sum(p.numel() for n, p in model.named_parameters() if 'norms.' not in n[:6])
    total = own + sum(v.numel() for v in classifier.values())
    assert total / 1e6 == pytest.approx(params_m, abs=1e-3)

    detection = {n: v for n, v in state.items() if not n.startswith('cls_')}
    for i, dim in enumerate(official['config']['dims']):
        detection[f'norms.{i}.norm.weight'] = torch.ones(dim)
        detection[f'norms.{i}.norm.bias'] = torch.ones(dim)
    detection = {f'backbone.{n}': v for n, v in detection.items()}
    detection['bbox_head.conv.weight'] = torch.ones(1)
    assert load_dat_checkpoint(model, {'state_dict': detection}) == ([], [])
    assert not model.stages[2].attns[1].proj_q.weight.any()
    assert model.norms[3].norm.bias.all()


def test_tables_of_another_size_are_resampled(tmp_path):
    small, large = (
        mini(),
        mini(
            arch=dict(
                table_sizes=(24, 8, 4, 2),
                window_sizes=(5,) * 4,
                block_types=('ND', 'LS', 'PP', 'DD'),
            )
        ),
    )
    state = {
        n: v for n, v in small.state_dict().items() if not n.startswith('stages.2')
    }
    name = 'stages.0.attns.1.rpe_table'
    state[name] = torch.ones_like(state[name])
    window = 'stages.1.attns.0.relative_position_bias_table'
    state[window] = torch.arange(25.0)[:, None].expand(25, 2).clone()
    torch.save({'state_dict': state}, tmp_path / 'small.pth')
    large.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'small.pth'))
    large.init_weights()
    loaded = large.state_dict()
    assert_close(loaded[name], torch.ones(1, 47, 47))
    assert loaded[window].shape == (81, 2)
    assert loaded[window][40, 1] == pytest.approx(12, abs=1e-3)


@pytest.mark.parametrize('kinds', [('table', 'fixed'), ('fixed', 'table')])
def test_dense_biases_are_not_resampled(kinds):
    source, target = (mini(arch=dict(position_bias=(kind,) * 4)) for kind in kinds)
    with pytest.raises(ValueError, match=r'attns.1.rpe_table has shape .* needs'):
        load_dat_checkpoint(target, source.state_dict())
    assert load_dat_checkpoint(source, source.state_dict()) == ([], [])


def documented_config(page, section):
    """The Python example of a section of the documentation, executed."""
    text = Path(__file__).parents[3].joinpath(page).read_text(encoding='utf-8')
    config = {}
    exec(
        text.split(f'## {section}\n')[1].split('```python\n')[1].split('```')[0], config
    )
    return config


def test_documented_example_loads_an_official_checkpoint(tmp_path):
    path = str(tmp_path / 'dat_pp_tiny.pth')
    torch.save({'model': zeros_of(load_state('dat_tiny_pp')['state'])}, path)
    section = 'Put the backbone into your detector'
    config = documented_config('docs/user_guide.md', section)
    backbone = {**config['model']['backbone']}
    del backbone['_delete_']
    backbone['init_cfg'] = dict(backbone['init_cfg'], checkpoint=path)
    model = MODELS.build(backbone)
    model.init_weights()
    assert not model.stages[0].attns[0].qkv.weight.any()
    dims = [ARCHS['t++']['embed_dims'][i] for i in model.out_indices]
    assert config['model']['neck']['in_channels'] == dims


def test_example_of_the_front_page():
    config = documented_config('README.md', 'Ten lines of use')['model']
    assert config['backbone'].pop('_delete_')
    with torch.device('meta'):
        model = MODELS.build(config['backbone'])
    assert [model.stages[i].attns[-1].num_kv_heads for i in range(4)] == [1, 2, 4, 8]
    dims = [ARCHS['t++']['embed_dims'][i] for i in model.out_indices]
    assert config['neck']['in_channels'] == dims


class TestInitCfg:
    def test_list(self):
        model = mini(init_cfg=[dict(type='Constant', layer='Conv2d', val=0.5)])
        model.init_weights()
        assert (model.patch_proj[0].weight == 0.5).all()

    @pytest.mark.parametrize('prefix', ['encoder.', 'encoder'])
    def test_prefix_and_map_location(self, tmp_path, prefix):
        path = str(tmp_path / 'encoder.pth')
        state = {f'encoder.{n}': v + 1 for n, v in mini().state_dict().items()}
        torch.save({'state_dict': state, 'meta': {}}, path)
        cfg = dict(type='Pretrained', checkpoint=path, map_location='cpu')
        model = mini(init_cfg=dict(cfg, prefix=prefix))
        model.init_weights()
        assert_close(
            model.state_dict(), {n: v + 1 for n, v in mini().state_dict().items()}
        )
        with pytest.raises(ValueError, match='holds no weight'):
            mini(init_cfg=dict(cfg, prefix='backbone')).init_weights()

    @pytest.mark.parametrize(
        'options', [dict(), dict(checkpoint='a.pth', revision='main')]
    )
    def test_wrong_options_of_pretrained(self, options):
        model = mini(init_cfg=dict(type='Pretrained', **options))
        with pytest.raises(ValueError, match=r'takes checkpoint .* got .*Pretrained'):
            model.init_weights()


def test_checkpoint_of_another_number_of_kv_heads():
    state = mini().state_dict()
    with pytest.raises(ValueError, match=r'proj_qkv.weight has shape \(48, 16\)'):
        load_dat_checkpoint(mini(num_kv_heads=1), state)


def test_checkpoint_without_any_weight():
    with pytest.raises(ValueError, match='holds no weight'):
        load_dat_checkpoint(mini(), {'state_dict': {'head.weight': torch.ones(1)}})


def test_official_buffers_are_dropped():
    state = mini().state_dict()
    assert not any(name.endswith(DROPPED_BUFFERS) for name in state)
    for buffer in DROPPED_BUFFERS:
        state[f'stages.1.attns.0.{buffer}'] = torch.zeros(9, 9)
    assert load_dat_checkpoint(mini(), state) == ([], [])


@pytest.mark.parametrize('arch', ARCHS)
def test_arch_zoo(arch):
    with torch.device('meta'):
        model = MODELS.build(dict(type='DAT', arch=arch, num_kv_heads=None))
    dims, depths = ARCHS[arch]['embed_dims'], ARCHS[arch]['depths']
    assert [len(stage.attns) for stage in model.stages] == list(depths)
    assert [norm.norm.normalized_shape[0] for norm in model.norms] == list(dims)


@pytest.mark.parametrize('size', [(32, 32), (33, 47), (64, 96), (50, 131)])
@pytest.mark.parametrize('conv_stem', [True, False])
def test_any_image_size(size, conv_stem):
    model = mini(arch=dict(conv_stem=conv_stem))
    outs = model(torch.rand(1, 3, *size))
    sides = list(size)
    sides = [(s + 3) // 4 if conv_stem else s // 4 for s in sides]
    for out, dim in zip(outs, MINI['embed_dims'], strict=True):
        assert out.shape == (1, dim, *sides)
        sides = [(s + 1) // 2 if conv_stem else max(s // 2, 0) for s in sides]
    sum(out.sum() for out in outs).backward()


def test_outputs_and_gradients_of_all_parameters():
    model = mini(num_kv_heads=1, drop_path_rate=0.1, out_indices=(1, 3))
    outs = model(torch.rand(2, 3, 64, 96))
    assert [out.shape for out in outs] == [(2, 16, 8, 12), (2, 64, 2, 3)]
    assert all(out.is_contiguous() for out in outs)
    sum(out.square().sum() for out in outs).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_kv_heads_by_stage():
    assert mini(num_kv_heads=np.int64(1)).stages[3].attns[0].num_kv_heads == 1
    model = mini(num_kv_heads=(1, 1, 2, 4))
    assert model.stages[0].attns[1].num_kv_heads == 1
    assert model.stages[3].attns[0].num_kv_heads == 4
    assert model.stages[3].attns[0].proj_k.weight.shape[0] == 64


def test_checkpointing_changes_nothing():
    x = torch.rand(1, 3, 64, 64)
    grads = []
    for with_cp in (False, True, (True, False, False, True)):
        model = mini(with_cp=with_cp, drop_path_rate=0.3, drop_rate=0.1)
        torch.manual_seed(1)
        sum(out.square().sum() for out in model(x)).backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, *checkpointed in zip(*grads, strict=True):
        for grad in checkpointed:
            assert_close(grad, plain)


@pytest.mark.parametrize('letters', ['ND', 'LS', 'PX'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_residual_stream_in_float32(letters, dtype):
    arch = resolve_arch({**MINI, 'block_types': (letters,) * 4})
    stage = DATStage(arch, 1, 16, {}, [0.0, 0.0], 0.0, False)
    x = torch.rand(1, 16, 6, 9)
    with torch.autocast('cpu', dtype):
        out = stage(x)
    assert out.dtype == torch.float32
    assert_close(out, stage(x), rtol=0.05, atol=0.05)
    convolved = []
    unit = stage.local_perception_units[0]
    unit.register_forward_hook(lambda *args: convolved.append(args[2]))
    assert stage._add_lpu(x, 0) is convolved[0]  # in place: no map of its own
    assert stage.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    'arch',
    [dict(), dict(block_types=('LS', 'PX', 'LD', 'DD'), conv_stem=False)],
    ids=['dat++', 'windows'],
)
def test_compiles_once_for_all_image_sizes(arch):
    model = mini(arch=arch, num_kv_heads=1, drop_path_rate=0.1, backend='torch')
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for size in [(224, 256), (256, 352), (230, 331)]:
        x = torch.rand(2, 3, *size)
        torch.manual_seed(1)
        outs = compiled(x)
        torch.manual_seed(1)
        for out, expected in zip(outs, model(x), strict=True):
            assert_close(out, expected)
    assert counter.frame_count == 1


def test_drop_path_rates_rise_linearly():
    model = mini(drop_path_rate=0.7)
    rates = [getattr(d, 'drop_prob', 0.0) for s in model.stages for d in s.drop_path]
    assert_close(torch.tensor(rates), torch.linspace(0, 0.7, 8))


def test_stages_after_the_last_output_are_not_built():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 64, 96)
    whole, part = mini(drop_path_rate=0.2), mini(drop_path_rate=0.2, out_indices=(0, 2))
    missing, unexpected = part.load_state_dict(whole.state_dict(), strict=False)
    assert not missing
    later = ('stages.3.', 'norms.1.', 'norms.3.', 'down_projs.2.')
    assert {name for name in unexpected if not name.startswith(later)} == set()
    rates = [
        [block.drop_prob for block in model.modules() if hasattr(block, 'drop_prob')]
        for model in (whole, part)
    ]
    assert rates[1] == rates[0][: len(rates[1])]
    part.train()
    sum(out.sum() for out in part(image)).backward()
    assert all(parameter.grad is not None for parameter in part.parameters())
    with torch.no_grad():
        expected, outs = whole.eval()(image), part.eval()(image)
    assert len(outs) == 2
    for out, like in zip(outs, (expected[0], expected[2]), strict=True):
        assert torch.equal(out, like)


@pytest.mark.parametrize('frozen', [-1, 0, 2, 4])
def test_frozen_stages(frozen):
    model = mini(frozen_stages=frozen)
    model.train()
    trained = {
        n.rsplit('.', 1)[0] for n, p in model.named_parameters() if p.requires_grad
    }
    assert ('patch_proj.0' in trained) == (frozen < 0)
    for i in range(4):
        kept = any(name.startswith(f'stages.{i}.') for name in trained)
        assert kept == (i >= frozen)
        assert model.stages[i].training == (i >= frozen)
    for i in range(3):
        # down_projs[i] leads to stage i + 1 and is frozen with it
        kept = any(name.startswith(f'down_projs.{i}.') for name in trained)
        assert kept == (i + 1 >= frozen)


def test_norm_eval():
    model = mini(norm_eval=True)
    model.stages[0].attns[0] = nn.Sequential(nn.BatchNorm2d(8))
    model.train()
    assert not model.stages[0].attns[0][0].training
    assert model.stages[0].training


def test_layer_scale():
    model = mini(arch=dict(layer_scale=(1e-5, -1, -1, -1)))
    assert model.stages[0].layer_scales[0].weight.shape == (8,)
    renamed = {
        n.replace('layer_scales.0.weight', 'layer_scales.0.gamma'): v
        for n, v in model.state_dict().items()
    }
    assert load_dat_checkpoint(model, renamed) == ([], [])


class TestAttentionOverrides:
    def test_option_of_the_default_class(self):
        model = mini(attention=dict(D=dict(position_bias=None, stride=1)))
        block = model.stages[0].attns[1]
        assert isinstance(block, DeformableGQA)
        assert block.rpe_table is None and block.stride == 1
        assert block.offset_kernel_size == 9  # the arch's

    def test_other_class(self):
        model = mini(
            num_kv_heads=1,
            attn_drop_rate=0.25,
            attention=dict(D=dict(type='PyramidAttention', sr_ratio=2)),
        )
        block = model.stages[3].attns[0]
        assert isinstance(block, PyramidAttention)
        assert (block.sr_ratio, block.num_kv_heads, block.attn_drop) == (2, 1, 0.25)
        assert isinstance(model.stages[1].attns[0], WindowAttention)
        assert model(torch.rand(1, 3, 64, 64))[3].shape == (1, 64, 2, 2)

    def test_new_letter(self):
        model = mini(
            arch=dict(block_types=('ND', 'LS', 'PX', 'DW')),
            attention=dict(W=dict(type=WindowAttention, window_size=2)),
        )
        assert isinstance(model.stages[3].attns[1], WindowAttention)

    def test_option_that_the_class_does_not_take(self):
        override = dict(type='PyramidAttention', sr_ratio=2, stride=4)
        with pytest.raises(TypeError, match=r"no option \['stride'\].*_delete_"):
            mini(attention=dict(D=override))

    def test_delete_where_the_base_config_has_no_such_letter(self, tmp_path):
        """mmengine takes ``_delete_`` out only of what it replaces."""
        base = dict(model=dict(type='DAT', arch=MINI))
        Config(base).dump(tmp_path / 'base.py')
        override = "D=dict(type='PyramidAttention', _delete_=True, sr_ratio=2)"
        for attention in (f'dict({override})', f'dict({override}, _delete_=True)'):
            heir = tmp_path / 'heir.py'
            heir.write_text(
                f"_base_ = 'base.py'\nmodel = dict(attention={attention})\n"
            )
            model = MODELS.build(Config.fromfile(heir).model)
            assert model.stages[3].attns[0].sr_ratio == 2

    @pytest.mark.parametrize(
        ('attention', 'message'),
        [
            (dict(D='PyramidAttention'), r"attention\['D'\] must be a dict, got 'Py"),
            (['D'], r"attention must be a dict, got \['D'\]"),
        ],
    )
    def test_overrides_of_another_type(self, attention, message):
        with pytest.raises(TypeError, match=message):
            mini(attention=attention)

    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            (dict(attention=dict(Z=dict(type='PyramidAttention'))), r"letters \['Z'\]"),
            (dict(arch=dict(block_types=('ND', 'LS', 'PX', 'DQ'))), "letter 'Q'"),
            (dict(attention=dict(D=dict(type='NoSuchThing'))), "'NoSuchThing'"),
            (dict(attention=dict(D=dict(type=3))), '3 is not reg.*DeformableGQA'),
        ],
    )
    def test_bad_letters(self, options, message):
        with pytest.raises(ValueError, match=message):
            mini(**options)


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(arch='xxl'), ValueError, "got 'xxl'"),
        (dict(arch=3), TypeError, 'arch must be a name or a dict, got int'),
        (dict(arch=dict(depths=(1, 1, 1, 1))), ValueError, "must hold 'embed_dims'"),
        (
            dict(arch={**MINI, 'depth': 3}),
            ValueError,
            r"unknown arch options \['depth'\]",
        ),
        (dict(arch={**MINI, 'strides': (1, 2)}), ValueError, "'strides' must have 4"),
        (
            dict(arch={**MINI, 'depths': (2, 2, 3, 2)}),
            ValueError,
            'stage 2 must name 3',
        ),
        (dict(arch=MINI, num_kv_heads=3), ValueError, 'num_kv_heads=3'),
        (dict(arch=MINI, num_kv_heads=(1, 1)), ValueError, r'got \(1, 1\)'),
        (dict(arch=MINI, with_cp=(True,)), ValueError, r'with_cp must .* \(True,\)'),
        (dict(arch=MINI, out_indices=(4,)), ValueError, r'out_indices .* got \(4,\)'),
        (dict(arch=MINI, out_indices=()), ValueError, 'out_indices'),
        (
            dict(arch=MINI, out_indices=(2, 0)),
            ValueError,
            r'out_indices must rise.* got \(2, 0\)',
        ),
        (
            dict(arch=MINI, out_indices=[1, 1]),
            ValueError,
            r'out_indices must rise.* got \[1, 1\]',
        ),
        (
            dict(arch=MINI, out_indices=(0, 1), frozen_stages=3),
            ValueError,
            r'frozen_stages must be from -1 to 2.*out_indices=\(0, 1\), got 3',
        ),
        (dict(arch=MINI, out_indices=(0, True)), TypeError, 'out_indices .* got True'),
        (dict(arch=MINI, out_indices=(1.0,)), TypeError, 'out_indices .* got 1.0'),
        (dict(arch=MINI, num_kv_heads=True), TypeError, 'num_kv_heads .* got True'),
        (dict(arch=MINI, frozen_stages=True), TypeError, 'frozen_stages .* got True'),
        (dict(arch=MINI, drop_rate=False), TypeError, 'drop_rate .* got False'),
        (
            dict(arch={**MINI, 'depths': (True, 2, 2, 2)}),
            TypeError,
            "'depths' of stage 0 must be an integer, got True",
        ),
        (
            dict(arch={**MINI, 'mlp_ratio': (4, 4, 4, True)}),
            TypeError,
            "'mlp_ratio' of stage 3 must be a number, got True",
        ),
        (dict(arch={**MINI, 'stem_dim': True}), TypeError, "'stem_dim' .* got True"),
        (dict(arch=MINI, frozen_stages=5), ValueError, 'frozen_stages .* got 5'),
        (dict(arch=MINI, drop_path_rate=1.0), ValueError, 'drop_path_rate .* got 1.0'),
        (dict(arch=MINI, drop_rate=-0.1), ValueError, 'drop_rate .* got -0.1'),
        (dict(arch={**MINI, 'lpu': True}), ValueError, "'lpu' must have 4 .* got True"),
        (dict(arch={**MINI, 'mlp_ratio': 4}), ValueError, "'mlp_ratio' .* got 4"),
        (
            dict(arch={**MINI, 'position_bias': None}),
            ValueError,
            "'position_bias' must have 4 entries, got None",
        ),
        (
            dict(arch={**MINI, 'depths': (2.0, 2, 2, 2)}),
            TypeError,
            "'depths' of stage 0 must be an integer, got 2.0",
        ),
        (
            dict(arch={**MINI, 'layer_scale': (-1, None, -1, -1)}),
            TypeError,
            "'layer_scale' of stage 1 must be a number, got None",
        ),
        (
            dict(arch={**MINI, 'mlp_ratio': (4, 4, 4, 0)}),
            ValueError,
            "'mlp_ratio' of stage 3 must be positive, got 0",
        ),
        (dict(arch={**MINI, 'stem_dim': 1}), ValueError, "'stem_dim' .* got 1"),
        (dict(arch=MINI, out_indices=3), TypeError, 'out_indices .* got 3'),
        (dict(arch=MINI, num_kv_heads=1.0), TypeError, 'num_kv_heads .* got 1.0'),
        (dict(arch=MINI, with_cp='True'), TypeError, "with_cp .* flag .* got 'True'"),
        (dict(arch=MINI, frozen_stages='1'), TypeError, "frozen_stages .* got '1'"),
        (dict(arch=MINI, frozen_stages=-2), ValueError, 'frozen_stages .* got -2'),
        (dict(arch=MINI, drop_path_rate='0.1'), TypeError, "drop_path_rate .*'0.1'"),
        (dict(arch=MINI, backend='trition'), ValueError, "backend .* got 'trition'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        DAT(**options)


@pytest.mark.parametrize('shape', [(1, 3, 31, 64), (1, 1, 64, 64), (3, 64, 64)])
def test_bad_images(shape):
    with pytest.raises(ValueError, match='at least 32 x 32'):
        mini()(torch.rand(shape))
