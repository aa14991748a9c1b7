"""Recipes: what a training run consists of, from a YAML file with upstream's keys."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from ernie45.errors import ErnieError
from ernie45.losses.preference import PreferenceOptions
from ernie45.models.parts import PARTS
from ernie45.training.yaml_values import convert, parse_yaml, read_yaml

Stage = Literal["PT", "SFT", "DPO", "VL-SFT"]
FineTuning = Literal["Full", "LoRA"]
ComputeType = Literal["float32", "bf16", "wint8", "wint4"]


@dataclass(frozen=True)
class Recipe:
    """A training run. The names are upstream's where it has the thing.

    Attributes:
        model_name_or_path: as for `from_pretrained`.
        train_dataset_path: files to learn from; in YAML a list, or one text with commas.
        output_dir: where checkpoints and the record go.
        max_steps: optimizer steps of the run; a stream of samples has no length to count epochs with.

        stage: "PT" plain text, "SFT" answers of conversations, "DPO" preferences, "VL-SFT" with pictures and videos.
        fine_tuning: all weights, or adapters beside them.
        compute_type: how weights are held: "float32"; "bf16" with float32 masters, with LoRA as they are; with LoRA
            also "wint8" and "wint4". Computation and moments are at least float32 on a CPU.
        freeze: parts that are not trained; see `ernie45.models.parts`.
        seed: of everything that is random.

        train_dataset_prob: weight of each file; by default all the same.
        mix_strategy, num_samples_each_epoch: as `mix` and `samples` of `DataFiles`.
        eval_dataset_path: files to evaluate on.
        max_seq_len: tokens of a row.
        packing: put several samples into a row, which do not see each other.
        truncation_strategy: what becomes of longer samples: "delete", "left", "right", "oral".
        batch_size: rows of a micro batch.
        gradient_accumulation_steps: micro batches of a step. The loss is the mean over the learned tokens of all of
            them, as if they were one.
        max_bad_lines: lines of data files that may be unusable before the run ends.

        learning_rate, min_lr: at the peak and at the end.
        lr_scheduler_type: "constant", "linear", "cosine", "wsd".
        warmup_steps: until the peak.
        weight_decay, adam_beta1, adam_beta2, adam_epsilon: of AdamW.
        max_grad_norm: the norm that gradients are clipped to; 0: not at all.
        moe_gate_lr_ratio: learning rate of routers, relative.
        vit_lr_ratio: learning rate of a block of the vision tower relative to the next one.

        token_balance_loss: every learned token weighs the same in every batch, however few of them it has; see
            `losses.token_balanced_loss`. Not for preferences.
        moe_aux_loss_lambda, moe_orthogonal_loss_lambda, moe_z_loss_lambda: coefficients of the router losses.
        use_ortho_loss_callback: the orthogonalization is a step after the optimizer's, not a part of the loss.
        moe_use_aux_free_update_coef: how far correction biases move per step.

        lora_rank, lora_alpha, rslora, lora_dropout, lora_target_modules: as of `ernie45.lora.apply`.
        lora_plus_scale: learning rate of the matrices B, relative to A.

        loss_type: of preferences, as `PreferenceOptions.loss`.
        beta, label_smoothing, offset_alpha, simpo_gamma, dpop_lambda, normalize_logps, pref_loss_ratio,
            sft_loss_ratio: see `PreferenceOptions`.

        recompute: keep fewer activations; recompute_granularity: "full", "full_attn", "mlp".
        save_steps: between checkpoints; the end of the run is one in any case.
        save_total_limit: newest checkpoints that are kept; the best one is kept besides.
        eval_steps: between evaluations; 0: none.
        max_evaluate_steps: micro batches of an evaluation at most.
        logging_steps: between rows of the record.
        report_to: "none", "visualdl" or "tensorboard", beside the CSV file.
        disable_tqdm: no progress bar.
    """

    model_name_or_path: str
    train_dataset_path: tuple[str, ...]
    output_dir: str
    max_steps: int

    stage: Stage = "SFT"
    fine_tuning: FineTuning = "Full"
    compute_type: ComputeType = "float32"
    freeze: tuple[str, ...] = ()
    seed: int = 42

    train_dataset_prob: tuple[float, ...] = ()
    mix_strategy: Literal["concat", "random", "interleave_under", "interleave_over"] = "concat"
    num_samples_each_epoch: int | None = None
    eval_dataset_path: tuple[str, ...] = ()
    max_seq_len: int = 4096
    packing: bool = True
    truncation_strategy: Literal["delete", "left", "right", "oral"] = "delete"
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    max_bad_lines: int = 0

    learning_rate: float = 3e-5
    min_lr: float = 0.0
    lr_scheduler_type: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    moe_gate_lr_ratio: float = 1.0
    vit_lr_ratio: float = 1.0

    token_balance_loss: bool = False
    moe_aux_loss_lambda: float = 0.0
    moe_orthogonal_loss_lambda: float = 0.0
    moe_z_loss_lambda: float = 0.0
    use_ortho_loss_callback: bool = False
    moe_use_aux_free_update_coef: float = 0.0

    lora_rank: int = 8
    lora_alpha: float | None = None
    lora_plus_scale: float = 1.0
    rslora: bool = False
    lora_dropout: float = 0.0
    lora_target_modules: tuple[str, ...] = ()

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    offset_alpha: float = 0.0
    simpo_gamma: float = 0.5
    dpop_lambda: float = 50.0
    normalize_logps: bool = False
    pref_loss_ratio: float = 1.0
    sft_loss_ratio: float = 0.0

    recompute: bool = False
    recompute_granularity: Literal["full", "full_attn", "mlp"] = "full"
    save_steps: int = 100
    save_total_limit: int = 2
    eval_steps: int = 0
    max_evaluate_steps: int = 100
    logging_steps: int = 1
    report_to: Literal["none", "visualdl", "tensorboard"] = "none"
    disable_tqdm: bool = False

    @classmethod
    def from_yaml(cls, path: str | Path, changes: Sequence[str] = ()) -> Recipe:
        """Reads a recipe.

        Args:
            path: a YAML file.
            changes: "key=value", the value in YAML, which replace those of the file.

        Raises:
            ErnieError: one error that lists every key that is unknown, missing or has a value that is not possible.
        """
        content = read_yaml(Path(path))
        for change in changes:
            key, found, value = change.partition("=")
            if not found:
                raise ErnieError(f"--set {change}: expected key=value")
            content[key.strip()] = parse_yaml(value, f"--set {change}")
        return cls.from_dict(content, str(path))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Checks keys and types; errors as of `from_yaml`, beginning with `where`."""
        types_, values, problems = get_type_hints(cls), {}, []
        for key, value in content.items():
            if key not in types_:
                close = difflib.get_close_matches(str(key), types_, 1)
                problems.append(f"{key}: unknown key" + (f"; did you mean {close[0]}?" if close else ""))
                continue
            try:
                values[key] = convert(value, types_[key])
            except ValueError as error:
                problems.append(f"{key}: {error}")
        required = [field.name for field in fields(cls)][: len(_REQUIRED)]
        problems += [f"{key}: missing" for key in required if key not in content]
        if not problems:
            recipe = cls(**values)
            problems = recipe.problems()
            if not problems:
                return recipe
        raise ErnieError(f"{where}: cannot be used\n  " + "\n  ".join(problems))

    def problems(self) -> list[str]:
        """What values of this recipe are not possible, alone or together; files are not looked for."""
        found = [f"{name}: expected more than 0, found {getattr(self, name)}"
                 for name in _POSITIVE if not getattr(self, name) > 0]  # fmt: skip
        found += [f"{name}: expected at least 0, found {getattr(self, name)}"
                  for name in _NOT_NEGATIVE if getattr(self, name) < 0]  # fmt: skip
        found += [f"freeze: there is no part {part!r}; choose of {', '.join(PARTS)}"
                  for part in self.freeze if part not in PARTS]  # fmt: skip
        probabilities, files = self.train_dataset_prob, self.train_dataset_path
        if probabilities and (len(probabilities) != len(files) or min(probabilities) <= 0):
            found.append(f"train_dataset_prob: expected {len(files)} positive numbers, one for each train_dataset_path")
        if not self.train_dataset_path:
            found.append("train_dataset_path: expected at least one file")
        if self.compute_type in ("wint8", "wint4") and self.fine_tuning == "Full":
            found.append(
                f"compute_type: {self.compute_type} weights are not trained; choose bf16, or fine_tuning: LoRA"
            )
        if self.warmup_steps > self.max_steps:
            found.append(f"warmup_steps: expected at most max_steps {self.max_steps}, found {self.warmup_steps}")
        if self.min_lr > self.learning_rate:
            found.append(f"min_lr: expected at most learning_rate {self.learning_rate}, found {self.min_lr}")
        try:
            self.preference_options()
        except ErnieError as error:
            found.append(str(error))
        if self.token_balance_loss and self.stage == "DPO":
            found.append("token_balance_loss: pairs have no tokens to balance; leave it out, or choose another stage")
        if self.eval_steps and not self.eval_dataset_path:
            found.append("eval_dataset_path: missing, though eval_steps wants evaluations")
        return found

    def preference_options(self) -> PreferenceOptions:
        """What the keys about preferences say; raises an ErnieError if they do not go together."""
        return PreferenceOptions(
            loss=self.loss_type,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            offset=self.offset_alpha,
            gamma=self.simpo_gamma,
            dpop_weight=self.dpop_lambda,
            normalize=self.normalize_logps,
            preference_weight=self.pref_loss_ratio,
            sft_weight=self.sft_loss_ratio,
        )

    def check_files(self) -> None:
        """Raises an ErnieError that names every data file that is not there, and its key."""
        missing = [
            f"{key}: {path}: no such file"
            for key in ("train_dataset_path", "eval_dataset_path")
            for path in getattr(self, key)
            if not Path(path).is_file()
        ]
        if missing:
            raise ErnieError("recipe: cannot be used\n  " + "\n  ".join(missing))

    def replace(self, **changes: Any) -> Recipe:
        """The same recipe with some values changed."""
        return replace(self, **changes)


_REQUIRED = ("model_name_or_path", "train_dataset_path", "output_dir", "max_steps")
_POSITIVE = (
    "max_steps", "max_seq_len", "batch_size", "gradient_accumulation_steps", "learning_rate", "adam_epsilon",
    "moe_gate_lr_ratio", "vit_lr_ratio", "lora_rank", "lora_plus_scale", "beta", "save_steps", "save_total_limit",
    "max_evaluate_steps", "logging_steps",
)  # fmt: skip
_NOT_NEGATIVE = (
    "min_lr", "warmup_steps", "weight_decay", "max_grad_norm", "eval_steps", "max_bad_lines", "adam_beta1",
    "adam_beta2", "moe_use_aux_free_update_coef",
)  # fmt: skip
