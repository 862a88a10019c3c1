"""The error tree: each error says what came, what was expected, and the next command.

A `LabError` is a message for a person. The command line prints it without a traceback and exits with its
`exit_status`; the gateway answers with its `http_status`. Anything else that escapes is a defect of ours.
"""

from __future__ import annotations


class LabError(Exception):
    """A problem that the user can act on.

    Args:
        came: what was found, in one sentence.
        expected: what should have been there; may be empty.
        next_command: the command (or action) that leads on; may be empty.
    """

    exit_status = 1
    http_status = 500

    def __init__(self, came: str, expected: str = "", next_command: str = "") -> None:
        self.came, self.expected, self.next_command = came, expected, next_command
        super().__init__(came)

    def __str__(self) -> str:
        """Return the message as shown to the user, one line for each part."""
        lines = [self.came]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.next_command:
            lines.append(f"  next:     {self.next_command}")
        return "\n".join(lines)


class ConfigError(LabError):
    """A configuration file, override or argument is wrong; the message lists every problem at once."""

    exit_status = 2
    http_status = 422


class UnknownName(ConfigError):
    """A model, recipe, index or run was named that does not exist."""

    http_status = 404


class DataError(LabError):
    """Input data is empty, unreadable or unfit for the job."""

    http_status = 422


class RunIncomplete(LabError):
    """A run directory has no valid manifest, or a file in it is not the one that was recorded."""

    http_status = 409


class FingerprintMismatch(LabError):
    """Two artefacts do not belong together: an index and an embedder, an adapter and a base, a template and its lock."""

    http_status = 409


class WeightsMissing(LabError):
    """The weights of a model are not on this machine and may not, or cannot, be fetched."""

    exit_status = 3


class PlanDoesNotFit(LabError):
    """The job needs more memory or disk than this machine has."""

    exit_status = 3


class OutOfMemory(LabError):
    """Memory ran out, and there was nothing left that would take less."""

    exit_status = 3


class RehearsalRefused(LabError):
    """A rehearsed run was handed to a step that acts on real weights."""

    http_status = 409


class TrainingFailed(LabError):
    """Training ended with a model that must not be used: no supervised token, no effect, or a loss that is not finite."""


class Unsupported(LabError):
    """A library that this is built on cannot do this with this architecture."""


class ExportFailed(LabError):
    """A tuned model could not be merged, converted or quantised into one that answers as it did."""


class Rehearsed(LabError):
    """A model was rehearsed, not tuned: the command did what it could and says so with its exit status."""

    exit_status = 4


class EngineError(LabError):
    """The engine could not start, or is not answering."""

    http_status = 503


class PortInUse(EngineError):
    """Another process listens on the address that was asked for."""


class NotWritable(LabError):
    """A folder does not take files: a read-only file system, or another user's."""

    exit_status = 5
    http_status = 507


class DiskFull(LabError):
    """A write ran out of space; nothing that was complete before has been changed."""

    exit_status = 5
    http_status = 507
