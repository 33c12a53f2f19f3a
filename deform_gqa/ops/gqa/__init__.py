"""Grouped-query attention in the (b, n, h, d) layout."""

from .api import scaled_dot_product_gqa

__all__ = ['scaled_dot_product_gqa']
