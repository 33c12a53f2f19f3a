"""Grouped-query attention in the (b, n, h, d) layout, and attention in groups."""

from .api import scaled_dot_product_gqa
from .query_groups import (
    custom_gqa,
    dynamic_gqa,
    group_attention,
    group_queries,
    groups_for_length,
    hierarchical_gqa,
)
from .selection import key_driven_allocation, key_driven_gqa, sparse_gqa

__all__ = [
    'custom_gqa',
    'dynamic_gqa',
    'group_attention',
    'group_queries',
    'groups_for_length',
    'hierarchical_gqa',
    'key_driven_allocation',
    'key_driven_gqa',
    'scaled_dot_product_gqa',
    'sparse_gqa',
]
