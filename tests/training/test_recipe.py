"""Recipes: keys, types, and one clear error for all that is wrong."""

import builtins
from pathlib import Path

import pytest

from ernie45.errors import ErnieError
from ernie45.training.recipe import Recipe

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "recipes").glob("*.yaml"))
MINIMAL = "model_name_or_path: m\ntrain_dataset_path: a.jsonl\noutput_dir: o\nmax_steps: 10\n"


def load(tmp_path, text, *changes):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return Recipe.from_yaml(path, changes)


def test_shipped_recipes_exist():
    names = {path.stem for path in RECIPES}
    for size in ("0.3b", "21b-a3b"):
        assert {f"ernie-4.5-{size}-{kind}" for kind in ("sft", "lora", "dpo")} <= names
    assert "ernie-4.5-vl-28b-a3b-vl-sft" in names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_name_their_source(path):
    recipe = Recipe.from_yaml(path)
    assert (
        recipe.model_name_or_path.lower()
        .removeprefix("baidu/")
        .startswith(path.stem.rsplit("-", 1)[0].removesuffix("-vl"))
    )
    assert (recipe.fine_tuning == "LoRA") == path.stem.endswith("lora")
    assert (recipe.stage == "DPO") == path.stem.endswith("dpo")
    assert Path(recipe.output_dir).name == path.stem
    assert "Source of the values:" in path.read_text(encoding="utf-8")


def test_lists_numbers_and_changes(tmp_path):
    text = MINIMAL.replace("a.jsonl", "a.jsonl, b.jsonl") + "learning_rate: 1e-5\ntrain_dataset_prob: 0.25,0.75\n"
    recipe = load(tmp_path, text, "max_steps=7", "freeze=[vision, adapter]", "lora_alpha=3")
    assert recipe.train_dataset_path == ("a.jsonl", "b.jsonl")
    assert recipe.train_dataset_prob == (0.25, 0.75)
    assert recipe.learning_rate == 1e-5  # YAML 1.1 takes this for text
    assert recipe.max_steps == 7
    assert recipe.freeze == ("vision", "adapter")
    assert (recipe.lora_alpha, type(recipe.lora_alpha)) == (3.0, float)
    assert recipe.num_samples_each_epoch is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("warmup_step: 3", "warmup_step: unknown key; did you mean warmup_steps?"),
        ("max_seq_len: 4096.5", "max_seq_len: expected a whole number, found 4096.5"),
        ("seed: true", "seed: expected a whole number, found True"),
        ("packing: 1", "packing: expected true or false, found 1"),
        ("learning_rate: fast", "learning_rate: expected a number, found 'fast'"),
        ("stage: SFTT", "stage: expected one of PT, SFT, DPO, VL-SFT, found 'SFTT'"),
        ("stage: [SFT]", "stage: expected one of PT, SFT"),
        ("freeze: visoin", "freeze: there is no part 'visoin'"),
        ("batch_size: 0", "batch_size: expected more than 0, found 0"),
        ("learning_rate: .nan", "learning_rate: expected more than 0, found nan"),
        ("weight_decay: -1", "weight_decay: expected at least 0"),
        ("train_dataset_prob: 1,1", "train_dataset_prob: expected 1 positive numbers"),
        ("compute_type: wint4", "compute_type: wint4 weights are not trained"),
        ("warmup_steps: 11", "warmup_steps: expected at most max_steps 10"),
        ("min_lr: 1.0", "min_lr: expected at most learning_rate"),
        ("eval_steps: 5", "eval_dataset_path: missing"),
        ("loss_type: sigmoit", "loss: expected one of sigmoid"),
        ("stage: DPO\ntoken_balance_loss: true", "token_balance_loss: pairs have no tokens to balance"),
        ("loss_type: null", "loss_type: expected a text, found None"),
    ],
)
def test_every_mistake_has_its_message(tmp_path, line, message):
    with pytest.raises(ErnieError) as caught:
        load(tmp_path, MINIMAL + line)
    assert message in str(caught.value)
    assert "recipe.yaml" in str(caught.value)


def test_all_mistakes_at_once(tmp_path):
    with pytest.raises(ErnieError) as caught:
        load(tmp_path, "outputdir: x\nseed: a\n")
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 2 + 4  # an unknown key, a wrong value, four that are missing
    assert "  max_steps: missing" in lines


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "is no YAML"), ("- 1", "expected keys and values, found list"), ("", "found NoneType")],
)
def test_no_recipe(tmp_path, text, message):
    with pytest.raises(ErnieError, match=message):
        load(tmp_path, text)


def test_no_file_and_bad_change(tmp_path):
    with pytest.raises(ErnieError, match=r"nowhere.yaml: the recipe cannot be read"):
        Recipe.from_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(ErnieError, match="--set max_steps: expected key=value"):
        load(tmp_path, MINIMAL, "max_steps")


def test_missing_data_files_are_named_with_their_key(tmp_path):
    (tmp_path / "a.jsonl").touch()
    recipe = load(
        tmp_path, MINIMAL.replace("a.jsonl", f"{tmp_path}/a.jsonl, {tmp_path}/b.jsonl"), "eval_dataset_path=c"
    )
    with pytest.raises(ErnieError) as caught:
        recipe.check_files()
    assert str(caught.value).splitlines()[1:] == [
        f"  train_dataset_path: {tmp_path}/b.jsonl: no such file",
        "  eval_dataset_path: c: no such file",
    ]


def test_without_yaml(tmp_path, monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "yaml":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ErnieError, match=r'pip install "ernie45\[train\]"'):
        load(tmp_path, MINIMAL)


def test_every_key_is_documented():
    for name in Recipe.__dataclass_fields__:
        assert name in Recipe.__doc__
