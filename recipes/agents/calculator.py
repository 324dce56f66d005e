"""A tool for recipes/agents/grpo-tools-gsm8k.yaml."""

import ast
import operator

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def calculate(expression: str) -> str:
    """Work out a sum of numbers with + - * / and brackets.

    Args:
        expression: for example (12 + 3) * 4.
    """
    return f"{value(ast.parse(expression, mode='eval').body):.10g}"


def value(node: ast.expr) -> float:
    """The value of an expression; nothing but numbers and the four operators is run."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value(node.left), value(node.right))
    raise ValueError("only numbers, + - * / and brackets can be worked out")
