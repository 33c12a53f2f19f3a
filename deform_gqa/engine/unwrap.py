"""The model itself, out of what stands around it during a run."""

from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import nn

__all__ = ['unwrap_model']


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model whose modules and weights have the names that a user knows."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model
