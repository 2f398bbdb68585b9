"""The time of a replay."""


class VirtualClock:
    """Seconds since the start of a replay; they pass when somebody says so.

    Attributes:
      now: seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    def wait_until(self, time: float) -> float:
        """Let time pass until `time`, if that is still to come; returns the seconds waited."""
        waited = max(0.0, time - self.now)
        self.now = max(self.now, time)
        return waited
