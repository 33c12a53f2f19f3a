from deform_gqa.benchmark.core.fields import split_labels


def test_split_labels():
    cases = [
        {'stage': stage, 'image': '8x9', 'batch': 2, 'kv heads': kv_heads}
        for stage in (1, 2)
        for kv_heads in ('all', '')
    ]
    shared, labels = split_labels(cases)
    assert shared == '8x9 px, batch 2'
    assert labels == [
        'stage 1, all kv heads',
        'stage 1',
        'stage 2, all kv heads',
        'stage 2',
    ]
    assert split_labels(cases[:1]) == ('stage 1, 8x9 px, batch 2, all kv heads', [''])
