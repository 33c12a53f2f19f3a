"""Numbers and tables in Markdown."""

from collections.abc import Iterable, Mapping, Sequence


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f'{value:.{digits}f}'


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def records_table(records: Sequence[Mapping[str, str]]) -> str:
    """A line for each record, by column; columns in which no line has a text go."""
    names = dict.fromkeys(name for record in records for name in record)
    header = [name for name in names if any(record.get(name) for record in records)]
    return markdown_table(
        header, [[record.get(name, '') for name in header] for record in records]
    )
