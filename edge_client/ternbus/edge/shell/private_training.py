"""A training under differential privacy: for any data, it releases one noisy change of the model.

An exception of the task's code, and a model that is not finite, appear in the device's own log only. Only
`ConfigError` is raised to the caller: it means that the task cannot train by the plan, for any data.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.schema import WEIGHT_MAX, Schema, Vector, flatten
from ternbus.edge.core.actions import StartTraining, tensors_of
from ternbus.edge.core.events import BudgetSpent, TrainingFinished
from ternbus.edge.learn.accountant import epsilon
from ternbus.edge.learn.failure import describe
from ternbus.edge.learn.kinds import statistics_of
from ternbus.edge.learn.local_state import packed
from ternbus.edge.learn.noise import RandomSource, differences, noisy_change
from ternbus.edge.learn.task import PrivateTrainer, Trained, Trainer, TrainingError
from ternbus.edge.learn.task_loader import code_errors
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.privacy import DEVICE, PRIVACY_METRICS, Account, Cost, cost
from ternbus.edge.shell.encoding import encoded


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Released:
    """What others may see of a training, and the failure for the device's own log."""

    change: Vector
    trained: Trained | None
    failure: str = ""


def train(trainer: Trainer, job: StartTraining, random_source: RandomSource) -> TrainingFinished | BudgetSpent:
    """Train by a plan with `dp`, if the budget allows all of its steps; charge all of them.

    How many of them ran, which a time limit decides, might depend on the data; the account is sent without noise.
    Raises `ConfigError` if the task cannot train with the plan's `dp`.
    """
    plan = job.plan
    samples = 1 if plan.dp == DEVICE else trainer.samples  # an adapter may have to train for it, which may fail
    planned = cost(plan, samples)
    account = _charged(job.account, planned, plan)
    if not account.epsilon <= plan.dp_epsilon:
        final = _is_spent(job, planned)
        return BudgetSpent(
            base=job.base, epsilon=account.epsilon, budget=plan.dp_epsilon, delta=plan.dp_delta, final=final
        )
    if plan.dp == DEVICE:
        released = _release_device(trainer, job, random_source)
    else:
        released = _release_sample(trainer, job, planned.steps, random_source)
    _clear_statistics(trainer, job.schema, released.change)
    # Post-processing of the mechanism's output: quantization and residual cost no privacy.
    content, residual = encoded(job, released.change, _finite(job.residual), samples, random_source)
    metrics = released.trained.metrics if released.trained is not None else {}
    return TrainingFinished(
        base=job.base,
        samples=samples,
        metrics={**metrics, **dict(zip(PRIVACY_METRICS, (account.epsilon, account.delta), strict=True))},
        content=content,
        residual=residual,
        account=account,
        failure=released.failure,
        local=packed(released.trained.local) if released.trained is not None else None,
    )


def _release_device(trainer: Trainer, job: StartTraining, random_source: RandomSource) -> _Released:
    """The clipped change with noise; if training failed, the noise of a change of 0."""
    plan, trained, failure, after = job.plan, None, "", job.vector
    try:
        trained = trainer.train(tensors_of(job), plan, version=job.base, seed=job.seed)
        after = flatten(job.schema, trained.tensors)
    except ConfigError:
        raise
    except code_errors() as error:  # it may depend on the data: nobody else may see it
        failure = describe(error)
    change = noisy_change(job.vector, after, clip=plan.dp_clip, noise=plan.dp_noise, random_source=random_source)
    return _Released(change=change, trained=trained, failure=failure)


def _release_sample(trainer: Trainer, job: StartTraining, steps: int, random_source: RandomSource) -> _Released:
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
        expected = min(plan.batch_size, trainer.samples)
        deviation = plan.rate(job.base) * math.sqrt(steps) * plan.dp_noise * plan.dp_clip / expected
        change = noisy_change(job.vector, job.vector, clip=1.0, noise=deviation, random_source=random_source)
        return _Released(change=_bounded(change), trained=None, failure=describe(error))
    change = np.empty_like(job.vector)
    for part, difference in differences(job.vector, after):
        change[part] = difference
    return _Released(change=_bounded(change), trained=trained)


def _charged(account: Account, charge: Cost, plan: Plan) -> Account:
    """The account with one more training by this plan."""
    after = account.plus(charge)
    spent = epsilon(after.of(plan.dp), plan.dp_delta) if after.covers(plan.dp) else math.inf
    return replace(after, epsilon=spent, delta=plan.dp_delta)


def _is_spent(job: StartTraining, planned: Cost) -> bool:
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
