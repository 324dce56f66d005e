"""The method table.

To add a method: one file here with its config and class, one line in METHODS, one recipe, one page in docs/methods, one
row of oracles in tests. The trainers need no change; the contract sweep picks it up from this table.
"""

from posttrain.methods.base import Method
from posttrain.methods.grpo import GRPO
from posttrain.methods.lite_ppo import LitePPO
from posttrain.methods.sft import SFT

METHODS: dict[str, type[Method]] = {
    "sft": SFT,
    "grpo": GRPO,
    "lite_ppo": LitePPO,
}
