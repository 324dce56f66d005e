"""Makes recipes/preference/principles.jsonl: pairs of random letters, and what a noisy judge says in both orders.

    python recipes/preference/principles.py > recipes/preference/principles.jsonl

It prefers what it reads first.
"""

import json
import random

chance = random.Random(0)
PRINCIPLES = {
    "long": lambda text: len(text) / 3,
    "a": lambda text: text.count("a"),
    "b": lambda text: text.count("b"),
    "c": lambda text: text.count("c"),
}

for _ in range(400):
    prompt = "".join(chance.choices("0123456789", k=2))
    texts = ["".join(chance.choices("abcd", k=chance.randint(3, 10))) for _ in range(2)]
    if texts[0] == texts[1]:
        continue
    scores = {}
    for name, measure in PRINCIPLES.items():
        gap = measure(texts[0]) - measure(texts[1])
        scores[name] = [round(gap + shift + chance.gauss(0, 0.3), 2) for shift in (0.3, -0.3)]
    print(json.dumps({"prompt": prompt, "chosen": texts[0], "rejected": texts[1], "principles": scores}))
