"""The learning rate's shapes and the batch ramp: exact values, what the banner says, and what is refused."""

from __future__ import annotations

import json

import pytest
from helpers import MICRO

from hola_megatron.config import Recipe, build_recipe
from hola_megatron.errors import RecipeError
from hola_megatron.recipe.schedule import describe_batches, describe_schedule, learning_rate


def recipe(**train) -> Recipe:
    values = json.loads(json.dumps(MICRO))
    values["data"]["train"] = "data"
    values["train"] |= {"steps": 10, "warmup_steps": 2, "learning_rate": 1.0, "min_learning_rate": 0.2, **train}
    return build_recipe(values)


def rates(**train) -> list[float]:
    made = recipe(**train)
    return [learning_rate(made, step) for step in range(made.train.steps)]


def test_linear_and_constant():
    assert rates(schedule="linear") == pytest.approx([0.5, 1, 1, *(1 - 0.8 * n / 7 for n in range(1, 8))])
    assert rates(schedule="constant") == pytest.approx([0.5, *[1] * 9])


def test_cosine_is_what_it_was():
    found = rates(schedule="cosine")
    assert found[:3] == pytest.approx([0.5, 1, 1]) and found[-1] == pytest.approx(0.2)
    assert found[5] - 0.6 == pytest.approx(-(found[6] - 0.6))  # symmetric around the middle


def test_wsd_is_constant_and_cools_down_to_the_lowest_rate_in_the_last_step():
    assert rates(schedule="wsd", cooldown_steps=4) == pytest.approx([0.5, *[1] * 5, 0.8, 0.6, 0.4, 0.2])
    sqrt = rates(schedule="wsd", cooldown_steps=4, cooldown_shape="sqrt")
    assert sqrt == pytest.approx([0.5, *[1] * 5, *(1 - 0.8 * (n / 4) ** 0.5 for n in range(1, 5))])


def test_a_longer_wsd_run_has_the_same_rates_until_its_cooldown():
    """So any checkpoint of the constant part can be cooled down, or gone on with."""
    short, long = (rates(schedule="wsd", cooldown_steps=3, steps=steps) for steps in (10, 20))
    assert short[:7] == long[:7] and long[7:17] == [1.0] * 10 and short[7] < 1


@pytest.mark.parametrize(("train", "said"), [
    ({"schedule": "constant"}, "up to 1 over 2 steps, then constant"),
    ({"schedule": "linear", "warmup_steps": 0}, "1, linear to 0.2 at step 10"),
    ({"schedule": "cosine"}, "up to 1 over 2 steps, cosine to 0.2 at step 10"),
    ({"schedule": "wsd", "cooldown_steps": 4, "cooldown_shape": "sqrt"},
     "up to 1 over 2 steps, constant up to step 6, sqrt cooldown to 0.2 at step 10")])
def test_what_the_banner_says(train, said):
    assert describe_schedule(recipe(**train).train) == said


def test_batch_sizes_of_a_ramp():
    ramp = recipe(batch_ramp=[{"batch": 2, "steps": 3}, {"batch": 4, "steps": 2}], global_batch_size=8)
    assert [ramp.batch_size(step) for step in range(10)] == [2, 2, 2, 4, 4, 8, 8, 8, 8, 8]
    assert [ramp.samples_before(step) for step in range(8)] == [0, 2, 4, 6, 10, 14, 22, 30]
    assert [ramp.micro_batches(1, step) for step in (0, 3, 5)] == [1, 2, 4] and ramp.micro_batches(1) == 4
    assert describe_batches(ramp.train) == "2 samples a step for 3 steps, 4 samples a step for 2 steps, then 8"
    assert describe_batches(recipe().train) == "" and recipe().samples_before(7) == 56


@pytest.mark.parametrize(("train", "said"), [
    ({"schedule": "wsd"}, "train.cooldown_steps: null, and train.schedule is wsd; give the steps"),
    ({"schedule": "wsd", "cooldown_steps": 9}, "train.cooldown_steps: 9 and train.warmup_steps = 2 are more than"),
    ({"schedule": "cosine", "cooldown_steps": 3}, "train.cooldown_steps: 3 belongs to train.schedule = wsd"),
    ({"cooldown_shape": "sqrt"}, "train.cooldown_shape: sqrt belongs to train.schedule = wsd"),
    ({"schedule": "polynomial"}, "train.schedule: 'polynomial' is not allowed"),
    ({"batch_ramp": []}, "train.batch_ramp: [] has no stage"),
    ({"batch_ramp": [{"batch": 2, "steps": 11}]}, "its stages have 11 steps, train.steps is 10"),
    ({"batch_ramp": [{"batch": 2}]}, "train.batch_ramp.0.steps: missing"),
    ({"batch_ramp": [{"batch": 2, "step": 3, "steps": 1}]}, "train.batch_ramp.0.step: no such key (did you mean "
                                                              "train.batch_ramp.0.steps?)"),
    ({"batch_ramp": [{"batch": 0, "steps": 1}]}, "train.batch_ramp.0.batch: 0 is not allowed"),
    ({"batch_ramp": [{"batch": 2**30, "steps": 1}]}, "train.batch_ramp.0.batch: 1073741824 is too large"),
    ({"batch_ramp": {"batch": 2, "steps": 1}}, "train.batch_ramp: {'batch': 2, 'steps': 1} is not allowed; give a "),
])
def test_what_cannot_be_is_one_line(train, said):
    with pytest.raises(RecipeError) as refused:
        recipe(**train)
    assert said in str(refused.value) and len(refused.value.problems) == 1


@pytest.mark.parametrize(("ramp", "world", "said"), [
    ([{"batch": 3, "steps": 1}], 1, "train.batch_ramp.0.batch: 3 is not a multiple of micro_batch_size x data-parallel "
                                    "ranks = 2"),
    ([{"batch": 4, "steps": 1}, {"batch": 2, "steps": 1}], 2, "train.batch_ramp.1.batch: 2 is not a multiple of")])
def test_a_ramp_that_the_ranks_do_not_divide(ramp, world, said):
    values = json.loads(json.dumps(MICRO))
    values["data"]["train"], values["train"]["batch_ramp"] = "data", ramp
    with pytest.raises(RecipeError) as refused:
        build_recipe(values, world_size=world)
    assert said in str(refused.value) and len(refused.value.problems) == 1
