"""A request for statistics answered, in the training thread: by the owner's limits, the plan, and the account."""

from collections.abc import Iterable
from typing import Final

from ternbus.broker.errors import ConfigError
from ternbus.broker.printable import printable
from ternbus.broker.protocol import statistics
from ternbus.broker.protocol.statistics import Measured, StatisticsRequest
from ternbus.edge.core.actions import StartStatistics
from ternbus.edge.core.events import StatisticsMeasured
from ternbus.edge.core.failures import HIDDEN
from ternbus.edge.core.state import TOO_MANY, Asked
from ternbus.edge.learn.failure import describe
from ternbus.edge.learn.measure import measured, measured_with_noise
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.task import Trainer
from ternbus.edge.learn.task_loader import code_errors
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.privacy import Account, Cost
from ternbus.edge.shell.private_training import charged

DAY_S: Final = 86_400.0


def answer(trainer: Trainer, job: StartStatistics, random_source: RandomSource, clock_s: float) -> StatisticsMeasured:
    """The answer, with its cost; or the refusal, which costs nothing. ``clock_s`` is the time of day (Unix seconds)."""
    request, account, failure = job.request, None, ""
    try:
        _check(job, clock_s)
        if request.dp == statistics.NONE:
            found = measured(trainer, request)
        else:
            assert job.plan is not None  # noqa: S101 - checked
            account = _paid(job.account, request, job.plan)
            found, failure = measured_with_noise(trainer, request, random_source)
        content = found.pack()
    except ConfigError as error:
        return _refused(request, str(error), clock_s)
    except code_errors() as error:
        return _refused(request, HIDDEN, clock_s, failure=describe(error))
    if len(content) > job.content_bytes:
        too_long = f"the answer has {len(content)} bytes, more than fit into a message of this broker"
        return _refused(request, too_long, clock_s)
    return StatisticsMeasured(request=request, content=content, clock_s=clock_s, account=account, failure=failure)


def _check(job: StartStatistics, clock_s: float) -> None:
    """Raise `ConfigError` for what the device refuses whatever its data are."""
    if job.is_private:
        raise ConfigError("it takes part in private sums, and gives no numbers of its own")
    if job.plan is None:
        raise ConfigError(f"it does not follow the plan: {job.refusal}")
    if job.plan.dp != job.request.dp:
        raise ConfigError(f'the plan has dp = "{job.plan.dp}", the request "{job.request.dp}"')
    if lately(job.asked, clock_s) >= job.per_day:
        raise ConfigError(f"{TOO_MANY}{job.per_day}")


def lately(asked: Iterable[Asked], clock_s: float) -> int:
    """How many requests were worked on in the last day; one that a wrong clock put into the future is one of them."""
    return sum(each.at > clock_s - DAY_S and not each.is_limit for each in asked)


def _paid(account: Account, request: StatisticsRequest, plan: Plan) -> Account:
    """The account with this answer, a Gaussian mechanism. Raises `ConfigError` if the budget does not pay for it."""
    after = charged(account, Cost(kind=request.dp, noise=request.noise, rate=1.0, steps=1), plan)
    if not after.epsilon <= plan.dp_epsilon:
        raise ConfigError(
            f"its privacy budget does not pay for it: epsilon would be {after.epsilon:.4g}, above {plan.dp_epsilon:g} "
            f"(delta {plan.dp_delta:g}); ask with more noise"
        )
    return after


def _refused(request: StatisticsRequest, reason: str, clock_s: float, failure: str = "") -> StatisticsMeasured:
    encoded = printable(reason).encode("utf-8", "replace")
    told = encoded[: statistics.REFUSAL_BYTES_MAX].decode("utf-8", "ignore")
    return StatisticsMeasured(
        request=request, content=Measured(refusal=told).pack(), clock_s=clock_s, refusal=failure or reason
    )
