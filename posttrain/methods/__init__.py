"""The method table.

A method of your own needs no place here: `register` it in a plugin (docs/plugins.md). To add one to the project: one
file here with its config and class, one line in METHODS, one recipe, one page in docs/methods, one row of oracles in
tests. The trainers need no change; the contract sweep picks it up from this table.
"""

from collections.abc import Iterator, Mapping
from typing import get_args

from posttrain.errors import PluginError
from posttrain.methods.a_lol import ALoL
from posttrain.methods.a_star_po import AStarPO
from posttrain.methods.asft import ASFT
from posttrain.methods.asymre import AsymRE
from posttrain.methods.base import Method, MethodConfig
from posttrain.methods.bco import BCO
from posttrain.methods.brain import BRAIn
from posttrain.methods.chord import CHORD
from posttrain.methods.cpl import CPL
from posttrain.methods.curry_dpo import CurryDPO
from posttrain.methods.dapo_step import DAPOStep
from posttrain.methods.dpo import DPO
from posttrain.methods.drpo import DRPO
from posttrain.methods.grpo import GRPO
from posttrain.methods.hypo import HyPO
from posttrain.methods.kto import KTO
from posttrain.methods.lite_ppo import LitePPO
from posttrain.methods.nlpo import NLPO
from posttrain.methods.online_dpo import OnlineDPO
from posttrain.methods.opd import OPD
from posttrain.methods.opmd import OPMD
from posttrain.methods.oreo import OREO
from posttrain.methods.orpo import ORPO
from posttrain.methods.ppo import PPO
from posttrain.methods.prefixrl import PrefixRL
from posttrain.methods.prm import PRM
from posttrain.methods.rec import REC
from posttrain.methods.red import RED
from posttrain.methods.reward import Reward
from posttrain.methods.rlgf import RLGF
from posttrain.methods.rlsp import RLSP
from posttrain.methods.rto import RTO
from posttrain.methods.sdft import SDFT
from posttrain.methods.sft import SFT
from posttrain.methods.simpo import SimPO
from posttrain.methods.srpo import SRPO
from posttrain.methods.tpo import TPO
from posttrain.methods.xpo import XPO

METHODS: dict[str, type[Method]] = {
    "sft": SFT,
    "grpo": GRPO,
    "lite_ppo": LitePPO,
    "chord": CHORD,
    "red": RED,
    "prefixrl": PrefixRL,
    "rec": REC,
    "opmd": OPMD,
    "asymre": AsymRE,
    "a_star_po": AStarPO,
    "opd": OPD,
    "sdft": SDFT,
    "rlsp": RLSP,
    "dpo": DPO,
    "online_dpo": OnlineDPO,
    "xpo": XPO,
    "simpo": SimPO,
    "hypo": HyPO,
    "curry_dpo": CurryDPO,
    "asft": ASFT,
    "tpo": TPO,
    "orpo": ORPO,
    "cpl": CPL,
    "srpo": SRPO,
    "brain": BRAIn,
    "a_lol": ALoL,
    "kto": KTO,
    "bco": BCO,
    "reward": Reward,
    "prm": PRM,
    "oreo": OREO,
    "dapo_step": DAPOStep,
    "ppo": PPO,
    "drpo": DRPO,
    "rto": RTO,
    "rlgf": RLGF,
    "nlpo": NLPO,
}


class _Configs(Mapping[str, type[MethodConfig]]):
    """Method name to the class of its section, those of plugins included as soon as they are registered."""

    def __getitem__(self, name: str) -> type[MethodConfig]:
        return METHODS[name].Config

    def __iter__(self) -> Iterator[str]:
        return iter(METHODS)

    def __len__(self) -> int:
        return len(METHODS)


CONFIGS = _Configs()


def register(method: type[Method]) -> type[Method]:
    """Make a method of a plugin known by the name in its `Config`; to be used as a decorator.

    Raises:
        PluginError: it has no `Config` with a name, or the name is taken.
    """
    field = method.Config.model_fields.get("name") if isinstance(getattr(method, "Config", None), type) else None
    names = () if field is None else get_args(field.annotation)
    if len(names) != 1:
        raise PluginError(
            f"method {method.__name__} has no name", hint='give its Config a field `name: Literal["my_method"]`'
        )
    if names[0] in METHODS:
        raise PluginError(f"there is a method {names[0]!r} already", hint="give yours another name")
    METHODS[names[0]] = method
    return method
