"""The training loop."""

import csv

import numpy as np
import paddle
import pytest

from ernie45 import lora
from ernie45.errors import CheckpointError, ErnieError
from ernie45.training.checkpoints import BEST, pointed, read_state
from ernie45.training.data.packing import pack
from ernie45.training.objectives import LanguageModelling
from ernie45.training.trainer import Trainer
from tests.helpers.tiny import DENSE, MOE, tiny_config, tiny_model
from tests.helpers.training import RandomStream, tiny_recipe, tiny_trainer


def rows(folder):
    with (folder / "training.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def losses(folder):
    return [float(row["loss"]) for row in rows(folder)]


@pytest.mark.parametrize("base", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_plain_paddle_loop_gives_the_same_losses(tmp_path, base, micro_batches):
    model = tiny_model(tiny_config(base))
    model.train()
    optimizer = paddle.optimizer.AdamW(
        1e-2,
        0.9,
        0.95,
        1e-8,
        parameters=[p for p in model.parameters() if not p.stop_gradient],
        weight_decay=0.1,
        apply_decay_param_fun={p.name for p in model.parameters() if p.ndim > 1}.__contains__,
        grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0),
    )
    stream, plain = RandomStream(), []
    for _ in range(6):
        batches = [next(stream) for _ in range(micro_batches)]
        learned, total = sum(batch.learned for batch in batches), 0.0
        for batch in batches:
            loss, _ = model(**batch.inputs())
            loss = loss * (batch.learned / learned)
            loss.backward()
            total += float(loss)
        optimizer.step()
        optimizer.clear_grad()
        plain.append(total)
    changes = {"lr_scheduler_type": "constant", "gradient_accumulation_steps": micro_batches}
    tiny_trainer(tmp_path, base, **changes).run()
    assert losses(tmp_path) == pytest.approx(plain, rel=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_how_a_step_is_cut_into_micro_batches_makes_no_difference(tmp_path, dtype):
    """Four micro batches of one row each, with different numbers of learned tokens, are one batch of four rows."""
    found = []
    for rows_, micro_batches in ((4, 1), (1, 4)):
        stream = RandomStream(rows=4)
        if rows_ == 1:
            stream = Cut(stream)
        trainer = Trainer(
            tiny_model(tiny_config(DENSE), dtype=dtype),
            tiny_recipe(tmp_path, gradient_accumulation_steps=micro_batches),
            stream,
            LanguageModelling(),
        )
        found.append([trainer.train_step()["gradient_norm"] for _ in range(3)])
    assert found[0] == pytest.approx(found[1], rel=1e-5 if dtype == "float32" else 2e-2)


class Cut(RandomStream):
    """The rows of another stream, one by one."""

    def __init__(self, whole):
        super().__init__()
        self.whole, self.waiting = whole, []

    def __next__(self):
        if not self.waiting:
            generator = np.random.default_rng([self.whole.seed, self.whole.given])
            self.whole.given += 1
            self.waiting = [self.whole._row(generator) for _ in range(4)]
        return pack([self.waiting.pop(0)], self.whole.length)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumes_to_the_bit(tmp_path, dtype):
    more = {"max_steps": 8, "save_steps": 3, "moe_aux_loss_lambda": 0.1, "moe_use_aux_free_update_coef": 1e-2}
    whole = tiny_trainer(tmp_path / "whole", MOE, dtype, **more)
    whole.run()
    stopped = tiny_trainer(tmp_path / "torn", MOE, dtype, **more)
    stop_after(stopped, 5)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert pointed(tmp_path / "torn").name == "checkpoint-3"
    resumed = tiny_trainer(tmp_path / "torn", MOE, dtype, **more)
    resumed.run(resume=True)
    exact = ("step", "loss", "learning_rate", "gradient_norm", "tokens", "balance_loss", "expert_load")
    assert [[row[name] for name in exact] for row in rows(tmp_path / "torn")] == [
        [row[name] for name in exact] for row in rows(tmp_path / "whole")
    ]
    for name, parameter in whole.model.state_dict().items():
        np.testing.assert_array_equal(parameter.numpy(), resumed.model.state_dict()[name].numpy(), err_msg=name)


def stop_after(trainer, steps):
    """As Ctrl-C would in the step after."""
    step = trainer.train_step

    def limited(**more):
        if trainer.step == steps:
            raise KeyboardInterrupt
        return step(**more)

    trainer.train_step = limited


def test_resuming_with_other_parts_frozen_is_refused(tmp_path):
    tiny_trainer(tmp_path, DENSE, max_steps=2).run()
    model = tiny_model(tiny_config(DENSE))
    model.ernie.norm.weight.stop_gradient = True
    trainer = Trainer(model, tiny_recipe(tmp_path, max_steps=4), RandomStream(), LanguageModelling())
    with pytest.raises(CheckpointError, match="2 tensors are not those of this run"):
        trainer.run(resume=True)


def test_does_not_run_over_an_earlier_run(tmp_path):
    tiny_trainer(tmp_path, DENSE, max_steps=1).run()
    with pytest.raises(ErnieError, match="holds checkpoints of an earlier run; go on with --resume"):
        tiny_trainer(tmp_path, DENSE, max_steps=1).run()


def test_evaluates_keeps_the_best_and_says_so(tmp_path):
    model = tiny_model(tiny_config(DENSE))
    held_out = [next(RandomStream(seed=9)) for _ in range(2)]
    recipe = tiny_recipe(
        tmp_path,
        max_steps=6,
        eval_steps=1,
        eval_dataset_path="e",
        save_steps=100,
        save_total_limit=1,
        learning_rate=0.05,
    )
    Trainer(model, recipe, RandomStream(), LanguageModelling(), lambda: held_out).run()
    values = [float(row["eval_loss"]) for row in rows(tmp_path)]
    best = int(np.argmin(values)) + 1
    assert best < 6  # on random data it gets worse
    assert pointed(tmp_path, BEST).name == f"checkpoint-{best}"
    assert pointed(tmp_path).name == "checkpoint-6"
    assert read_state(pointed(tmp_path))["best_loss"] == min(values)


def test_evaluation_is_the_mean_over_tokens(tmp_path):
    model = tiny_model(tiny_config(DENSE))
    batches = [next(RandomStream(rows=rows_, seed=5)) for rows_ in (1, 3)]
    trainer = Trainer(model, tiny_recipe(tmp_path), RandomStream(), LanguageModelling(), lambda: batches)
    both = [float(model(**batch.inputs())[0]) * batch.learned for batch in batches]
    assert trainer.evaluate() == pytest.approx(sum(both) / sum(batch.learned for batch in batches), rel=1e-6)
    assert model.training


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    trainer = tiny_trainer(tmp_path, DENSE, max_steps=5, save_steps=2)
    step = trainer.train_step

    def poisoned(**more):
        if trainer.step == 3:
            trainer.model.ernie.norm.weight.set_value(paddle.full_like(trainer.model.ernie.norm.weight, float("nan")))
        return step(**more)

    trainer.train_step = poisoned
    before = trainer.model.ernie.embed_tokens.weight
    with pytest.raises(ErnieError, match="step 4: the loss is nan.*the weights were left as they were"):
        trainer.run()
    assert bool(paddle.isfinite(before).all())
    assert pointed(tmp_path).name == "checkpoint-2"


def test_correction_biases_move_and_even_the_load(tmp_path):
    loads = {}
    for rate in (0.0, 0.02):
        trainer = tiny_trainer(tmp_path / str(rate), MOE, moe_use_aux_free_update_coef=rate, learning_rate=1e-6)
        before = trainer.model.state_dict()["ernie.layers.1.mlp.moe_statics.e_score_correction_bias"].numpy().copy()
        loads[rate] = np.mean([trainer.train_step()["expert_load"] for _ in range(40)][-10:])
        after = trainer.model.state_dict()["ernie.layers.1.mlp.moe_statics.e_score_correction_bias"].numpy()
        assert (np.abs(after - before).max() > 0) == (rate > 0)
    assert loads[0.02] < loads[0.0]


def test_correction_biases_of_frozen_routers_stay(tmp_path):
    model = tiny_model(tiny_config(MOE))
    lora.apply(model, 4)
    before = model.state_dict()["ernie.layers.1.mlp.moe_statics.e_score_correction_bias"].numpy().copy()
    recipe = tiny_recipe(tmp_path, moe_use_aux_free_update_coef=0.1)
    Trainer(model, recipe, RandomStream(), LanguageModelling()).train_step()
    after = model.state_dict()["ernie.layers.1.mlp.moe_statics.e_score_correction_bias"].numpy()
    np.testing.assert_array_equal(before, after)


def test_router_losses_reach_gradients_but_not_the_reported_loss(tmp_path):
    plain, routed = (tiny_trainer(tmp_path, MOE, moe_aux_loss_lambda=value) for value in (0.0, 10.0))
    first, second = plain.train_step(), routed.train_step()
    assert first["loss"] == second["loss"]
    assert first["balance_loss"] == second["balance_loss"] > 0
    assert second["gradient_norm"] > 1.1 * first["gradient_norm"]


@pytest.mark.parametrize("decoupled", [False, True])
def test_orthogonalization(tmp_path, decoupled):
    trainer = tiny_trainer(
        tmp_path,
        MOE,
        moe_orthogonal_loss_lambda=1000.0,
        use_ortho_loss_callback=decoupled,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
    )
    found = [trainer.train_step()["orthogonality_loss"] for _ in range(10)]
    assert found[-1] < 0.9 * found[0]


def test_trains_adapters_alone(tmp_path):
    model = tiny_model(tiny_config(MOE))
    lora.apply(model, 4)
    frozen = {name: p.numpy().copy() for name, p in model.named_parameters() if p.stop_gradient}
    recipe = tiny_recipe(tmp_path, max_steps=3, fine_tuning="LoRA", learning_rate=0.05)
    Trainer(model, recipe, RandomStream(), LanguageModelling()).run()
    for name, parameter in model.named_parameters():
        if name in frozen:
            np.testing.assert_array_equal(parameter.numpy(), frozen[name])
    checkpoint = pointed(tmp_path)
    assert not (checkpoint / "model.safetensors").exists()
    other = tiny_model(tiny_config(MOE))
    lora.load(other, checkpoint)
    ids = paddle.to_tensor([[3, 4, 5]])
    model.eval()
    np.testing.assert_array_equal(other(ids).numpy(), model(ids).numpy())
    resumed = tiny_model(tiny_config(MOE))
    lora.apply(resumed, 4)
    trainer = Trainer(resumed, recipe.replace(max_steps=4), RandomStream(), LanguageModelling())
    trainer.run(resume=True)
    assert [int(row["step"]) for row in rows(tmp_path)] == [1, 2, 3, 4]
