"""Block letter X: a depthwise convolution in place of attention."""

from mmdet.registry import MODELS
from torch import nn

from deform_gqa.checks import check_int


@MODELS.register_module()
class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution (B, C, H, W) -> (B, C, H, W), as in ConvNeXt.

    Args:
        dim: Number of channels C.
        num_heads: Not used; part of the interface that all blocks share.
        kernel_size: Odd side of the kernel.

    Raises:
        TypeError: If ``kernel_size`` is not an integer.
        ValueError: If ``kernel_size`` is even or below 1.

    Source: block letter X of LeapLabTHU/DAT.
    """

    def __init__(self, dim: int, num_heads: int = 1, kernel_size: int = 7):
        check_int('kernel_size', kernel_size, 1)
        if kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd, got {kernel_size}')
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
