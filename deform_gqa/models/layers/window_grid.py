"""Cuts a map into windows and puts them together again, with one copy each way."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


class WindowGrid:
    """Windows of a map that may be shifted cyclically, in batches of one kind.

    Windows of a shifted map that hold pixels from opposite borders need a mask. These
    are the last row and the last column of windows, so there are four kinds: the inner
    windows, the last column, the last row, and the corner. Windows of one kind are next
    to each other in the batch, so that attention takes them at once with one bias.

    Args:
        batch: Number B of maps.
        map_size: (H, W) in pixels.
        window_size: (h, w) in pixels. Maps that it does not divide are padded with
            zeros on the right and at the bottom.
        shift: Pixels by which the map is first shifted up and left, less than the sides
            of the window; with (0, 0) all windows are of one kind.
        device: Device of the maps.

    Attributes:
        counts: Number of windows of each kind over all maps.
    """

    def __init__(
        self,
        batch: int,
        map_size: Sequence[int],
        window_size: tuple[int, int],
        shift: tuple[int, int],
        device: torch.device,
    ):
        self.batch = batch
        self.map_size = tuple(map_size)
        self.window_area = window_size[0] * window_size[1]
        rows, cols = (
            (side + window - 1) // window
            for side, window in zip(map_size, window_size, strict=True)
        )
        row_parts = (rows - 1, 1) if any(shift) else (rows,)
        col_parts = (cols - 1, 1) if any(shift) else (cols,)
        self.counts = [batch * r * c for r in row_parts for c in col_parts]
        # Columns of pixels broadcast against rows of them.
        y = torch.arange(map_size[0], device=device).unsqueeze(1)
        y = _WindowsAlong.of(y, window_size[0], row_parts, shift[0])
        x = torch.arange(map_size[1], device=device)
        x = _WindowsAlong.of(x, window_size[1], col_parts, shift[1])
        image = torch.arange(batch, device=device).view(-1, 1, 1)
        before = batch * (y.before * cols + y.count * x.before)
        window = before + (image * y.count + y.window) * x.count + x.window
        # (B * H * W,) index of each pixel among the pixels of the windows. Arithmetic
        # computes it and not views, whose copies would depend on the sizes, so that
        # torch.compile would compile again for each of them.
        inside = y.inside * window_size[1] + x.inside
        self._slots = (window * self.window_area + inside).flatten()

    def gather(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, C) -> windows (sum of counts, h * w, C)."""
        windows = x.new_zeros(sum(self.counts) * self.window_area, x.shape[3])
        windows.index_copy_(0, self._slots, x.flatten(0, 2))
        return windows.unflatten(0, (-1, self.window_area))

    def scatter(self, windows: Tensor) -> Tensor:
        """Inverse of :meth:`gather`; drops the padding."""
        x = _TakeOnce.apply(windows.flatten(0, 1), self._slots)
        return x.unflatten(0, (self.batch, *self.map_size))


@dataclasses.dataclass
class _WindowsAlong:
    """For each row of pixels of a map, or each column, the window that it is in; int64.

    Attributes:
        inside: Position in the window.
        window: Index of the window among those of its kind.
        count: Number of windows of this kind.
        before: Number of windows of the kinds before.
    """

    inside: Tensor
    window: Tensor
    count: Tensor
    before: Tensor

    @classmethod
    def of(
        cls, pixel: Tensor, window: int, parts: tuple[int, ...], shift: int
    ) -> '_WindowsAlong':
        """From the indices of the pixels; ``parts`` counts the windows of each kind."""
        shifted = (pixel - shift) % (sum(parts) * window)
        number = shifted // window
        is_last = (number >= parts[0]).long()
        before = is_last * parts[0]
        count = parts[0] + is_last * (parts[-1] - parts[0])
        return cls(shifted % window, number - before, count, before)


class _TakeOnce(torch.autograd.Function):
    """Takes rows of a matrix, none of them twice, so that backward adds nothing up."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        zeros = grad.new_zeros(ctx.num_rows, grad.shape[1])
        return zeros.index_copy_(0, index, grad), None
