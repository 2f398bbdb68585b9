"""Errors that a caller can act on: each is one clear line naming the offending value and the fix.

The command line prints these on stderr and exits with code 2, or 1 for a `LinkError`, which is nobody's input; anything
else is a defect of ours.
"""


class InputError(ValueError):
    """What the caller gave cannot be used: a checkpoint, a prompt, an option."""


class CheckpointError(InputError):
    """A checkpoint on disk is missing something, truncated, corrupt or inconsistent."""


class UnsupportedError(InputError):
    """A model asks for something that is not implemented; the message names the architecture or field."""


class BudgetError(InputError):
    """The device budget is too small; the message gives the smallest one that works."""


class LinkError(RuntimeError):
    """A block that a layer needs cannot be copied to the device; the message names it and says why."""
