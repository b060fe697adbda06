"""A vision-language model that looks at its own box and corrects it."""
import logging

__version__ = "0.0.1"
__all__ = ["refine"]

# On a CPU it warns, at its import, that an optional package is not there.
logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)


def __getattr__(name):
    """Load `refine`, and torch with it, on first use."""
    if name == "refine":
        from ivt_min.verdict import refine
        return refine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
