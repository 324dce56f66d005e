"""Keys and tokens of the environment stay there: no file of a run, and nothing it prints, has them."""

import pytest
import yaml

from posttrain.errors import RecipeError

NAMES = ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "JUDGE_KEY")
SECRETS = {name: f"s3cret-{name.lower()}-0123456789" for name in NAMES}


def test_no_secret_of_the_environment_is_written_or_printed(write_recipe, apart, tmp_path):
    judge = {"type": "judge", "endpoint": "http://127.0.0.1:9/v1", "model": "m", "principles": ["Is it right?"]}
    key = {"api_key_env": "JUDGE_KEY", "outcome": False, "retries": 0, "timeout": 1.0}
    recipe = write_recipe({"name": "grpo"}, {"training.max_steps": 1, "training.save_steps": 1})
    asked = yaml.safe_load(recipe.read_text())
    asked["verifier"].append(judge | key)
    recipe.write_text(yaml.safe_dump(asked))
    said = tmp_path / "said"
    # Nobody answers at the address, so the run ends with an error that names it; with the sound recipe it ends well.
    for verifiers, code in ((asked["verifier"], 2), (asked["verifier"][:2], 0)):
        recipe.write_text(yaml.safe_dump(asked | {"verifier": verifiers}))
        process = apart(["-m", "posttrain", "train", recipe], said, **SECRETS)
        process.join(300)
        assert process.exitcode == code, said.read_text()
        files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        texts = [path.read_bytes() for path in (said, *files)]
        for secret in SECRETS.values():
            assert not any(secret.encode() in text for text in texts)
    assert len(files) > 8 and (tmp_path / "run" / "resolved.yaml").exists()


@pytest.mark.parametrize(
    "endpoint",
    ["https://me:s3cret@host/v1", "https://s3cret@host/v1", "https://host/v1?key=s3cret", "https://host#s3cret"],
)
def test_an_address_with_a_secret_in_it_is_refused_and_not_repeated(load, endpoint):
    judge = {"type": "judge", "endpoint": endpoint, "model": "m", "principles": ["Is it right?"]}
    with pytest.raises(RecipeError) as caught:
        load({"name": "grpo"}, {"verifier": [judge]})
    assert "api_key_env" in str(caught.value) and "s3cret" not in str(caught.value)
