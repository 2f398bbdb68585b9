"""What a run did: hits, misses, bytes, stalls, tokens a second; per phase and per layer."""

import dataclasses
from typing import Any


@dataclasses.dataclass(kw_only=True, slots=True)
class PhaseStats:
    """Counts of one phase (prefill or decode). Lists have one entry an MoE layer; bytes are bytes over the link."""

    hits: list[int]
    late_hits: list[int]
    misses: list[int]
    bytes_demand: int = 0
    bytes_prefetch: int = 0
    bytes_wasted: int = 0
    seconds: float = 0.0
    stall_seconds: float = 0.0
    link_busy_seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    skipped: list[int] = dataclasses.field(default_factory=list)
    low_precision: list[int] = dataclasses.field(default_factory=list)
    bytes_low_precision: int = 0
    computed: list[int] = dataclasses.field(default_factory=list)

    @classmethod
    def empty(cls, layers: int) -> "PhaseStats":
        """Zeros for a model with `layers` MoE layers."""
        return cls(
            hits=[0] * layers,
            late_hits=[0] * layers,
            misses=[0] * layers,
            skipped=[0] * layers,
            low_precision=[0] * layers,
            computed=[0] * layers,
        )

    @property
    def absent(self) -> int:
        """Experts that had no slot when they were needed, whatever was done about it."""
        return sum(map(sum, (self.misses, self.computed, self.skipped, self.low_precision)))

    @property
    def bytes_moved(self) -> int:
        """Bytes over the link, of every kind."""
        return self.bytes_demand + self.bytes_prefetch + self.bytes_low_precision


@dataclasses.dataclass(kw_only=True, slots=True)
class DiskStats:
    """Counts of a host pool that holds part of the blocks, both phases together.

    A hit, late hit or miss is one block that the link asks for: in host memory, on its way there, or only on disk.
    `bytes_read` were read because the link asked, `bytes_ahead` because a prediction said that it would; `bytes_wasted`
    of these left the pool unused. `stall_seconds` were spent in waiting for reads, and in `read_seconds` at least one
    was under way. `buffers_made` blocks were for a
    while one more than the plan has memory for. `horizon` says how far ahead each layer's blocks are read and why.
    """

    places: int = 0
    hits: int = 0
    late_hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_ahead: int = 0
    bytes_wasted: int = 0
    stall_seconds: float = 0.0
    read_seconds: float = 0.0
    buffers_made: int = 0
    horizon: dict[str, Any] | None = None

    def reset(self) -> None:
        """Back to zero; the pool keeps its places."""
        for field in dataclasses.fields(self):
            if field.name != "places":
                setattr(self, field.name, field.default)

    def line(self) -> str:
        """One line to read."""
        asked = self.hits + self.late_hits + self.misses
        share = 100 * self.hits / asked if asked else 0.0
        return (
            f"disk: {asked} blocks asked of {self.places} places in host memory, {share:.1f} % there; "
            f"{(self.bytes_read + self.bytes_ahead) / 1e6:.1f} MB read, {self.bytes_ahead / 1e6:.1f} MB of them ahead "
            f"and {self.bytes_wasted / 1e6:.1f} MB in vain; waited {self.stall_seconds:.2f} s"
        )


