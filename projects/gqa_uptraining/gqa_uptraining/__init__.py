"""Uptraining a detector with grouped queries: rows, their execution, the report."""
