"""`ernie45 train recipe.yaml`: from a recipe to a run."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ernie45.models.pretrained import PretrainedModel
    from ernie45.training.objectives import Objective
    from ernie45.training.recipe import Recipe
    from ernie45.training.trainer import Trainer

WEIGHTS_SUFFIXES = (".safetensors", ".safetensors.index.json")
WRITTEN_BY_US = ("config.json", "generation_config.json")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `ernie45 train` takes."""
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file; see configs/recipes")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a value of the recipe, for instance --set max_steps=100 (repeatable)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in output_dir, if any")


def run(options: argparse.Namespace) -> None:
    """Trains.

    Raises:
        ErnieError: the recipe, its files or the checkpoint cannot be used, or the run failed; see `Trainer.run`.
    """
    from ernie45.training.recipe import Recipe

    recipe = Recipe.from_yaml(options.recipe, options.set)
    recipe.check_files()
    trainer = build_trainer(recipe)
    trainer.run(options.resume)
    print(f"wrote {trainer.folder / f'checkpoint-{trainer.step}'}")


def build_trainer(recipe: Recipe) -> Trainer:
    """Loads the model, opens the data and puts the loop together.

    Raises:
        ErnieError: the recipe does not go with the model, or the data cannot be used.
    """
    import paddle

    from ernie45 import ErnieProcessor, ErnieTokenizer, lora
    from ernie45.checkpoint.hub import resolve_folder
    from ernie45.training.data import DataStream, Encoder, Source
    from ernie45.training.trainer import Trainer

    folder = resolve_folder(recipe.model_name_or_path)
    recipe = recipe.replace(model_name_or_path=str(folder))  # a checkpoint that was loaded now is not loaded anew
    tokenizer = ErnieTokenizer.from_pretrained(folder)
    processor = ErnieProcessor.from_pretrained(folder) if recipe.stage == "VL-SFT" else None

    def stream(sources: list[Source], epochs: int | None) -> DataStream:
        encoder = Encoder(tokenizer, processor, max_length=recipe.max_seq_len, truncation=recipe.truncation_strategy)
        return DataStream(
            sources,
            encoder,
            rows=recipe.batch_size,
            epochs=epochs,
            mix=recipe.mix_strategy if epochs is None else "concat",
            shuffle=epochs is None,
            seed=recipe.seed,
            samples=recipe.num_samples_each_epoch if epochs is None else None,
            packing=recipe.packing,
            max_bad_lines=recipe.max_bad_lines,
        )

    weights = recipe.train_dataset_prob or (1.0,) * len(recipe.train_dataset_path)
    sources = [Source(path, weight) for path, weight in zip(recipe.train_dataset_path, weights, strict=True)]
    batches = stream(sources, epochs=None)
    model = load_model(recipe)
    objective = _objective(recipe, model)
    if recipe.fine_tuning == "LoRA":
        paddle.seed(recipe.seed)
        lora.apply(
            model,
            recipe.lora_rank,
            recipe.lora_alpha,
            recipe.lora_target_modules or None,
            rslora=recipe.rslora,
            dropout=recipe.lora_dropout,
        )
    evaluation = [Source(path) for path in recipe.eval_dataset_path]
    return Trainer(
        model,
        recipe,
        batches,
        objective,
        evaluation=(lambda: stream(evaluation, epochs=1)) if evaluation else None,
        files=small_files(folder) if recipe.fine_tuning == "Full" else (),
    )


def load_model(recipe: Recipe) -> PretrainedModel:
    """The model of a recipe, with weights that can be trained; those under adapters are packed on a CPU."""
    from ernie45 import ErnieForCausalLM, ErnieForConditionalGeneration

    kind = ErnieForConditionalGeneration if recipe.stage == "VL-SFT" else ErnieForCausalLM
    quantized = recipe.compute_type in ("wint8", "wint4")
    return kind.from_pretrained(
        recipe.model_name_or_path,
        dtype="float32" if recipe.compute_type == "float32" else "bfloat16",
        quantization=recipe.compute_type if quantized else None,
        pack=recipe.fine_tuning == "LoRA",
        progress=not recipe.disable_tqdm,
    )


def small_files(folder: Path) -> list[Path]:
    """What belongs to a checkpoint beside weights and configs: files of tokenizer and processor."""
    from ernie45.checkpoint.convert import SMALL_FILE_BYTES

    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.name not in WRITTEN_BY_US
        and not path.name.endswith(WEIGHTS_SUFFIXES)
        and path.stat().st_size < SMALL_FILE_BYTES
    ]


def _objective(recipe: Recipe, model: PretrainedModel) -> Objective:
    from ernie45.training.objectives import WITHOUT_REFERENCE, LanguageModelling, Preferences

    if recipe.stage != "DPO":
        return LanguageModelling(recipe.max_seq_len * recipe.batch_size if recipe.token_balance_loss else None)
    compares = recipe.loss_type not in WITHOUT_REFERENCE
    return Preferences(recipe.preference_options(), _reference(recipe, model) if compares else None)


def _reference(
    recipe: Recipe, model: PretrainedModel
) -> Callable[[], contextlib.AbstractContextManager[PretrainedModel]]:
    """The model as it was before training: without its adapters, or a second copy that is never trained."""
    from ernie45 import lora

    if recipe.fine_tuning == "LoRA":

        @contextlib.contextmanager
        def without_adapters() -> Iterator[PretrainedModel]:
            with lora.disabled(model):
                yield model

        return without_adapters
    copy = load_model(recipe)
    for parameter in copy.parameters():
        parameter.stop_gradient = True
    return lambda: contextlib.nullcontext(copy)
