"""A device's service as it runs, in a thread of the test, so that what it holds can be looked at."""

import threading
from pathlib import Path

from support.noise_trainer import MODEL, NoiseTrainer
from ternbus.broker.link.link import Link
from ternbus.broker.link.tls import Tls
from ternbus.broker.protocol.identity import Identity, seal
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.protocol.schema import vector_digest
from ternbus.edge.core.actions import Log, Stop
from ternbus.edge.core.core import Core
from ternbus.edge.core.profile import Profile
from ternbus.edge.shell.service import Service
from ternbus.edge.store.outbox import Outbox

WITHIN_S = 120.0
TRAINING_S = 0.1


def tls_of(folder: Path, invitation: Invitation) -> Tls | None:
    """What of an invitation is for TLS, as files."""
    if invitation.ca is None or invitation.certificate is None or invitation.key is None:
        return None
    tls = Tls(ca=folder / "ca.pem", certificate=folder / "certificate.pem", key=folder / "certificate.key")
    for path, text in ((tls.ca, invitation.ca), (tls.certificate, invitation.certificate), (tls.key, invitation.key)):
        assert path is not None
        path.write_text(text)
        path.chmod(0o600)
    return tls


class Device:
    """A device's service in a thread of its own; what ends it, whatever it is, is remembered."""

    def __init__(self, folder: Path, invitation: Invitation) -> None:
        folder.mkdir()
        self.tls = tls_of(folder, invitation)
        identity, public = Identity.generate(), invitation.aggregator_public
        profile = Profile(
            federation=invitation.federation,
            device=invitation.device,
            identity=identity,
            aggregator_public=public,
            seal=lambda plain: seal(public, plain),
            role="train",
            code=invitation.code,
            tensors={name: tuple(array.shape) for name, array in MODEL.items()},
        )
        self.ended: Stop | BaseException | None = None
        self.logs: list[Log] = []
        self._folder, self._profile, self._url = folder, profile, invitation.broker
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name=profile.device, daemon=True)
        self._thread.start()
        assert self._ready.wait(WITHIN_S)

    def _run(self) -> None:
        try:
            with Outbox(self._folder, self._profile.key) as outbox:
                self.core = Core(self._profile, outbox.state)
                name, url = self._profile.device, self._url
                self.service = Service(
                    self.core,
                    outbox=outbox,
                    make_link=lambda deliver: Link(url, client_id=name, username=name, deliver=deliver, tls=self.tls),
                    report=self.logs.append,
                    trainer=NoiseTrainer(),
                    min_seconds=TRAINING_S,
                )
                self._ready.set()
                self.ended = self.service.run()
                self.service.stop_training()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test must see it
            self.ended = error

    @property
    def vector_digest(self) -> str | None:
        """Of the bits that it holds, whatever its follower says of them."""
        vector = self.core.follower.vector
        return None if vector is None else vector_digest(vector).hex()

    def stop(self) -> None:
        self.service.request_stop("the test is over")
        self._thread.join(WITHIN_S)
        assert isinstance(self.ended, Stop), repr(self.ended)
