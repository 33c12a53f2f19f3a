"""FLOPs of neighborhood_attn: a query attends to K * K keys."""

from ..common.flops import register_attention_flops

_KERNEL_SIZE = 9  # index of kernel_size among the arguments of the op
register_attention_flops('neighborhood_attn', lambda *args: args[_KERNEL_SIZE] ** 2)
