"""An online endpoint: a queue of pictures, and IIIF from what is finished and what is on its way."""
