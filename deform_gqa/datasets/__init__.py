"""Data for trying out detectors without a download.

``shapes``
    A synthetic instance dataset of textured, overlapping shapes (COCO JSON).
``coco``
    What the generator and the converters share: COCO records and safe file writing.

Nothing is imported here, so that ``import deform_gqa`` stays cheap and needs neither
OpenCV nor mmdet. ``tools/dataset_converters`` holds the command lines.
"""
