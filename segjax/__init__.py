"""segjax: semantic segmentation in JAX. Kept empty of imports so that data workers stay free of JAX."""

__version__ = "0.1.0"
