"""Which metric chooses the best checkpoint, and what debug makes of a batch."""

import pytest

from ssm_train.assemble import choose_main_metric, debug_config
from ssm_train.config import RunConfig
from ssm_train.data.tasks import TASKS
from ssm_train.errors import InputError


def config(**changes) -> RunConfig:
    return RunConfig(new_model={"model_type": "gla"}, data="quickstart", **changes)


def test_the_tasks_first_metric_where_it_is_measured():
    assert choose_main_metric(config(), TASKS["sst2"]) == "accuracy"
    assert choose_main_metric(config(), TASKS["quickstart"]) == "loss"
    generating = config(eval_gen={"max_new_tokens": 4})
    assert choose_main_metric(generating, TASKS["quickstart"]) == "exact_match"
    assert choose_main_metric(config(metric_for_best="loss"), TASKS["sst2"]) == "loss"


@pytest.mark.parametrize("metric", ["acuracy", "bleu"])
def test_a_metric_that_is_not_measured_is_refused(metric):
    with pytest.raises(InputError, match=f"metric_for_best: '{metric}' is not measured"):
        choose_main_metric(config(metric_for_best=metric), TASKS["quickstart"])


def test_a_least_value_needs_a_metric_of_which_more_is_better():
    with pytest.raises(InputError, match="less is better"):
        choose_main_metric(config(min_eval_metric_after_epoch={1: 2.0}), TASKS["quickstart"])


def test_debug_examples_fill_a_batch():
    debug = debug_config(config(batch_size=32, gradient_accumulation_steps=4))
    assert (debug.batch_size, debug.gradient_accumulation_steps) == (8, 1)
