"""Where traces come from, as their manifest says it: who wrote them, for which problems, with what."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import posttrain
from posttrain.config.schema import ModelConfig
from posttrain.data.sample import Problem
from posttrain.data.traces import FORMAT, Manifest
from posttrain.verifiers.verdict import Judgement


def manifest_of(**values: Any) -> Manifest:
    """A manifest whose id is a hash of everything in it but the versions: a patch release must not end a run."""
    text = json.dumps(values | {"format": FORMAT}, sort_keys=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    versions = {"posttrain": posttrain.__version__, **versions}
    return Manifest(id=hashlib.sha256(text.encode()).hexdigest()[:12], **values, versions=versions)


def policy_identity(config: ModelConfig, policy: PreTrainedModel, seed: int) -> dict[str, Any]:
    """Who sampled: for a local folder a hash of its weights, for the Hub the commit."""
    if config.init is not None:
        return {"label": "random weights", "init": config.init.model_dump(mode="json"), "seed": seed}
    identity: dict[str, Any] = {"label": config.path, "dtype": config.dtype}
    folder = Path(str(config.path))
    if not folder.is_dir():
        commit = getattr(policy.config, "_commit_hash", None)
        return identity | {"revision": config.revision, "commit": commit}
    digest = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with file.open("rb") as stream:
            digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return identity | {"weights": digest.hexdigest()}


def judged(judgement: Judgement) -> dict[str, Any]:
    """What a judgement says, as fields of a trace."""
    return {
        "verdict": judgement.status.value,
        "scores": {name: verdict.score for name, verdict in judgement.verdicts.items()},
        "outcome": judgement.outcome,
        "reward": judgement.reward,
    }


def problem_content(problem: Problem) -> str:
    """What makes two problems the same, whatever their ids."""
    return json.dumps([problem.prompt, problem.reference, problem.chat], sort_keys=True)


def content_hash(texts: Iterable[str]) -> str:
    """SHA-256 over texts, in order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()
