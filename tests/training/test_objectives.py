"""What a batch teaches."""

import contextlib

import numpy as np
import paddle
import pytest

from ernie45.losses import IGNORED_LABEL, PreferenceOptions
from ernie45.models.vision_language import ErnieForConditionalGeneration
from ernie45.training.data.encode import Example, Pair
from ernie45.training.data.packing import pack
from ernie45.training.objectives import LanguageModelling, Preferences, answers
from tests.helpers.tiny import DENSE, MOE, randomise, tiny_config, tiny_model
from tests.helpers.training import RandomStream, example
from tests.helpers.vision import vision_config


@pytest.mark.parametrize("base", [DENSE, MOE], ids=["tied", "experts"])
def test_language_modelling_is_the_loss_of_forward(base):
    model, batch = tiny_model(tiny_config(base)), next(RandomStream())
    expected, _ = model(**batch.inputs())
    assert float(LanguageModelling()(model, batch).loss) == pytest.approx(float(expected), rel=1e-6)
    assert LanguageModelling().count(batch) == int((batch.labels != IGNORED_LABEL).sum())


def test_balanced_tokens_change_the_gradient_and_not_the_value():
    model, batch = tiny_model(tiny_config(DENSE)), next(RandomStream())
    values, gradients = [], []
    for objective in (LanguageModelling(), LanguageModelling(64)):
        loss = objective(model, batch).loss
        loss.backward()
        values.append(float(loss))
        gradients.append(model.ernie.norm.weight.grad.numpy().copy())
        model.clear_gradients()
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    np.testing.assert_allclose(gradients[1], gradients[0] * batch.learned / 64, rtol=1e-4, atol=1e-7)
    assert LanguageModelling(64).count(batch) == 64


def test_pictures():
    model = randomise(ErnieForConditionalGeneration(vision_config(), initialize=False), 0)
    vision = model.vision
    generator = np.random.default_rng(0)
    ids = np.array([5, 6, vision.image_start_id, *[vision.placeholder_id] * 4, vision.image_end_id, 7, 8])
    types = np.array([0, 0, 1, 1, 1, 1, 1, 1, 0, 0])
    positions = np.repeat(np.arange(len(ids))[:, None], 3, axis=1)
    labels = np.where(types == 0, ids, IGNORED_LABEL)
    pixels = generator.integers(0, 256, [16, vision.patch_bytes]).astype("uint8")
    with_picture = Example(ids, labels, positions, types, pixels, np.array([[1, 4, 4]]))
    batch = pack([[with_picture, with_picture]], 24)
    expected, _ = model(**batch.inputs())
    assert float(LanguageModelling()(model, batch).loss) == pytest.approx(float(expected), rel=1e-6)


def test_padding_is_no_load():
    model = tiny_model(tiny_config(MOE))
    generator = np.random.default_rng(0)
    documents = [[example(9, generator)]]
    short, long = [], []
    tight = LanguageModelling()(model, pack(documents, 9), short).loss
    padded = LanguageModelling()(model, pack(documents, 30), long).loss
    assert float(tight) == pytest.approx(float(padded), rel=1e-6)
    for one, other in zip(short, long, strict=True):
        assert one.counts.tolist() == other.counts.tolist()


def log_prob(model, document):
    """Of the learned tokens of a document by itself, in float64."""
    logits = model(paddle.to_tensor(document.input_ids[None]))[0].numpy().astype("float64")
    normal = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    places = np.flatnonzero(document.labels != IGNORED_LABEL)
    return normal[places, document.labels[places]].sum(), len(places)


def test_answers_of_packed_pairs_are_those_of_each_alone():
    model, generator = tiny_model(tiny_config(DENSE)), np.random.default_rng(0)
    pairs = [Pair(example(5 + n, generator), example(9 - n, generator)) for n in range(3)]
    found = answers(model, pack([pairs[:2], pairs[2:]], 32))
    order = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    expected = [log_prob(model, document) for document in order]
    np.testing.assert_allclose(found.log_probs.numpy(), [value for value, _ in expected], rtol=1e-5)
    assert found.lengths.tolist() == [count for _, count in expected]


def test_preferences_begin_at_log_2_and_learn():
    model, batch = tiny_model(tiny_config(DENSE)), next(RandomStream(pairs=True))
    reference = tiny_model(tiny_config(DENSE))
    objective = Preferences(PreferenceOptions(), lambda: contextlib.nullcontext(reference))
    assert objective.count(batch) == 2
    result = objective(model, batch)
    assert float(result.loss) == pytest.approx(np.log(2), rel=1e-5)
    result.loss.backward()
    with paddle.no_grad():
        for parameter in model.parameters():
            parameter.set_value(parameter - 0.01 * parameter.grad)
    better = objective(model, batch)
    assert float(better.loss) < float(result.loss)
    assert set(better.report) == set(objective.columns)
    assert better.report["margin"] > 0
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_preferences_without_reference():
    model, batch = tiny_model(tiny_config(DENSE)), next(RandomStream(pairs=True))
    found = answers(model, batch)
    chosen, rejected = np.split(found.log_probs.numpy() / found.lengths.numpy(), 2)
    expected = np.log1p(np.exp(-(2.0 * (chosen - rejected) - 0.5))).mean()
    result = Preferences(PreferenceOptions(loss="simpo", beta=2.0, gamma=0.5), None)(model, batch)
    assert float(result.loss) == pytest.approx(expected, rel=1e-5)
