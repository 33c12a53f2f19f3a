"""What experiment.py does: rows of the table, their runs, the report, the search."""
