"""posttrain: post-training of language models from one YAML recipe.

Importing this package is cheap: nothing here loads torch. The command line lives in `posttrain.cli`.
"""

__version__ = "0.1.0"
