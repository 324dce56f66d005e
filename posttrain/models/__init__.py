"""Models: loading, adapters, scoring, heads. What bitsandbytes says when PEFT imports it is set here, before it is."""

import logging

# A faster 4-bit kernel for some CPUs, said in every process that imports PEFT, whether a model is quantized or not.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
