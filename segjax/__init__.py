"""segjax: semantic segmentation in JAX. Kept empty of imports so that data workers stay free of JAX."""

__version__ = "0.1.0"

# `python -m segjax.check_data` and its like stay where people know them. Code imports segjax.tools.check_data.
__path__.append(f"{__path__[0]}/tools")
