"""The assembly of a helper's process from directory, store, core and service."""

import os
from collections.abc import Callable
from dataclasses import replace

from ternbus.broker.errors import ConfigError
from ternbus.broker.exit_codes import EXIT_DONE
from ternbus.broker.files import read_password
from ternbus.broker.link.link import Link, LinkEvent
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.identity import helper_user
from ternbus.broker.stop_signals import signals_stop
from ternbus.broker.version import software
from ternbus.helper.core.actions import Log, Stop
from ternbus.helper.core.core import Core
from ternbus.helper.core.profile import Profile
from ternbus.helper.shell.directory import HelperDirectory, Settings
from ternbus.helper.shell.service import Service
from ternbus.helper.store import store as stores
from ternbus.helper.store.store import HelperStore
from ternbus.helper.store.tables import FILE


def run(home: HelperDirectory, report: Callable[[Log], None]) -> Stop:
    """Run the helper until it stops. Raises `ConfigError` for one that cannot run."""
    settings = home.settings()
    identity = home.identity()
    if not settings.aggregator_key:
        raise ConfigError(
            f"{home.folder} has no invitation yet: ask the aggregator's operator for one (`ternbus aggregator invite "
            f"AGG --helper {settings.helper}`), then run: ternbus helper init {home.quoted} --invitation FILE"
        )
    with home.locked():
        stores.check(home.folder)
        with HelperStore(home.folder, settings.roster) as store:
            state = store.state
            if state is None or not (state.enrolled or settings.code):
                raise ConfigError(
                    f"{home.folder / FILE} does not know that this helper has enrolled, so it is an old copy: run "
                    f"`ternbus helper restored {home.quoted}`, which makes a new box key"
                )
            if state.enrolled and settings.code:  # an earlier process was killed before it could remove it
                home.write(settings := replace(settings, code=""))
            profile = Profile(
                federation=settings.federation,
                helper=settings.helper,
                identity=identity,
                aggregator_public=bytes.fromhex(settings.aggregator_key),
                random=os.urandom,
                roster=settings.roster,
                min=settings.min,
                code=settings.code,
                software=software(),
                directory=home.quoted,
                bfv=home.bfv_key(settings),
            )
            service = Service(
                Core(profile, state, store),
                store=store,
                make_link=link_maker(home, settings),
                report=report,
                enrolled=lambda: home.write(replace(settings, code="")),
            )
            with signals_stop(service.request_stop, EXIT_DONE):
                return service.run()


def link_maker(home: HelperDirectory, settings: Settings) -> Callable[[Callable[[LinkEvent], None]], Link]:
    user = helper_user(settings.helper)

    def connect_to(deliver: Callable[[LinkEvent], None]) -> Link:
        return Link(
            settings.broker,
            client_id=user,
            username=settings.username or user,
            password=read_password(settings.password_path) if settings.password_path is not None else None,
            no_tls=settings.may_lack_tls,
            deliver=deliver,
            tls=home.tls(),
            qos_1_below=f"{topics.root(settings.federation)}/",
        )

    return connect_to
