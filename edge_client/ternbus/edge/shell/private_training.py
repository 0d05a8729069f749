"""A training under differential privacy: for any data, it releases one noisy change of the model.

An exception of the task's code, and a model that is not finite, appear in the device's own log only. Only
`ConfigError` is raised to the caller: it means that the task cannot train by the plan, for any data.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.schema import WEIGHT_MAX, Schema, Vector, flatten
from ternbus.broker.protocol.ternary import Block
from ternbus.edge.core.actions import StartTraining, tensors_of
from ternbus.edge.core.events import BudgetSpent, TrainingFinished
from ternbus.edge.learn import poisson_binomial
from ternbus.edge.learn.accountant import epsilon
from ternbus.edge.learn.failure import describe
from ternbus.edge.learn.kinds import statistics_of
from ternbus.edge.learn.local_state import packed
from ternbus.edge.learn.noise import RandomSource, differences, noisy_change
from ternbus.edge.learn.sum_content import SumContent
from ternbus.edge.learn.task import PrivateTrainer, Trained, Trainer, TrainingError, whole_number
from ternbus.edge.learn.task_loader import code_errors
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.privacy import PRIVACY_METRICS, SAMPLE, SUM, Account, Charge, cost, sum_cost
from ternbus.edge.shell.encoding import encoded


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Outcome:
    """A training: the vector after it, the one before it if training failed, and the failure for the device's log."""

    after: Vector
    trained: Trained | None
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Released:
    """What others may see of a training, a new residual, and the training for the device's own log."""

    content: Block | SumContent
    residual: Vector | None
    outcome: _Outcome


def train(trainer: Trainer, job: StartTraining, random_source: RandomSource) -> TrainingFinished | BudgetSpent:
    """Train by a plan with `dp`, if the budget allows all of its steps; charge all of them.

    How many of them ran, which a time limit decides, might depend on the data; the account is sent without noise.
    Raises `ConfigError` if the task cannot train with the plan's `dp`.
    """
    plan = job.plan
    # an adapter may have to train for the number, which may fail
    samples = whole_number(trainer.samples) if plan.dp == SAMPLE else 1
    planned = _planned(job, samples)
    account = charged(job.account, planned, plan)
    if not account.epsilon <= plan.dp_epsilon:
        final = _is_spent(job, planned)
        return BudgetSpent(
            base=job.base, epsilon=account.epsilon, budget=plan.dp_epsilon, delta=plan.dp_delta, final=final
        )
    if plan.dp == SAMPLE:
        released = _release_sample(trainer, job, planned.steps, samples, random_source)
    else:
        release = _release_sum if plan.dp == SUM else _release_device
        released = release(trainer, job, random_source)
    trained = released.outcome.trained
    metrics = trained.metrics if trained is not None else {}
    return TrainingFinished(
        base=job.base,
        samples=samples,
        metrics={**metrics, **dict(zip(PRIVACY_METRICS, (account.epsilon, account.delta), strict=True))},
        content=released.content,
        residual=released.residual,
        account=account,
        failure=released.outcome.failure,
        local=packed(trained.local) if trained is not None else None,
    )


def _planned(job: StartTraining, samples: int) -> Charge:
    if job.plan.dp == SUM:
        assert job.sums is not None  # noqa: S101 - such a plan has the codec of private sums
        return sum_cost(job.sums.terms, job.sums.honest)
    return cost(job.plan, samples)


def _release_device(trainer: Trainer, job: StartTraining, random_source: RandomSource) -> _Released:
    """The clipped change with noise; if training failed, the noise of a change of 0."""
    plan, outcome = job.plan, _trained(trainer, job)
    change = noisy_change(
        job.vector, outcome.after, clip=plan.dp_clip, noise=plan.dp_noise, random_source=random_source
    )
    return _encoded(trainer, job, change, outcome, random_source)


def _release_sum(trainer: Trainer, job: StartTraining, random_source: RandomSource) -> _Released:
    """The draws for the change; if training failed, those for a change of 0. No residual: it would have no noise."""
    assert job.sums is not None  # noqa: S101 - as above
    outcome, terms = _trained(trainer, job), job.sums.terms
    silent = statistics_of(trainer, (tensor.name for tensor in job.schema.tensors))
    drawn = poisson_binomial.release(
        job.schema, terms, job.vector, outcome.after, random_source=random_source, silent=silent
    )
    content = poisson_binomial.content(terms, drawn, random_source)
    return _Released(content=content, residual=None, outcome=outcome)


