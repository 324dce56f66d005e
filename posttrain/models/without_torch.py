"""transformers for tokenizers, templates and configurations alone, as it is where PyTorch is not installed.

Of what `AutoTokenizer` imports, torch and its compiler take nine tenths of the time, and a tokenizer needs neither.
"""

from __future__ import annotations

import os
import sys

ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def keep_torch_out() -> bool:
    """Import transformers as if torch were absent, for the rest of this process; call before it is imported.

    torch itself can still be imported afterwards, by code that asks for it by name, but transformers builds no models
    any more. Tokenizers are the same as with torch.

    Returns:
        Whether that could be done: not where torch or transformers are there already.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        return False
    before = os.environ.get(ADVICE)
    os.environ[ADVICE] = "1"  # it would say that PyTorch was not found
    sys.modules["torch"] = None  # Python's own way to make an import fail
    try:
        from transformers import AutoTokenizer  # noqa: F401
        from transformers.utils import is_torch_available

        is_torch_available()  # keeps its answer
    finally:
        del sys.modules["torch"]
        os.environ.pop(ADVICE)
        if before is not None:
            os.environ[ADVICE] = before
    return True
