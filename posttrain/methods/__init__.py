"""The method table.

To add a method: one file here with its config and class, one line in METHODS, one recipe, one page in docs/methods, one
row of oracles in tests. The trainers need no change; the contract sweep picks it up from this table.
"""

from posttrain.methods.a_lol import ALoL
from posttrain.methods.asft import ASFT
from posttrain.methods.base import Method
from posttrain.methods.brain import BRAIn
from posttrain.methods.cpl import CPL
from posttrain.methods.curry_dpo import CurryDPO
from posttrain.methods.dpo import DPO
from posttrain.methods.grpo import GRPO
from posttrain.methods.hypo import HyPO
from posttrain.methods.lite_ppo import LitePPO
from posttrain.methods.sft import SFT
from posttrain.methods.simpo import SimPO
from posttrain.methods.srpo import SRPO
from posttrain.methods.tpo import TPO

METHODS: dict[str, type[Method]] = {
    "sft": SFT,
    "grpo": GRPO,
    "lite_ppo": LitePPO,
    "dpo": DPO,
    "simpo": SimPO,
    "hypo": HyPO,
    "curry_dpo": CurryDPO,
    "asft": ASFT,
    "tpo": TPO,
    "cpl": CPL,
    "srpo": SRPO,
    "brain": BRAIn,
    "a_lol": ALoL,
}
