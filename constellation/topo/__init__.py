"""TopoEncoder: an atlas of charts over images, each with a codebook of its own, and how it is trained. No Ray here."""
