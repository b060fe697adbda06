"""A vision-language model that looks at its own box and corrects it."""
__version__ = "0.0.1"
__all__ = ["refine"]


def __getattr__(name):
    """Load `refine`, and torch with it, on first use."""
    if name == "refine":
        from ivt_min.loop import refine
        return refine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
