"""Loading a model, and running passes over its weights inside the budget."""

import sys
import warnings

if "IPython" in sys.modules and "tqdm.auto" not in sys.modules:
    # Before transformers imports it: in a notebook without ipywidgets it warns, and its bars are
    # text, as they should be.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tqdm.auto  # noqa: F401