def _trained(trainer: Trainer, job: StartTraining) -> _Outcome:
    try:
        trained = trainer.train(tensors_of(job), job.plan, version=job.base, seed=job.seed)
        return _Outcome(after=flatten(job.schema, trained.tensors), trained=trained)
    except ConfigError:
        raise
    except code_errors() as error:  # it may depend on the data: nobody else may see it
        return _Outcome(after=job.vector, trained=None, failure=describe(error))


def _release_sample(
    trainer: Trainer, job: StartTraining, steps: int, samples: int, random_source: RandomSource
) -> _Released:
    """The change by noisy steps, each element finite; if training failed, only the noise of its steps.

    The trainer itself handles the failure of a single sample. What remains is above all a model that is not finite
    because of noisy gradients and the plan.
    """
    plan = job.plan
    if not isinstance(trainer, PrivateTrainer):
        raise ConfigError(
            'the plan has dp = "sample", and this task has no train_privately(): add it, or use dp = "device"'
        )
    start = tensors_of(job)
    try:
        trained = trainer.train_privately(start, plan, version=job.base, seed=job.seed, random_source=random_source)
        after = flatten(job.schema, trained.tensors)
        if not np.isfinite(after).all():
            raise TrainingError("training diverged (the model is not finite)")
    except ConfigError:
        raise
    except code_errors() as error:  # as above
        expected = min(plan.batch_size, samples)
        deviation = plan.rate(job.base) * math.sqrt(steps) * plan.dp_noise * plan.dp_clip / expected
        change = noisy_change(job.vector, job.vector, clip=1.0, noise=deviation, random_source=random_source)
        outcome = _Outcome(after=job.vector, trained=None, failure=describe(error))
        return _encoded(trainer, job, _bounded(change), outcome, random_source)
    change = np.empty_like(job.vector)
    for part, difference in differences(job.vector, after):
        change[part] = difference
    outcome = _Outcome(after=after, trained=trained)
    return _encoded(trainer, job, _bounded(change), outcome, random_source)


def _encoded(
    trainer: Trainer, job: StartTraining, change: Vector, outcome: _Outcome, random_source: RandomSource
) -> _Released:
    """The content of a noisy change. Quantization and residual are post-processing, which costs no privacy."""
    _clear_statistics(trainer, job.schema, change)
    content, residual = encoded(job, change, _finite(job.residual), 1, random_source)  # the weight is 1 under `dp`
    return _Released(content=content, residual=residual, outcome=outcome)


def charged(account: Account, charge: Charge, plan: Plan) -> Account:
    """The account with one more charge, under this plan."""
    after = account.plus(charge)
    spent = epsilon(after.of(plan.dp), plan.dp_delta) if after.covers(plan.dp) else math.inf
    return replace(after, epsilon=spent, delta=plan.dp_delta)


def _is_spent(job: StartTraining, planned: Charge) -> bool:
    """Whether the owner's budget does not pay for the planned steps, though the device has paid for as many like them.

    Otherwise only the plan may ask for too much: for less noise, more steps or a smaller epsilon than others before or
    after it. No plan can end a device that has not spent its owner's budget on trainings.
    """
    policy, paid = job.policy, job.account.spent
    if policy is None or not any(
        replace(each, steps=planned.steps) == planned for each in paid if each.steps >= planned.steps
    ):
        return False
    return not epsilon(job.account.plus(planned).of(policy.kind), policy.delta) <= policy.epsilon


def _clear_statistics(trainer: Trainer, schema: Schema, change: Vector) -> None:
    """Set the change of statistics, such as batch norm's, to 0, without noise: they are not sent."""
    statistics = statistics_of(trainer, (tensor.name for tensor in schema.tensors))
    for segment in schema.segments:
        if segment.tensor.name in statistics:
            change[segment.start : segment.stop] = 0


def _bounded(change: Vector) -> Vector:
    return np.clip(change, -WEIGHT_MAX, WEIGHT_MAX)


def _finite(residual: Vector | None) -> Vector | None:
    """Set values that are not finite to 0: an earlier version's residual may have some, and no codec accepts them."""
    return None if residual is None else np.nan_to_num(residual, nan=0.0, posinf=0.0, neginf=0.0)
