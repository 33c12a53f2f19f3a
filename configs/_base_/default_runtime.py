# Nothing but the imports that register this package, and no `_base_`: the file can
# stand beside `mmdet::` bases, because no key is then set by two of them.
custom_imports = dict(
    imports=['deform_gqa.models', 'deform_gqa.engine', 'deform_gqa.engine.coco_metric'],
    allow_failed_imports=False,
)
