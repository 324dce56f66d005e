"""Tasks by the name that a recipe gives. A task is one file: a class, and the object that is asked."""

from __future__ import annotations

from typing import Any

from posttrain.registry import Registry

TASKS: Registry[Any] = Registry(
    "task",
    {
        "chain_sum": "posttrain.data.tasks.chain_sum:TASK",
        "countdown": "posttrain.data.tasks.countdown:TASK",
        "digit_sum": "posttrain.data.tasks.digit_sum:TASK",
        "dot_sum": "posttrain.data.tasks.dot_sum:TASK",
        "maze": "posttrain.data.tasks.maze:TASK",
        "rooms": "posttrain.data.tasks.rooms:TASK",
        "variable_chain": "posttrain.data.tasks.variable_chain:TASK",
    },
)
"""Name to `data.tasks.base.Task`; `data.tasks.register` adds those of plugins."""
