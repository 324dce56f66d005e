"""Shells and what runs them. What TRL reads when it is imported is set here, before any shell imports it."""

import os
import warnings

# TRL reports each trainer start to its makers; a user of posttrain did not ask for that.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# Its own use of vLLM, which posttrain does not enter, is tested with other versions.
warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")
