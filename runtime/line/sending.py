"""The sender of results, looked after once a second by the loop. It knows no broker."""

from runtime.line.inspection import Inspected
from runtime.line.mqtt import Sender, SenderState
from runtime.line.verdict import Finding
from runtime.sources.frame import Frame


class Sending:
    """Hangs on the loop; ``address`` is shown without what stands before an @."""

    def __init__(self, sender: Sender, address: str) -> None:
        self._sender = sender
        scheme, _, place = address.partition("://")
        self.to = f"{scheme}://{place.rpartition('@')[2]}"
        """Where results are sent."""
        self.state: SenderState = sender.tend()
        """How that goes."""

    def judged(self, frame: Frame, inspected: Inspected, said: Finding) -> None:
        """The sender finds it in the outbox."""

    def tick(self) -> None:
        """See that the sender runs."""
        self.state = self._sender.tend()
