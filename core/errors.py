"""Errors a user of this package can meet.

* DafneFederatedError
  - ModelFileError   a `.model` file cannot be read, written or adapted
  - ApprovalError    a model was about to be executed that nobody approved
    - BundleError      a bundle of Flower's is more than configuration
  - DataError        images or masks are missing or do not fit together
  - AdapterError     a layer, shape or rank does not fit the base model
  - StateError       the arrays of an update are not what the plan says
  - MessageError     a message from the other side is not what the protocol says
  - SettingsError    a setting is unknown, missing or out of range
  - RunError         a federation could not start, go on or end
    - FlowerError    Flower's command line failed or gave no answer
    - LostRunError   the program of a run ended without a word of its own
  - ReleaseError     a release is not what was signed
  - ServerError      a Dafne server cannot be reached, refuses, or did not keep what it was sent
    - VersionMovedError  somebody published another version meanwhile
"""

from pydantic import ValidationError


def first_fault(error: ValidationError) -> str:
    """Return where a value does not fit first, and why: ``field.part: words``."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


class DafneFederatedError(Exception):
    """Base of all errors raised on purpose by this package."""


class ModelFileError(DafneFederatedError):
    """A `.model` file cannot be read, written or adapted."""


class ApprovalError(DafneFederatedError):
    """A model was about to be executed that nobody on this machine approved."""


class BundleError(ApprovalError):
    """A bundle of Flower's is not one that a site works by.

    Attributes:
        reason: Fixed words, which may be told to the other side.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class DataError(DafneFederatedError):
    """Images or masks are missing or do not fit together."""


class AdapterError(DafneFederatedError):
    """A layer, shape or rank does not fit the base model."""


class StateError(DafneFederatedError):
    """The arrays of an update are not what the plan says."""


class MessageError(DafneFederatedError):
    """A message from the other side is not what the protocol says."""


class SettingsError(DafneFederatedError):
    """A setting is unknown, missing or out of range."""


class RunError(DafneFederatedError):
    """A federation could not start, go on or end."""


class FlowerError(RunError):
    """Flower's command line failed or gave no answer; its SuperLink may be starting again."""


class LostRunError(RunError):
    """The program of a run ended without a word of its own: it can be started again.

    Attributes:
        number: Flower's number of that start, or None.
    """

    def __init__(self, message: str, number: str | None) -> None:
        super().__init__(message)
        self.number = number


class ReleaseError(DafneFederatedError):
    """A release is not what was signed."""


class ServerError(DafneFederatedError):
    """A Dafne server cannot be reached, refuses, or did not keep what it was sent."""


class VersionMovedError(ServerError):
    """The newest version on a Dafne server is not the one that a model was adapted from.

    Attributes:
        base: The version that the model follows, seconds since 1970; None if the server has none
            of that digest.
        latest: The newest version on the server.
    """

    def __init__(self, message: str, base: int | None, latest: int) -> None:
        super().__init__(message)
        self.base = base
        self.latest = latest
