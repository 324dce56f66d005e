"""The method table.

A method of your own needs no place here: `register` it in a plugin (docs/plugins.md). To add one to the project: one
file here with its config and class, one line in METHODS, one recipe, one page in docs/methods, one row of oracles in
tests. The trainers need no change; the contract sweep picks it up from this table.
"""

from collections.abc import Iterator, Mapping

from posttrain.methods.base import Method, MethodConfig
from posttrain.registry import Registry

METHODS: Registry[type[Method]] = Registry(
    "method",
    {
        "sft": "posttrain.methods.sft:SFT",
        "grpo": "posttrain.methods.grpo:GRPO",
        "lite_ppo": "posttrain.methods.lite_ppo:LitePPO",
        "chord": "posttrain.methods.chord:CHORD",
        "red": "posttrain.methods.red:RED",
        "prefixrl": "posttrain.methods.prefixrl:PrefixRL",
        "rec": "posttrain.methods.rec:REC",
        "opmd": "posttrain.methods.opmd:OPMD",
        "asymre": "posttrain.methods.asymre:AsymRE",
        "a_star_po": "posttrain.methods.a_star_po:AStarPO",
        "opd": "posttrain.methods.opd:OPD",
        "sdft": "posttrain.methods.sdft:SDFT",
        "ui_s1": "posttrain.methods.ui_s1:UIS1",
        "rlsp": "posttrain.methods.rlsp:RLSP",
        "ldc": "posttrain.methods.ldc:LDC",
        "sophia": "posttrain.methods.sophia:SOPHIA",
        "dpo": "posttrain.methods.dpo:DPO",
        "online_dpo": "posttrain.methods.online_dpo:OnlineDPO",
        "xpo": "posttrain.methods.xpo:XPO",
        "nash_md": "posttrain.methods.nash_md:NashMD",
        "simpo": "posttrain.methods.simpo:SimPO",
        "hypo": "posttrain.methods.hypo:HyPO",
        "curry_dpo": "posttrain.methods.curry_dpo:CurryDPO",
        "asft": "posttrain.methods.asft:ASFT",
        "tpo": "posttrain.methods.tpo:TPO",
        "orpo": "posttrain.methods.orpo:ORPO",
        "cpl": "posttrain.methods.cpl:CPL",
        "srpo": "posttrain.methods.srpo:SRPO",
        "brain": "posttrain.methods.brain:BRAIn",
        "a_lol": "posttrain.methods.a_lol:ALoL",
        "kto": "posttrain.methods.kto:KTO",
        "bco": "posttrain.methods.bco:BCO",
        "reward": "posttrain.methods.reward:Reward",
        "salmon": "posttrain.methods.salmon:Salmon",
        "prm": "posttrain.methods.prm:PRM",
        "oreo": "posttrain.methods.oreo:OREO",
        "dapo_step": "posttrain.methods.dapo_step:DAPOStep",
        "digirl": "posttrain.methods.digirl:DigiRL",
        "archer": "posttrain.methods.archer:ArCHer",
        "ppo": "posttrain.methods.ppo:PPO",
        "drpo": "posttrain.methods.drpo:DRPO",
        "rto": "posttrain.methods.rto:RTO",
        "rlgf": "posttrain.methods.rlgf:RLGF",
        "nlpo": "posttrain.methods.nlpo:NLPO",
    },
)


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
    METHODS.add_class(method, "name")
    return method
