"""IIIF Presentation 3.0: original and restored as a choice, with the statement that a model made pixels up."""

from collections.abc import Callable, Sequence

from engine.geometry import Size

STATEMENT = (
    "Restored by a model: missing parts and fine detail were generated, and are not in the original. "
    "The original is part of this manifest."
)
_LABELS = {"restored": "Restored", "original": "Original", "mask": "Mask of missing parts", "difference": "Difference"}


def manifest(
    address: str, *, name: str, size: Size, layers: Sequence[str], image: Callable[[str], str]
) -> dict[str, object]:
    """The manifest at `address` of a picture of `size`; `image` gives the address of a layer's image service."""
    canvas = f"{address}/canvas"
    painting = {
        "id": f"{canvas}/annotation",
        "type": "Annotation",
        "motivation": "painting",
        "target": canvas,
        "body": {"type": "Choice", "items": [_image(layer, image(layer), size) for layer in layers]},
    }
    return {
        "@context": "http://iiif.io/api/presentation/3/context.json",
        "id": address,
        "type": "Manifest",
        "label": {"none": [name]},
        "requiredStatement": {"label": {"en": ["Note"]}, "value": {"en": [STATEMENT]}},
        "items": [
            {
                "id": canvas,
                "type": "Canvas",
                "width": size.w,
                "height": size.h,
                "items": [{"id": f"{canvas}/page", "type": "AnnotationPage", "items": [painting]}],
            }
        ],
    }


def _image(layer: str, service: str, size: Size) -> dict[str, object]:
    return {
        "id": f"{service}/full/max/0/default.jpg",
        "type": "Image",
        "format": "image/jpeg",
        "width": size.w,
        "height": size.h,
        "label": {"en": [_LABELS[layer]]},
        "service": [{"id": service, "type": "ImageService3", "profile": "level2"}],
    }