@dataclasses.dataclass(kw_only=True, slots=True)
class Stats:
    """Counters since loading or the last `reset`.

    A hit, late hit or miss is one distinct expert that one layer of one step (or prompt chunk) needs. `stall_seconds`
    is host time spent in handing over demand copies and waiting for them where the platform makes them synchronous;
    the share of a copy that a device hides or waits for on its own is not in it. `peak_device_bytes` is the largest
    sum of live arrays in device memory seen at the end of a phase, plus the temporary bytes of the largest program.

    Absent experts that the host's processor computes in place are counted as `computed`, not as misses, and move no
    bytes; `miss` says by what figures they were chosen, as of the end of the last run, None where all are copied.
    Absent experts that a lossy option leaves out are counted as `skipped`, those that it fetches in 4 bits as
    `low_precision`, and neither as misses; `bytes_demand` leaves out `bytes_low_precision`.

    A late hit is one whose block was on its way and had to be waited for. `bytes_wasted` are those of blocks that were
    prefetched and left their slots unused. Replays on a simulated link count virtual seconds, waiting of every kind as
    `stall_seconds`, and how long the link was busy; the engine leaves `link_busy_seconds` at 0.

    `horizon` says how far ahead each layer is prefetched for and why, `recall` how good the predictions were, both as
    of the end of the last run; None where nothing is prefetched or predicted. `disk` is None where host memory holds
    every block. `lossy` are the options that may change results, by their names in `load`; None where results are the
    model's own.

    On a mesh `slots` and `peak_device_bytes` are a device's, and counts of blocks, bytes and stalls are those of this
    process's devices together, as of the end of the last run; `devices` has each one's. `exchange` is what decode steps
    have sent between all devices: bytes by device, counted from the routes. `overlap` says how many passes of
    prompts run side by side and why, with the seconds that were predicted. All three are None on one device.
    """

    layers: int
    experts: int
    slots: int
    staging_slots: int
    prefill: PhaseStats
    decode: PhaseStats
    peak_device_bytes: int = 0
    horizon: dict[str, Any] | None = None
    recall: dict[str, Any] | None = None
    miss: dict[str, Any] | None = None
    disk: DiskStats | None = None
    lossy: dict[str, Any] | None = None
    devices: "list[Stats] | None" = None
    exchange: dict[str, Any] | None = None
    overlap: dict[str, Any] | None = None

    @classmethod
    def empty(
        cls, *, layers: int, experts: int, slots: int, staging_slots: int, lossy: dict[str, Any] | None = None
    ) -> "Stats":
        """Zeros for an engine with `slots` cache slots for `experts` expert blocks."""
        return cls(
            layers=layers,
            experts=experts,
            slots=slots,
            staging_slots=staging_slots,
            prefill=PhaseStats.empty(layers),
            decode=PhaseStats.empty(layers),
            lossy=lossy,
        )

    def reset(self) -> None:
        """Back to zero, the peak and the reports included."""
        self.prefill, self.decode = PhaseStats.empty(self.layers), PhaseStats.empty(self.layers)
        self.peak_device_bytes = 0
        self.horizon = self.recall = self.miss = self.exchange = None
        if self.disk is not None:
            self.disk.reset()
        for device in self.devices or ():
            device.reset()

    def add_devices(self) -> None:
        """Take the counts of blocks, bytes and stalls from `devices`: their sums. Their stalls come one after another,
        in the time of the process that serves them all. Reports are those of the first."""
        for name in ("prefill", "decode"):
            own, theirs = getattr(self, name), [getattr(device, name) for device in self.devices or ()]
            for count in ("hits", "late_hits", "misses"):
                by_device = [getattr(one, count) for one in theirs]
                setattr(own, count, [sum(of_layer) for of_layer in zip(*by_device, strict=True)])
            for count in ("bytes_demand", "bytes_prefetch", "bytes_wasted", "stall_seconds"):
                setattr(own, count, sum(getattr(one, count) for one in theirs))
        for device in (self.devices or ())[:1]:
            self.horizon, self.recall = device.horizon or self.horizon, device.recall

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens over decode time; 0 before the first."""
        return self.decode.tokens / self.decode.seconds if self.decode.seconds else 0.0

    @property
    def link_utilisation(self) -> float:
        """Share of the decode time in which the link was busy; 0 where that is not known."""
        return self.decode.link_busy_seconds / self.decode.seconds if self.decode.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types: totals over both phases, per-layer lists, and each phase."""
        phases = (self.prefill, self.decode)
        total = {
            name: sum(getattr(phase, name) for phase in phases)
            for name in ("bytes_demand", "bytes_prefetch", "bytes_wasted", "stall_seconds", "link_busy_seconds")
        }
        light = {name: sum(getattr(self.decode, name)) for name in ("skipped", "low_precision")}
        by_layer = {
            name: [a + b for a, b in zip(getattr(self.prefill, name), getattr(self.decode, name), strict=True)]
            for name in ("hits", "late_hits", "misses")
        }
        return {
            "prefill_seconds": self.prefill.seconds,
            "decode_seconds": self.decode.seconds,
            "tokens_per_second": self.tokens_per_second,
            **{name: sum(values) for name, values in by_layer.items()},
            "computed": sum(self.decode.computed),
            **light,
            **total,
            "bytes_low_precision": self.decode.bytes_low_precision,
            "link_utilisation": self.link_utilisation,
            "peak_device_bytes": self.peak_device_bytes,
            "slots": self.slots,
            "staging_slots": self.staging_slots,
            "experts": self.experts,
            **{f"{name}_by_layer": values for name, values in by_layer.items()},
            "horizon": self.horizon,
            "recall": self.recall,
            "miss": self.miss,
            "disk": None if self.disk is None else dataclasses.asdict(self.disk),
            "lossy": self.lossy,
            "exchange": self.exchange,
            "overlap": self.overlap,
            "devices": None if self.devices is None else [device.of_device() for device in self.devices],
            "prefill": dataclasses.asdict(self.prefill),
            "decode": dataclasses.asdict(self.decode),
        }

    def of_device(self) -> dict[str, Any]:
        """Of one of several devices, plain JSON types: its blocks, bytes over its link and stalls, of both phases."""
        phases = (self.prefill, self.decode)
        sums = {name: sum(sum(getattr(phase, name)) for phase in phases) for name in ("hits", "late_hits", "misses")}
        return {
            **sums,
            "bytes_moved": sum(phase.bytes_moved for phase in phases),
            "stall_seconds": sum(phase.stall_seconds for phase in phases),
        }

    def table(self) -> str:
        """A few lines to read: one row a phase."""
        widths = {
            "tokens": 7,
            "seconds": 8,
            "tok/s": 8,
            "hits": 8,
            "misses": 8,
            "hit %": 6,
            "MB moved": 9,
            "stall s": 8,
        }
        lines = [" " * 8 + "".join(f" {name:>{width}}" for name, width in widths.items())]
        for name, phase in (("prefill", self.prefill), ("decode", self.decode)):
            hits, misses = sum(phase.hits) + sum(phase.late_hits), phase.absent
            rate = phase.tokens / phase.seconds if phase.seconds else 0.0
            share = 100 * hits / (hits + misses) if hits + misses else 0.0
            moved = phase.bytes_moved / 1e6
            lines.append(
                f"{name:8} {phase.tokens:7d} {phase.seconds:8.2f} {rate:8.1f} {hits:8d} {misses:8d} {share:6.1f} "
                f"{moved:9.1f} {phase.stall_seconds:8.2f}"
            )
        ahead = self.decode
        if ahead.bytes_prefetch:
            lines.append(
                f"prefetched {ahead.bytes_prefetch / 1e6:.1f} MB, {ahead.bytes_wasted / 1e6:.1f} MB of them wasted; "
                f"{sum(ahead.late_hits)} hits were late"
            )
        if self.disk is not None:
            lines.append(self.disk.line())
        if ahead.link_busy_seconds:
            lines.append(f"link busy for {100 * self.link_utilisation:.1f} % of the decode time")
        lines.append(
            f"{self.slots} cache slots + {self.staging_slots} staging for {self.experts} experts; "
            f"peak device bytes {self.peak_device_bytes / 1e6:.1f} MB"
        )
        if self.devices is not None:
            moved_by = ", ".join(f"{device.of_device()['bytes_moved'] / 1e6:.1f}" for device in self.devices)
            lines.append(f"MB moved by {len(self.devices)} devices: {moved_by}")
        if self.exchange is not None and self.exchange["layers"]:
            sent = self.exchange["bytes_sent"]
            lines.append(
                f"{sum(sent) / 1e6:.1f} MB exchanged in decode steps ({self.exchange['transport']}), "
                f"{max(sent) / 1e6:.1f} MB by the device that sent most"
            )
        if computed := sum(ahead.computed):
            lines.append(f"{computed} of the misses were computed on the host, in place")
        if skipped := sum(ahead.skipped):
            lines.append(f"{skipped} absent experts of little weight were left out")
        if low := sum(ahead.low_precision):
            moved = ahead.bytes_low_precision / 1e6
            lines.append(f"{low} absent experts of little weight came in 4 bits, {moved:.1f} MB")
        if self.lossy is not None:
            lines.append(f"lossy: {lossy_text(self.lossy)}")
        return "\n".join(lines)


def lossy_text(lossy: dict[str, Any]) -> str:
    """`Stats.lossy` in words, for tables: each option without `lossy_`, and its value."""
    return ", ".join(f"{name.removeprefix('lossy_')} {value}" for name, value in lossy.items())
