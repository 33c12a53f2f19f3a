import pytest

from deform_gqa.profiling.markdown import number, records_table


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        *((123.4, '123'), (12.34, '12.3'), (1.234, '1.23'), (0.5, '0.500')),
        *((100, '100'), (10, '10.0'), (1, '1.00'), (0, '0.000')),
    ],
)
def test_number(value, text):
    assert number(value) == text


def test_records_table():
    records = [{'a': '1', 'b': '', 'c': ''}, {'a': '2', 'c': '3'}]
    assert records_table(records) == '| a | c |\n| --- | --- |\n| 1 |  |\n| 2 | 3 |'
