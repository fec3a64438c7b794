"""Results on their way out, looked after by the loop. It knows no broker and no PLC."""

from runtime.line.inspection import Inspected
from runtime.line.modbus import Registers
from runtime.line.mqtt import Sender, SenderState
from runtime.line.verdict import Finding, Verdict
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


class Plc:
    """Hangs on the loop: what a PLC reads is the last verdict, or that there is none."""

    def __init__(self, registers: Registers) -> None:
        self._registers = registers

    def judged(self, frame: Frame, inspected: Inspected, said: Finding) -> None:
        """Show the verdict; one that could not be kept has no number to show."""
        if isinstance(said, Verdict):
            self._registers.show(said)
        else:
            self._registers.fault()

    def tick(self) -> None:
        """A second is too long for a heartbeat: see ``beat``."""

    def beat(self) -> None:
        """The loop has gone round."""
        self._registers.beat()
