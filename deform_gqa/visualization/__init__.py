"""What models attend to, as pictures: sampled points, offsets, attention weights."""

from .detections import draw_detections
from .record import OwnSamples, RecordedAttention, SharedSamples, record_attention
from .sampling import draw_attention, figure_to_image
from .token_groups import visualize_attention

__all__ = [
    'OwnSamples',
    'RecordedAttention',
    'SharedSamples',
    'draw_attention',
    'draw_detections',
    'figure_to_image',
    'record_attention',
    'visualize_attention',
]
